"""From what the user calls a model to the model: a name that timm knows, or a file that `save` wrote."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftaddvit.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from shiftaddvit.serialization import SaveReport

Say = Callable[[str], None]

WEIGHTS = (".pth", ".pt", ".bin")
"""Endings of files that hold weights alone."""

_HEADS = ("head.weight", "head.fc.weight", "classifier.weight", "cls_classifier.weight")


@dataclass(frozen=True)
class ModelChoice:
    """MODEL and the options that go with it."""

    model: str
    """Name in timm's registry, or path of a saved model."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for timm."""
    weights: Path | None = None
    """File with pre-trained weights."""
    pretrained: bool = False
    """Whether timm may download weights."""
    num_classes: int | None = None
    """Outputs; None for those of the weights."""
    image_size: tuple[int, int] | None = None
    """(height, width); None for the model's own."""
    seed: int = 0
    """Of what starts at random."""

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise UserError(f"--num-classes must be at least 1, got {self.num_classes}")
        if self.weights is not None and self.pretrained:
            raise UserError("--weights and --pretrained exclude one another: give one")
        if self.is_file and (self.weights is not None or self.pretrained):
            raise UserError(f"{self.model} brings its own weights: leave out --weights and --pretrained")

    @property
    def is_file(self) -> bool:
        """Whether MODEL is meant as a file."""
        return self.model.endswith((".safetensors", *WEIGHTS)) or "/" in self.model

    def stored(self) -> dict[str, Any]:
        """What the file says about its images; empty for a model by name."""
        from shiftaddvit.serialization import read_image_settings

        return read_image_settings(self.model) if self.is_file else {}

    def class_names(self, network: "nn.Module") -> list[str] | None:
        """The name of each output of the model, where its file says; None for a head of another size, which starts anew."""
        names = self.stored().get("classes")
        return names if names is not None and len(names) == network.num_classes else None


def check_saved(path: str) -> None:
    """Raise UserError unless `path` can be a file that `save` wrote, for commands that take nothing else: with the command that makes one."""
    if not ModelChoice(path).is_file:
        raise UserError(f"{path!r} is no file: a .safetensors file is wanted that convert or finetune wrote")
    if path.endswith(WEIGHTS):
        made = f"shiftaddvit convert NAME --weights {path} --recipe dense --output FILE.safetensors"
        raise UserError(f"{path} is no model that shiftaddvit saved (.safetensors); make one of its weights first: {made}")
    if not path.endswith(".safetensors"):
        raise UserError(f"{path} is no model that shiftaddvit saved: a .safetensors file is wanted that convert or finetune wrote")


def settings_to_store(size: tuple[int, int], crop_pct: float, classes: list[str] | None) -> dict[str, str]:
    """Metadata from which `read_image_settings` reads how a model wants its images."""
    from shiftaddvit.serialization import IMAGES

    return {IMAGES: json.dumps({"image_size": list(size), "crop_pct": crop_pct, "classes": classes})}


def origin(choice: ModelChoice, model: "nn.Module") -> dict[str, str]:
    """Where a model's weights come from, as the card of what becomes of it says it: `base`, and for timm's own weights `base_model` and
    `license`."""
    from shiftaddvit.model_card import ModelFacts
    from shiftaddvit.serialization import read_metadata

    if choice.is_file:
        before = ModelFacts.from_metadata(read_metadata(choice.model))
        return {"base": before.base or Path(choice.model).name, "base_model": before.base_model, "license": before.license}
    if choice.pretrained:
        known = getattr(model, "pretrained_cfg", None) or {}
        return {"base": "timm's pre-trained weights", "base_model": known.get("hf_hub_id") or "", "license": known.get("license") or ""}
    return {"base": choice.weights.name if choice.weights is not None else "random weights"}


def card_line(report: "SaveReport") -> str:
    """What became of the model's card."""
    return f"model card: {report.card}" if report.card else f"no model card written: files of your own are where it would go, beside {report.path}"


