"""Which network, recipe and image size a result file is about."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from .fields import Fields

_NOT_THE_NETWORK = ("num_classes", "drop_path_rate", "drop_rate", "img_size")
"""Arguments that leave the network what it is for a comparison."""


@dataclass(frozen=True)
class ModelRef:
    """Which network on what: results are compared only where this is the same."""

    name: str
    """In timm's registry."""
    args: str = ""
    """Arguments it was built with, less the number of classes: canonical JSON, or a word where they are not recorded."""
    size: tuple[int, int] | None = None
    """Height and width of its images, where that is known."""

    @property
    def title(self) -> str:
        """For people: the name, and what makes it another network than that of this name."""
        if not self.args:
            return self.name
        return f"{self.name} (with its own {', '.join(json.loads(self.args))})" if self.args.startswith("{") else f"{self.name} ({self.args})"

    @property
    def sized(self) -> str:
        """For people: the title, and the size of its images where that is known."""
        return f"{self.title}, {self.size[0]}×{self.size[1]}" if self.size else self.title


def model_ref(values: Fields, size: tuple[int, int] | None) -> ModelRef:
    """The network that `model` names: an object with name and arguments, or a name alone."""
    model = values.values.get("model")
    if isinstance(model, str):
        return ModelRef(model, "", size)
    fields = values.fields("model")
    args = fields.values.get("args")
    args = args if isinstance(args, Mapping) else {}
    kept = {key: value for key, value in args.items() if key not in _NOT_THE_NETWORK}
    built_for = image_size(args.get("img_size"))
    return ModelRef(fields.text("name"), json.dumps(kept, sort_keys=True) if kept else "", size or built_for)


def recipe_name(recipe: object) -> str:
    """The name of a recipe as result files have it: None, a name, or an object with a name."""
    if recipe is None:
        return "dense"
    if isinstance(recipe, Mapping):
        recipe = recipe.get("name")
    return recipe if isinstance(recipe, str) and recipe else "unnamed recipe"


def image_size(value: object) -> tuple[int, int] | None:
    """(height, width) from two numbers or one side; None for anything else."""
    sides = [value, value] if _is_side(value) else value
    return (sides[0], sides[1]) if isinstance(sides, list) and len(sides) == 2 and all(map(_is_side, sides)) else None


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
