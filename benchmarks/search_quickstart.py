"""Searched recipes against the shipped rows on the embedded model and images: small and easy, on a CPU in about half an hour.

    python benchmarks/search_quickstart.py results/search/quickstart

Of the 6,000 embedded training images 1,000 drawn at random ("dev") serve the search and 2,500 of the others the fine-tuning; the dense model
was pre-trained on all of them. The 2,000 test images are for the final comparison only.
"""

import argparse
from pathlib import Path

import numpy as np
from search_rows import Setup, run

from shiftaddvit.quickstart import assets
from shiftaddvit.quickstart.rows import Budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="*", default=[], help="only these")
    parser.add_argument("--check", type=int, default=30, help="random choices for the check that effects add up")
    args = parser.parse_args()
    images = assets.load_images()
    order = np.random.default_rng(0).permutation(len(images.train_labels))
    dev, train = np.sort(order[-1000:]), np.sort(order[:-1000])[::2]
    setup = Setup(
        dense=assets.load_dense, image_size=(assets.SIDE, assets.SIDE),
        dev=list(assets.test_loader(images.train_images[dev], images.train_labels[dev])),
        train=lambda seed: assets.training_loader(images.train_images[train], images.train_labels[train], 100, seed),
        test=lambda: assets.test_loader(images.test_images, images.test_labels), config=lambda seed: Budget().config(seed),
        about="Fashion-MNIST: search on 1,000 embedded training images, fine-tuning on 2,500 others, final comparison on the 2,000 test images",
    )  # fmt: skip
    run(setup, args.out, tuple(range(args.seeds)), tuple(args.rows), args.check)


if __name__ == "__main__":
    main()
