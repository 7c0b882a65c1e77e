"""Searched recipes against the shipped rows at equal energy, on Tiny-ImageNet-200 at 64×64.

Sensitivities of every option are measured on the 5,000 development images (of the training set, never trained on); then for each row the recipe
of least damage at its energy is searched, and both are fine-tuned like the rows of tiny_imagenet.py and evaluated on the 10,000 validation
images. One process; every file that is there is kept, so a run that was stopped goes on with the same command.

    python benchmarks/search_tiny_imagenet.py DATA OUT --weights OUT/pvt_v2_b0/model.safetensors
    python benchmarks/search_tiny_imagenet.py DATA OUT --weights … --rows ours-quant-moe ours-quant-shift --seeds 3 --compile

About 18 fine-tunings a seed; expected result: not run yet.
"""

import argparse
from pathlib import Path

import torch
from search_rows import Setup, run
from tiny_imagenet import CLASSES, FINETUNE_AUGMENT, SIZE, arrays, changed, loaders

from shiftaddvit.data.resident import ResidentLoader
from shiftaddvit.reparam import Recipe
from shiftaddvit.serialization import load
from shiftaddvit.train import FinetuneConfig, StageConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="the dense model, as 'tiny_imagenet.py pretrain' wrote it")
    parser.add_argument("--rows", nargs="*", default=[], help="only these")
    parser.add_argument("--set", nargs="*", default=[], help="settings of primitives, as in tiny_imagenet.py: angular.local=mean …")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2.5e-4)
    parser.add_argument("--shift-lr", type=float, default=10.0)
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 10))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--check", type=int, default=40, help="random choices for the check that effects add up")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = arrays(args.data)["dev"]
    first, second = args.epochs

    def config(seed: int) -> FinetuneConfig:
        return FinetuneConfig(
            stages=(StageConfig("attention", first, lr=args.lr), StageConfig("all", second, lr=args.lr)), seed=seed,
            precision="bf16" if device == "cuda" else "no", evaluate_every=0, shift_lr_scale=args.shift_lr, checkpoint_minutes=60,
            compile=args.compile,
        )  # fmt: skip

    def both(seed: int):
        return loaders(args.data, args.batch, seed, "val", FINETUNE_AUGMENT, device, torch.float32)

    setup = Setup(
        dense=lambda: load(args.weights), image_size=(SIZE, SIZE),
        dev=ResidentLoader(images, labels, train=False, batch_size=1000, classes=CLASSES, device=device, dtype=torch.float32),
        train=lambda seed: both(seed)[0], test=lambda: both(0)[1], config=config, settings=changed(Recipe(), args.set), device=device,
        about="Tiny-ImageNet: search on 5,000 training images held out, fine-tuning on the other 95,000, final comparison on the 10,000 validation images",
    )  # fmt: skip
    run(setup, args.out / "search", tuple(range(args.seeds)), tuple(args.rows), args.check)


if __name__ == "__main__":
    main()
