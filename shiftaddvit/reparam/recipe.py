"""A recipe says which primitive computes what; its fields are the columns of the method's ablation table."""

import dataclasses
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from shiftaddvit.baselines.adder_attention import AdderAttentionConfig
from shiftaddvit.baselines.performer import PerformerConfig
from shiftaddvit.errors import UserError, unknown
from shiftaddvit.layers.adder import AdderConfig
from shiftaddvit.layers.attention import AngularConfig, BinaryConfig
from shiftaddvit.layers.hashing import HashConfig
from shiftaddvit.layers.moe import MoEConfig
from shiftaddvit.layers.shift import ShiftConfig

Attention = Literal["keep", "msa", "linear", "ecoformer", "performer", "adder", "sra-linear"]
Add = Literal["none", "quant", "ksh"]
Linear = Literal["mult", "shift", "moe", "adder", "shift-add"]
Rest = Literal["mult", "shift", "adder", "shift-add"]

_COLUMNS: dict[str, tuple[str, ...]] = {
    "attention": get_args(Attention), "add": get_args(Add), "attn_linear": get_args(Linear), "mlp": get_args(Linear), "rest": get_args(Rest),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Which primitive replaces what. Everything defaults to the model as it is."""

    attention: Attention = "keep"
    """`keep` the model's own · `msa` softmax attention without spatial reduction · `linear` angular linear · `ecoformer` hashed linear ·
    `performer` linear by random features · `adder` softmax of L1 distances · `sra-linear` a pyramid's keys and values pooled to 7×7."""
    add: Add = "none"
    """Queries and keys of linear attention as floats (`none`), thresholded codes (`quant`) or learned hash codes (`ksh`)."""
    attn_linear: Linear = "mult"
    """The linear layers of attention: multiplications, shifts, a mixture of both (`moe`), adders, or shifts with adders behind them."""
    mlp: Linear = "mult"
    """The linear layers of the MLPs, likewise."""
    rest: Rest = "mult"
    """Every other linear layer and convolution: patch embeddings, spatial reduction, depthwise convolutions, heads. Adders have no
    groups, so a depthwise convolution stays as it is under `adder`, and has no adder behind its shift under `shift-add`."""
    keep_ends: bool = False
    """Leave the convolution that sees the pixels and the classification heads as they are, whatever `rest` says."""
    last_stage_softmax: bool = True
    """Leave the attention of a pyramid's last stage as it is (its linears still follow `attn_linear`)."""
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    """How weights become powers of two."""
    binary: BinaryConfig = field(default_factory=BinaryConfig)
    """How codes are thresholded, for `add = "quant"`."""
    hash: HashConfig = field(default_factory=HashConfig)
    """How codes are learned, for `add = "ksh"` and Ecoformer."""
    angular: AngularConfig = field(default_factory=AngularConfig)
    """The form of linear attention."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """The experts and their gate."""
    adder: AdderConfig = field(default_factory=AdderConfig)
    """How adder layers are normalised and trained."""
    adder_attention: AdderAttentionConfig = field(default_factory=AdderAttentionConfig)
    """The form of `attention = "adder"`."""
    performer: PerformerConfig = field(default_factory=PerformerConfig)
    """The random features of `attention = "performer"`."""
    overrides: tuple[tuple[str, Mapping[str, str]], ...] = ()
    """(glob on module names, {column: value}) pairs; a later one wins. `*` crosses dots: `stages.0.*` is all of stage 0."""
    name: str = ""
    """What tables call it."""
    description: str = ""
    """One sentence for people."""

    def __post_init__(self) -> None:
        for column, allowed in _COLUMNS.items():
            if getattr(self, column) not in allowed:
                raise UserError(f"recipe field {column!r} must be one of {', '.join(allowed)}, got {getattr(self, column)!r}")
        # With overrides the pair may be completed module by module; `at` settles it there.
        if self.add != "none" and self.attention != "linear" and not self.overrides:
            raise UserError(f"recipe field 'add' = {self.add!r} needs attention = 'linear' (or 'ecoformer', which hashes by itself)")
        for pattern, change in self.overrides:
            for column, value in change.items():
                if column not in _COLUMNS:
                    raise unknown(f"recipe field in override {pattern!r}", column, _COLUMNS)
                if value not in _COLUMNS[column]:
                    raise UserError(f"override {pattern!r}: {column} must be one of {', '.join(_COLUMNS[column])}, got {value!r}")

    def at(self, module_name: str) -> "Recipe":
        """This recipe with the overrides that match the module or any module around it. Only linear attention has codes, so `add` is
        `none` where attention is something else."""
        changes = self.overridden(module_name)
        if changes.get("attention", self.attention) != "linear":
            changes["add"] = "none"
        return replace(self, **changes, overrides=())

    def overridden(self, module_name: str) -> dict[str, str]:
        """The columns that overrides set for the module, and their values there."""
        names = _with_ancestors(module_name)
        changes: dict[str, str] = {}
        for pattern, change in self.overrides:
            if any(fnmatchcase(name, pattern) for name in names):
                changes |= change
        return changes

    def unmatched(self, module_names: list[str]) -> list[str]:
        """The override patterns that fit none of the given modules or the modules around them."""
        names = {ancestor for name in module_names for ancestor in _with_ancestors(name)}
        return [pattern for pattern, _ in self.overrides if not any(fnmatchcase(name, pattern) for name in names)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; only what differs from the defaults."""
        found = _differences(self, Recipe())
        if self.overrides:
            found["overrides"] = [{"modules": pattern, **change} for pattern, change in self.overrides]
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "recipe") -> "Recipe":
        """The inverse of `to_dict`. Unknown fields and wrong values raise UserError naming `source`."""
        values = dict(values)
        overrides = []
        given = values.pop("overrides", ())
        if not isinstance(given, list | tuple) or not all(isinstance(entry, Mapping) for entry in given):
            raise UserError(f"{source}: overrides must be a list of tables, got {given!r}")
        for entry in given:
            entry = dict(entry)
            if "modules" not in entry:
                raise UserError(f"{source}: an override needs the field 'modules' (a glob on module names)")
            overrides.append((entry.pop("modules"), entry))
        arguments: dict[str, Any] = {}
        nested = {f.name: f.default_factory for f in fields(cls) if f.default_factory is not dataclasses.MISSING}
        for key, value in values.items():
            if key not in {f.name for f in fields(cls)}:
                raise unknown(f"field of {source}", key, [f.name for f in fields(cls)])
            arguments[key] = _config(nested[key], value, f"{source}: {key}") if key in nested else value
        return cls(**arguments, overrides=tuple(overrides))

    @classmethod
    def from_toml(cls, path: str | Path) -> "Recipe":
        """Read a recipe file; its name is the file's stem unless it says otherwise."""
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"recipe file {str(path)!r} does not exist") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"recipe file {str(path)!r} is not valid TOML: {error}") from None
        return cls.from_dict({"name": path.stem} | values, source=str(path))

    def to_toml(self) -> str:
        """The recipe as a TOML file's text."""
        values = self.to_dict()
        overrides = values.pop("overrides", [])
        lines = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
        for key, table in values.items():
            if isinstance(table, dict):
                lines += ["", f"[{key}]", *(f"{k} = {_toml(v)}" for k, v in table.items())]
        for override in overrides:
            lines += ["", "[[overrides]]", *(f"{k} = {_toml(v)}" for k, v in override.items())]
        return "\n".join(lines) + "\n"


