"""Tiny-ImageNet-200 at 64×64: pre-train dense models, then fine-tune the rows of the ablation table from their weights.

Expected result and cost: see results/tiny_imagenet/. All data lives on the GPU as bytes. The last 5,000 of the shuffled training images
("dev") are never trained on: forms and hyper-parameters are chosen there, the 10,000 validation images are for the final table only.

    python benchmarks/tiny_imagenet.py pretrain DATA OUT --arch pvt_v2_b0 --epochs 300
    python benchmarks/tiny_imagenet.py row DATA OUT --arch pvt_v2_b0 --weights OUT/pvt_v2_b0/dense.safetensors --recipe ours-quant-moe

DATA holds the Parquet shards (train-*.parquet, val-*.parquet).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import shiftaddvit.models  # noqa: F401
from shiftaddvit.data.augment import AugmentConfig
from shiftaddvit.data.decode import decode_parquet
from shiftaddvit.data.resident import ResidentLoader
from shiftaddvit.evaluation import evaluate
from shiftaddvit.models import load_pretrained
from shiftaddvit.reparam import Recipe, recipes, reparameterize
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.reparam.calibrate import calibrate, needs_calibration
from shiftaddvit.serialization import load, round_dense, save
from shiftaddvit.train import FinetuneConfig, StageConfig, finetune, pretraining
from shiftaddvit.train.latency import measure_expert_latency
from shiftaddvit.train.run_folder import annotate_result

CLASSES, SIZE, DEV = 200, 64, 5000
WEIGHTS = "dense.safetensors"
MODELS = {
    "pvt_v2_b0": {"num_classes": CLASSES, "drop_path_rate": 0.05},
    "pvt_v2_b1": {"num_classes": CLASSES, "drop_path_rate": 0.1},
    "pvt_tiny": {"num_classes": CLASSES, "img_size": SIZE, "drop_path_rate": 0.1},
    "deit_tiny_patch16_224": {"num_classes": CLASSES, "img_size": SIZE, "patch_size": 8, "drop_path_rate": 0.05},
    "vit_small_patch14_dinov2": {"num_classes": CLASSES, "img_size": 112, "drop_path_rate": 0.1},
}
RATES = {"vit_small_patch14_dinov2": 1e-4}
"""Learning rates of fine-tuning at a batch of 512 where they are not 2.5e-4."""
PRETRAIN_AUGMENT = AugmentConfig(
    scale=(0.25, 1.0), rand_augment="rand-m6-mstd0.5-inc1", erasing=0.1, mixup=0.2, cutmix=1.0, mix_probability=0.8, label_smoothing=0.1
)
FINETUNE_AUGMENT = replace(PRETRAIN_AUGMENT, scale=(0.35, 1.0), mix_probability=0.5)


def arrays(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """train (95,000), dev (5,000) and val (10,000), decoded once and kept beside the shards."""
    found = {}
    for split in ("train", "val"):
        pixels, labels = data / f"{split}.npy", data / f"{split}_labels.npy"
        if not labels.exists():
            images, targets = decode_parquet(sorted(data.glob(f"{split}-*.parquet")), SIZE)
            np.save(pixels, images)
            np.save(labels, targets)
        found[split] = np.load(pixels), np.load(labels)
    images, targets = found["train"]
    order = np.random.default_rng(0).permutation(len(images))
    found["train"] = images[order[:-DEV]], targets[order[:-DEV]]
    found["dev"] = images[order[-DEV:]], targets[order[-DEV:]]
    return found


def loaders(args: argparse.Namespace, split: str, augment: AugmentConfig, device: str):
    found, batch, seed = arrays(args.data), args.batch, args.seed
    common = {"classes": CLASSES, "device": device, "image_size": MODELS[args.arch].get("img_size", SIZE)}
    train = ResidentLoader(*found["train"], train=True, batch_size=batch, augment=augment, seed=seed, **common)
    return train, ResidentLoader(*found[split], train=False, batch_size=1000, **common)


def named(split: str) -> str:
    """The data that accuracies are of, for result files."""
    images = {"val": "10,000 validation images", "dev": "5,000 training images held out"}[split]
    return f"Tiny-ImageNet-200, 64x64, 95,000 training images, {images}"


def pretrain(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = create_model(args.arch, MODELS[args.arch])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, val = loaders(args, "val", FINETUNE_AUGMENT if args.start else PRETRAIN_AUGMENT, device)
    if args.start:
        load_pretrained(model, args.start)
    config = replace(
        pretraining(args.epochs, lr=args.lr, seed=args.seed, ema_decay=None if args.start else 0.9995),
        precision="bf16" if device == "cuda" else "no", compile=args.compile, evaluate_every=20, checkpoint_minutes=1.0, log_every=100,
    )  # fmt: skip
    output = args.out / args.arch
    result = finetune(model, train, val, config, output=output, resume=True)
    annotate_result(output, data=named("val"))
    # Every row starts from weights that a small file holds.
    top1 = evaluate(round_dense(model), val).top1
    save(model, output / WEIGHTS, metadata={"top1": f"{top1:.2f}"})
    print(args.arch, f"{result.evaluation.top1:.2f}, in half precision {top1:.2f}", flush=True)


def row(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = load(args.weights)
    teacher = load(args.weights) if args.distill else None
    if args.recipe != "dense":
        reparameterize(model, changed(recipes[args.recipe], args.set))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, val = loaders(args, args.split, FINETUNE_AUGMENT, device)
    first, second = args.epochs
    rate = args.lr or RATES.get(args.arch, 2.5e-4)
    how = "attention" if args.compile and args.recipe.endswith("moe") else None
    stages = (StageConfig("attention", first, lr=rate), StageConfig("all", second, lr=args.lr2 or rate, compile=how))
    config = FinetuneConfig(
        stages=stages, seed=args.seed, precision="bf16" if device == "cuda" else "no", evaluate_every=0, shift_lr_scale=args.shift_lr,
        adder_lr_scale=args.adder_lr,
        distill_weight=args.distill, balance_weight=args.balance, checkpoint_minutes=60, compile=args.compile,
    )  # fmt: skip
    output = args.out / f"{args.arch}-{args.name or args.recipe}-s{args.seed}"
    result = finetune(model, train, val, config, output=output, overwrite=True, teacher=teacher)
    annotate_result(output, data=named(args.split))
    print(output.name, args.set, f"{result.evaluation.top1:.2f}", flush=True)


def profile(args: argparse.Namespace) -> None:
    """Measure the experts' latencies while nothing else uses the GPU; rows find them in the user's cache."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for recipe in args.recipe:
        model = reparameterize(create_model(args.arch, MODELS[args.arch]), recipes[recipe]).to(device)
        side = MODELS[args.arch].get("img_size", SIZE)
        images = torch.randn(args.batch, 3, side, side, device=device)
        if needs_calibration(model):
            calibrate(model, images[:8])
        for name, seconds in measure_expert_latency(model, images).items():
            print(recipe, name, " ".join(f"{1e6 * second:.0f} us" for second in seconds), flush=True)


