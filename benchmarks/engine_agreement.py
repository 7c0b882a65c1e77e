"""How often engines name the class that their model names, on real images: all 10,000 validation images of Tiny-ImageNet.

    python benchmarks/engine_agreement.py DATA results/tiny_imagenet/weights/*.safetensors --out agreement.json

DATA holds the Parquet shards (val-*.parquet is enough). The model is computed in float32, without TF32. Beside the engines of every dtype stands the same
model under autocast, which is what half precision costs anybody. `--limit` takes the first images only.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import shiftaddvit as sav
from shiftaddvit.conditions import conditions
from shiftaddvit.data.decode import decode_parquet
from shiftaddvit.data.resident import ResidentLoader
from shiftaddvit.files import write_json
from tiny_imagenet import CLASSES, MODELS, SIZE

BATCH = 500


def contenders(model: torch.nn.Module, device: str, side: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Name and function from images to logits, each made when it is asked for."""
    yield "model, autocast bfloat16", lambda images: _autocast(model, images)
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,):
        yield f"engine {str(dtype).removeprefix('torch.')}", sav.deploy(model, BATCH, dtype, device, side, tune_seconds=0)


def _autocast(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        return model(images).float()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pixels, labels = (part[: args.limit] for part in decode_parquet(sorted(args.data.glob("val-*.parquet")), SIZE))
    rows = []
    for path in args.models:
        model = sav.load(path).to(device)
        side = next((MODELS[name].get("img_size", SIZE) for name in sorted(MODELS, key=len, reverse=True) if path.stem.startswith(name)), SIZE)
        batches = list(ResidentLoader(pixels, labels, train=False, batch_size=BATCH, classes=CLASSES, device=device, image_size=side))
        targets = torch.cat([batch[1] for batch in batches])
        expected = torch.cat([model(images).float() for images, _ in batches])
        rows.append(_row(path.stem, "model, float32", expected, expected, targets))
        for name, function in contenders(model, device, side):
            rows.append(_row(path.stem, name, torch.cat([function(images).float() for images, _ in batches]), expected, targets))
    if args.out:
        write_json(args.out, {"rows": rows, "data": f"Tiny-ImageNet-200, {len(labels):,} validation images", "conditions": conditions(device)})


def _row(model: str, name: str, logits: Tensor, expected: Tensor, targets: Tensor) -> dict:
    classes, wanted = logits.argmax(1), expected.argmax(1)
    row = {
        "model": model, "contender": name, "images": len(targets), "top1": 100 * float((classes == targets).double().mean()),
        "same_class": 100 * float((classes == wanted).double().mean()), "error": float((logits - expected).norm() / expected.norm()),
    }  # fmt: skip
    print(f"{model:36s}{name:28s}top-1 {row['top1']:.2f} %  same class {row['same_class']:.2f} %  relative error {row['error']:.1e}", flush=True)
    return row


if __name__ == "__main__":
    main()
