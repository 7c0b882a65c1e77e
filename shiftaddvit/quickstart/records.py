"""What `shiftaddvit report` shows besides accuracies: each row's energy by layer, and where the mixtures send which part of an image."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from shiftaddvit.conditions import conditions
from shiftaddvit.cost import Settings
from shiftaddvit.cost.estimate import cost
from shiftaddvit.cost.experts import Shares
from shiftaddvit.cost.subjects import model_subject
from shiftaddvit.evaluation.dispatch import dispatch
from shiftaddvit.files import write_json
from shiftaddvit.schema import stamped

from .assets import ARCHITECTURE, ARCHITECTURE_ARGS, CLASS_NAMES, DATA, SIDE, EmbeddedImages, as_model_input, test_loader
from .multiplications import Shares as TokenShares

MODEL = {"name": ARCHITECTURE, "args": ARCHITECTURE_ARGS}
SHOWN, SEEN = 8, 100
"""Images with maps, and images that the shares of the maps are over."""


def write_energy(model: nn.Module, recipe: str | None, shares: TokenShares, path: Path) -> dict[str, Any]:
    """Write the energy of one image, its tokens divided as measured, and return the total and the settings."""
    subject = model_subject(model, f"{ARCHITECTURE}, {recipe or 'dense'}", (SIDE, SIDE), 1)
    found = cost(subject, Shares(shares, "measured over the test images" if shares else "no mixtures"), Settings()).to_dict()
    described = {"subject": {"model": MODEL, "recipe": recipe or "dense"}}
    write_json(path, stamped("energy", described | found | {"conditions": conditions("cpu")}))
    return {"total_mj": found["total_mj"], "settings": found["settings"]}


def write_dispatch(model: nn.Module, embedded: EmbeddedImages, path: Path, device: torch.device) -> None:
    """Write the expert of every token of some test images, one of each class first."""
    first = [int((embedded.test_labels == label).nonzero()[0][0]) for label in range(len(CLASS_NAMES))]
    order = first + [number for number in range(SEEN) if number not in first]
    images, labels = embedded.test_images[order], embedded.test_labels[order]
    inputs = torch.cat([batch for batch, _ in test_loader(images, labels, device)])
    names = [CLASS_NAMES[label] for label in labels[:SHOWN]]
    found = dispatch(
        model, inputs, torch.from_numpy(as_model_input(images[:SHOWN])), [f"test image {number}" for number in order[:SHOWN]], names, CLASS_NAMES
    )
    recipe = model.shiftaddvit_recipe.to_dict()
    described = {"model": MODEL, "recipe": recipe, "file": None, "data": DATA}
    write_json(path, stamped("dispatch", described | found.to_json() | {"conditions": conditions(device, image_size=[SIDE, SIDE])}))