def open_model(choice: ModelChoice, say: Say, verbose: bool = False) -> "nn.Module":
    """The model, dense or converted, with its weights; what was not taken over as it is, is said."""
    import torch

    from shiftaddvit.serialization import load

    torch.manual_seed(choice.seed)
    if not choice.is_file:
        return _dense(choice, say, verbose)
    path = Path(choice.model)
    if path.suffix != ".safetensors":
        hint = "; give timm's name of the model, and the file with --weights" if path.suffix in WEIGHTS else ""
        raise UserError(f"{path} is no model that shiftaddvit saved (.safetensors){hint}")
    model = load(path)
    built = model.shiftaddvit_architecture
    if hasattr(model, "shiftaddvit_recipe"):
        return _converted(model, choice, say)
    # A dense file is a name and its weights, so that another class count or image size is bridged as for any other weights.
    wanted = {**built.args, **choice.args}
    same = choice.num_classes in (None, model.num_classes) and choice.image_size in (None, own_size(model)) and wanted == dict(built.args)
    if same:
        return model
    classes = choice.num_classes or model.num_classes
    return _dense(replace(choice, model=built.name, args=wanted, weights=path, num_classes=classes), say, verbose)


def own_size(model: "nn.Module") -> tuple[int, int]:
    """(height, width) that the model was built for."""
    fixed = fixed_size(model)
    if fixed is not None:
        return fixed
    config = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("input_size", (3, 224, 224))[1:])


def fixed_size(model: "nn.Module") -> tuple[int, int] | None:
    """(height, width) that its position embeddings are for; None where any size is as good."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return tuple(size) if size is not None else None


def counted(rows: Iterable[tuple[str, str]]) -> str:
    """`12 × zeros; 3 × dropout`: the reasons of a report's rows."""
    return "; ".join(f"{count} × {reason}" for reason, count in Counter(reason for _, reason in rows).items())


def _dense(choice: ModelChoice, say: Say, verbose: bool) -> "nn.Module":
    from shiftaddvit.models import load_pretrained

    classes = choice.num_classes
    if classes is None and choice.weights is not None and "num_classes" not in choice.args:
        classes = _classes_in(choice.weights)
    args = dict(choice.args) | ({"num_classes": classes} if classes is not None else {})
    model = _build(choice, args)
    fixed = fixed_size(model)
    if choice.image_size is not None and fixed is not None and fixed != choice.image_size:
        model = _build(choice, args | {"img_size": choice.image_size})
    if choice.weights is not None:
        report = load_pretrained(model, choice.weights)
        say(str(report) if verbose else _load_summary(report))
    elif choice.pretrained:
        say(f"{choice.model}: timm's pre-trained weights")
    else:
        say(f"{choice.model}: no --weights given, so its weights are random")
    return model


def _build(choice: ModelChoice, args: Mapping[str, Any]) -> "nn.Module":
    from shiftaddvit.reparam.architecture import create_model

    try:
        return create_model(choice.model, args, pretrained=choice.pretrained)
    except UserError:
        raise
    except (AssertionError, ValueError, ZeroDivisionError, RuntimeError, OSError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        what = "cannot be downloaded; give a file with --weights" if choice.pretrained else f"cannot be built with {dict(args)}"
        raise UserError(f"model {choice.model!r} {what}: {why}") from None


def _converted(model: "nn.Module", choice: ModelChoice, say: Say) -> "nn.Module":
    if choice.args:
        raise UserError(f"{choice.model} is converted, its architecture is settled: leave out --model-arg")
    fixed = fixed_size(model)
    if choice.image_size is not None and fixed not in (None, choice.image_size):
        raise UserError(f"{choice.model} is converted and takes images of {fixed[0]}×{fixed[1]}, not {choice.image_size[0]}×{choice.image_size[1]}")
    if choice.num_classes is not None and choice.num_classes != model.num_classes:
        say(f"{choice.model}: its head for {model.num_classes} classes starts anew for {choice.num_classes}")
        model.reset_classifier(choice.num_classes)
        built = model.shiftaddvit_architecture
        model.shiftaddvit_architecture = replace(built, args={**built.args, "num_classes": choice.num_classes})
    return model


def _classes_in(path: Path) -> int | None:
    """Rows of the classifier among the weights, where there is one under a name that is known."""
    from shiftaddvit.models import read_weights

    weights = read_weights(path)
    heads = [weights[key] for key in _HEADS if key in weights]
    return int(heads[0].shape[0]) if heads and heads[0].ndim == 2 else None


def _load_summary(report: Any) -> str:
    lines = [f"{report.path}: {report.layout}, {report.architecture}; {len(report.used)} tensors used"]
    lines += [f"  starts otherwise: {key}: {how}" for key, how in report.made]
    lines += [f"  left out: {counted(report.dropped)}"] if report.dropped else []
    return "\n".join([*lines, *(f"  note: {note}" for note in report.notes)])
