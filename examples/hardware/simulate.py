"""Run the exported shift layers in Icarus Verilog:  python simulate.py FOLDER [LAYER…]   (needs iverilog and vvp; Python alone otherwise)."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def simulate(folder: Path, name: str) -> str:
    """The test bench's verdict on one shift layer: a line that begins with PASS or FAIL."""
    network = json.loads((folder / "network.json").read_text())
    layer = next(layer for layer in network["layers"] if layer["name"] == name)
    source, arrays = layer["inputs"][0], layer["arrays"]
    lines = len((folder / "vectors" / f"{source}.hex").read_text().split())
    rows, columns = network["arrays"][arrays["codes"]]["shape"]
    parameters = {
        "TOKENS": lines // columns, "IN": columns, "OUT": rows, "X_BITS": network["tensors"][source]["bits"], "CODE_BITS": layer["code_bits"],
        "ACC_BITS": layer["accumulator_bits"], "BIAS_BITS": network["arrays"][arrays["bias"]]["bits"],
        "SHIFT_BITS": network["arrays"][arrays["shift"]]["bits"], "Y_BITS": layer["bits"],
    }  # fmt: skip
    files = {"x": f"vectors/{source}", "y": f"vectors/{name}"} | {port: f"arrays/{arrays[port]}" for port in ("codes", "bias", "shift")}
    with tempfile.TemporaryDirectory() as work:
        program = Path(work) / "bench"
        given = [f"-Pshift_linear_tb.{key}={value}" for key, value in parameters.items()]
        sources = [str(HERE / "shift_linear.v"), str(HERE / "shift_linear_tb.v")]
        subprocess.run(["iverilog", "-g2005-sv", "-o", str(program), "-s", "shift_linear_tb", *given, *sources], check=True)
        inputs = [f"+{port}={folder / file}.hex" for port, file in files.items()]
        done = subprocess.run(["vvp", "-n", str(program), *inputs], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main(folder: Path, names: list[str]) -> int:
    """All named layers, or all shift layers; 0 if all pass."""
    network = json.loads((folder / "network.json").read_text())
    names = names or [layer["name"] for layer in network["layers"] if layer["kind"] == "shift_linear"]
    failed = 0
    for name in names:
        verdict = simulate(folder, name)
        failed += not verdict.startswith("PASS")
        print(f"{name}: {verdict}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
