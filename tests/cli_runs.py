"""Running commands in this process, and the images and models that they run on."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from shiftaddvit.cli.main import app
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.serialization import save

VIT = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
SMALL = [VIT, *(part for key, value in ARGS.items() for part in ("--model-arg", f"{key}={value}"))]
SHORT = ["--epochs", "1", "1", "--batch-size", "4", "--workers", "0", "--augment", "light"]


def run(*arguments: object, code: int = 0):
    """Run a command in this process; its outcome, with stdout and stderr."""
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if outcome.exit_code != code and outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == code, outcome.output
    return outcome


def refused(*arguments: object, says: str) -> str:
    """Run a command that must end with 2 and one line on stderr; the line is returned."""
    outcome = run(*arguments, code=2)
    lines = [line for line in outcome.stderr.splitlines() if line and not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.stderr
    assert says in lines[0], lines[0]
    return lines[0]


def write_images(root: Path, classes: tuple[str, ...] = ("dark", "light"), count: int = 6) -> Path:
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = 60 + 120 * number + noise.integers(-40, 40, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def write_dense(path: Path) -> Path:
    """A dense model of two classes, saved."""
    torch.manual_seed(0)
    save(create_model(VIT, ARGS | {"num_classes": 2}), path)
    return path