def changed(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with `table.field=value` settings; a value is JSON, or else a word."""
    values = recipe.to_dict()
    for setting in settings:
        path, _, text = setting.partition("=")
        table, _, field = path.rpartition(".")
        is_word = text.replace("-", "").isalpha() and text not in ("true", "false", "null")
        (values.setdefault(table, {}) if table else values)[field] = text if is_word else json.loads(text)
    return Recipe.from_dict(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("pretrain", pretrain), ("profile", profile), ("row", row)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--arch", choices=MODELS, default="pvt_v2_b0")
        command.add_argument("--batch", type=int, default=1024)
        if name == "profile":
            command.add_argument("--recipe", nargs="+", required=True)
            continue
        command.add_argument("data", type=Path)
        command.add_argument("out", type=Path)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--lr", type=float, default=1e-3 if name == "pretrain" else None)
        command.add_argument("--compile", action="store_true", help="of a stage with mixtures attention alone: the rest would take longer to compile than to train")
        if name == "pretrain":
            command.add_argument("--epochs", type=int, default=300)
            command.add_argument("--start", type=Path, help="foundation weights to start from instead of random ones")
            continue
        command.add_argument("--weights", type=Path, required=True)
        command.add_argument("--recipe", default="ours-quant-moe")
        command.add_argument("--name", default="")
        command.add_argument("--set", nargs="*", default=[])
        command.add_argument("--epochs", type=int, nargs=2, default=(10, 10))
        command.add_argument("--lr2", type=float, default=None)
        command.add_argument("--shift-lr", type=float, default=10.0)
        command.add_argument("--adder-lr", type=float, default=FinetuneConfig().adder_lr_scale)
        command.add_argument("--balance", type=float, default=FinetuneConfig().balance_weight)
        command.add_argument("--distill", type=float, default=0.0)
        command.add_argument("--split", choices=("dev", "val"), default="dev")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
