"""Run the exported shift and MatAdd layers in Icarus Verilog:  python simulate.py FOLDER [LAYER…]

Needs iverilog and vvp on the path (Debian: apt-get install iverilog), and no Python package.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def simulate(folder: Path, name: str) -> str:
    """The test bench's verdict on one layer: lines of which the last begins with PASS or FAIL."""
    network = json.loads((folder / "network.json").read_text())
    layer = next(layer for layer in network["layers"] if layer["name"] == name)
    bench, parameters, files = _shift_linear(folder, network, layer) if layer["kind"] == "shift_linear" else _mat_add(folder, network, layer)
    with tempfile.TemporaryDirectory() as work:
        program = Path(work) / "bench"
        given = [f"-P{bench}_tb.{key}={value}" for key, value in parameters.items()]
        sources = [str(HERE / f"{bench}.v"), str(HERE / f"{bench}_tb.v")]
        subprocess.run(["iverilog", "-g2005-sv", "-o", str(program), "-s", f"{bench}_tb", *given, *sources], check=True)
        inputs = [f"+{port}={folder / file}.hex" for port, file in files.items()]
        done = subprocess.run(["vvp", "-n", str(program), *inputs], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _shift_linear(folder: Path, network: dict, layer: dict) -> tuple[str, dict, dict]:
    source, arrays = layer["inputs"][0], layer["arrays"]
    rows, columns = network["arrays"][arrays["codes"]]["shape"]
    parameters = {
        "TOKENS": _values(folder, source) // columns, "IN": columns, "OUT": rows, "X_BITS": network["tensors"][source]["bits"],
        "CODE_BITS": layer["code_bits"], "ACC_BITS": layer["accumulator_bits"], "BIAS_BITS": network["arrays"][arrays["bias"]]["bits"],
        "SHIFT_BITS": network["arrays"][arrays["shift"]]["bits"], "Y_BITS": layer["bits"],
    }  # fmt: skip
    files = {"x": f"vectors/{source}", "y": f"vectors/{layer['name']}"} | {port: f"arrays/{arrays[port]}" for port in ("codes", "bias", "shift")}
    return "shift_linear", parameters, files


def _mat_add(folder: Path, network: dict, layer: dict) -> tuple[str, dict, dict]:
    codes, values = layer["inputs"]
    tokens, channels = network["tensors"][codes]["shape"]
    parameters = {
        "IMAGES": _values(folder, codes) // (tokens * channels), "TOKENS": tokens, "HEADS": layer["heads"], "WIDTH": channels // layer["heads"],
        "KEYS": int(layer["kind"] == "mat_add_keys"), "VALUE_BITS": network["tensors"][values]["bits"], "ACC_BITS": layer["accumulator_bits"],
        "PLUS_MINUS": int(layer["plus_minus"]),
    }  # fmt: skip
    return "mat_add", parameters, {"codes": f"vectors/{codes}", "values": f"vectors/{values}", "y": f"vectors/{layer['name']}"}


def _values(folder: Path, tensor: str) -> int:
    return len((folder / "vectors" / f"{tensor}.hex").read_text().split())


def main(folder: Path, names: list[str]) -> int:
    """All named layers, or all that there are benches for; 0 if all pass."""
    network = json.loads((folder / "network.json").read_text())
    names = names or [layer["name"] for layer in network["layers"] if layer["kind"] in ("shift_linear", "mat_add_keys", "mat_add_queries")]
    failed = 0
    for name in names:
        verdict = simulate(folder, name)
        failed += not verdict.splitlines()[-1].startswith("PASS")
        print(f"{name}: {verdict}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