LISTED_BY = "shiftaddvit recipes"
"""The command that lists the shipped recipes."""


class Recipes(Mapping[str, Recipe]):
    """The named recipes that ship with the package, one TOML file each, read when asked for."""

    def __init__(self) -> None:
        self._folder = resources.files("shiftaddvit.reparam") / "recipes"

    def __getitem__(self, name: str) -> Recipe:
        if name not in set(self):
            raise unknown("recipe", name, self, LISTED_BY)
        return Recipe.from_toml(Path(str(self._folder / f"{name}.toml")))

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(Path(entry.name).stem for entry in self._folder.iterdir() if entry.name.endswith(".toml")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


recipes = Recipes()


def as_recipe(recipe: Recipe | str) -> Recipe:
    """A recipe from itself, a shipped name, or the path of a TOML file."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe.endswith(".toml"):
        return Recipe.from_toml(recipe)
    return recipes[recipe]


def _with_ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _differences(config: Any, default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(config):
        value, usual = getattr(config, f.name), getattr(default, f.name)
        if value == usual or f.name == "overrides":
            continue
        found[f.name] = _differences(value, usual) if dataclasses.is_dataclass(value) else value
    return found


def _config(kind: Any, values: Any, source: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"{source} must be a table, got {values!r}")
    known = {f.name for f in fields(kind)}
    for key in values:
        if key not in known:
            raise unknown(f"field of {source}", key, known)
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: {error}") from None


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
