"""How the files in `assets/quickstart` were made; nobody needs to run this again.

    python -m shiftaddvit.quickstart.pretrain /usr/share/datasets/fashion-mnist

The folder holds Fashion-MNIST's four files as Debian's package `dataset-fashion-mnist` (or the project's repository) has them. Expected
result and cost: see `assets/quickstart/README.md`.
"""

import argparse
import gzip
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from shiftaddvit.errors import UserError
from shiftaddvit.evaluation import evaluate
from shiftaddvit.files import atomic_write
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.serialization import round_dense, save
from shiftaddvit.train import finetune, pretraining

from .assets import ARCHITECTURE, ARCHITECTURE_ARGS, CLASS_NAMES, asset, test_loader, training_loader

TRAIN_PER_CLASS, TEST_PER_CLASS = 600, 200


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """The bytes of a gzipped IDX file (LeCun's format of MNIST) in their shape. UserError if it is not one."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the folder of Fashion-MNIST's four .gz files") from None
    kind, dimensions = raw[2], raw[3]
    shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4)
    if kind != 8 or len(raw) != 4 + 4 * dimensions + shape.prod():
        raise UserError(f"{path} is not a whole IDX file of bytes")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_split(folder: Path, split: str) -> tuple[UInt8[np.ndarray, "N 28 28"], Int64[np.ndarray, "N"]]:
    """Images and labels of `train` or `t10k`."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    return images, read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64)


def first_of_each_class(labels: Int64[np.ndarray, "N"], count: int) -> Int64[np.ndarray, "n"]:
    """Indices of the first `count` images of every class, in their order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(len(CLASS_NAMES))]))


def write_images(train: tuple, test: tuple, path: Path) -> None:
    """The embedded part of both splits."""
    arrays = {}
    for name, (images, labels), count in (("train", train, TRAIN_PER_CLASS), ("test", test, TEST_PER_CLASS)):
        chosen = first_of_each_class(labels, count)
        arrays |= {f"{name}_images": images[chosen], f"{name}_labels": labels[chosen]}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--lr", type=float, default=8e-3, help="peak learning rate at a batch of 512")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=asset(""), help="folder to write to")
    args = parser.parse_args()
    train, test = read_split(args.folder, "train"), read_split(args.folder, "t10k")
    write_images(train, test, args.output / "fashion_mnist.npz")
    torch.manual_seed(args.seed)
    model = create_model(ARCHITECTURE, ARCHITECTURE_ARGS)
    config = replace(pretraining(args.epochs, args.lr, args.seed, ema_decay=None), evaluate_every=0)
    start = time.process_time()
    finetune(model, training_loader(*train, args.batch, args.seed), None, config)
    seconds = time.process_time() - start
    round_dense(model)
    chosen = first_of_each_class(test[1], TEST_PER_CLASS)
    whole, embedded = (evaluate(model, test_loader(*part), progress=False) for part in (test, (test[0][chosen], test[1][chosen])))
    reached = {"classes": json.dumps(CLASS_NAMES), "top1": f"{whole.top1:.2f}", "top1_embedded": f"{embedded.top1:.2f}"}
    print(save(model, args.output / "dense.safetensors", metadata=reached))
    print(f"{seconds:.0f} s of CPU; top-1 {whole.top1:.2f} % of 10,000 test images, {embedded.top1:.2f} % of the {len(chosen)} embedded ones")


if __name__ == "__main__":
    main()
