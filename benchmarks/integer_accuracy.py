"""Top-1 of integer networks beside the models they came from, on the embedded Fashion-MNIST images.

    shiftaddvit quickstart --output runs/quickstart
    python benchmarks/integer_accuracy.py runs/quickstart/*.safetensors --out integers.json

Ranges are calibrated on 128 training images; all 2,000 embedded test images are judged.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import shiftaddvit as sav
from shiftaddvit.conditions import conditions
from shiftaddvit.errors import UserError
from shiftaddvit.files import write_json
from shiftaddvit.hardware import Widths, to_integers
from shiftaddvit.hardware.accuracy import compare
from shiftaddvit.quickstart.assets import asset, load_images, test_loader

CALIBRATION = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="files that the quickstart wrote; the embedded dense model comes first")
    parser.add_argument("--activation", type=int, nargs="*", default=[8], help="widths of activations to try")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data = load_images()
    calibration = next(iter(test_loader(data.train_images[:CALIBRATION], data.train_labels[:CALIBRATION])))[0]
    rows = []
    for path in [asset("dense.safetensors"), *args.models]:
        model = sav.load(path)
        for bits in args.activation:
            try:
                network = to_integers(model, calibration, Widths(activation=bits))
            except UserError as error:
                print(f"{path.stem}, {bits}-bit activations: {error}", flush=True)
                continue
            found = compare(model, network, test_loader(data.test_images, data.test_labels))
            print(f"{path.stem}, {bits}-bit activations: {found}", flush=True)
            rows.append({"model": path.stem, "activation_bits": bits, **asdict(found)})
    if args.out:
        write_json(args.out, {"rows": rows, "calibration_images": CALIBRATION, "conditions": conditions("cpu")})


if __name__ == "__main__":
    main()
