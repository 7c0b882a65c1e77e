"""The card beside a saved view model, and the facts in its file that the card says."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from shiftaddvit.model_card import form, front_matter, plain, put_card, recipe_names, recipe_rows, slug

NETWORKS = {"gnt": "A transformer over source views and along rays (GNT)", "nerf": "A radiance field (NeRF)"}


@dataclass(frozen=True)
class ViewFacts:
    """What a view model was trained on, for how long, and how well it draws what it did not see; all of it optional. Travels in its file."""

    scenes: tuple[str, ...] = ()
    """Their names; sizes and held-out views below are the first one's."""
    width: int | None = None
    """Of the pictures, in pixels."""
    height: int | None = None
    """Of the pictures, in pixels."""
    views: int = 0
    """Training views of all scenes together."""
    steps: int = 0
    """Optimisation steps."""
    seconds: float = 0.0
    """Spent in them."""
    rays: int = 0
    """Pixels a step."""
    psnr: float | None = None
    """dB on fixed pixels of the held-out views, mean over the views; None where these very weights were not measured."""
    held_out_views: int = 0
    """That `psnr` is a mean of."""
    held_out_pixels: int = 0
    """Of those views together that `psnr` looks at."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """device, precision, torch and time of measuring `psnr`."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of what is known."""
        return {key: value for key, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ViewFacts":
        """The inverse; fields of later versions are left out."""
        known = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        return cls(**known | {"scenes": tuple(known.get("scenes", ()))})


def write_view_card(path: Path, model: nn.Module, header: Mapping[str, Any], facts: ViewFacts) -> Path | None:
    """Write the card of the file `path`, which holds `model` and is described by its `header`. Returns where it went; None where the user's
    own files are in the way."""
    return put_card(path, _front_matter(header, facts) + _body(path, model, header, facts))


def _front_matter(header: Mapping[str, Any], facts: ViewFacts) -> str:
    kind, (_, recipe) = header["kind"], recipe_names(header["recipe"])
    tags = ["shiftaddvit", "vision", "novel-view-synthesis", kind] + ([] if header["recipe"] is None else ["shift-add", recipe])
    values: dict[str, Any] = {"library_name": "shiftaddvit", "tags": tags, "license": "other", "license_name": "not-recorded"}
    if facts.scenes:
        values["datasets"] = [slug(name) for name in facts.scenes]
    values["metrics"] = ["psnr"]
    if facts.psnr is not None and facts.scenes:
        metric = {"type": "psnr", "name": "PSNR of held-out pixels, dB", "value": round(facts.psnr, 2), "verified": False}
        dataset = {"name": facts.scenes[0], "type": slug(facts.scenes[0])}
        result = {"task": {"type": "novel-view-synthesis"}, "dataset": dataset, "metrics": [metric]}
        values["model-index"] = [{"name": f"{kind} {recipe}", "results": [result]}]
    return front_matter(values)


def _body(path: Path, model: nn.Module, header: Mapping[str, Any], facts: ViewFacts) -> str:
    kind, recipe = header["kind"], header["recipe"]
    does = ", saved by" if recipe is None else " that shifts and adds where its dense form multiplies (ShiftAddViT, NeurIPS 2023), made by"
    width = f", width={facts.width}" if facts.width else ""
    lines = [f"# {kind}, {plain(recipe_names(recipe)[0])}", "", f"{NETWORKS[kind]}{does} shiftaddvit.", ""]
    if recipe is not None and recipe.get("description"):
        lines += [plain(recipe["description"]), ""]
    lines += [
        "## Use",
        "",
        "```python",
        "from shiftaddvit.nvs.load import load_scene",
        "from shiftaddvit.nvs.render import make_renderer",
        "from shiftaddvit.nvs.state import load_model",
        f"scene = load_scene(folder{width})  # photos with cameras: `shiftaddvit nvs prepare` finds them",
        f"renderer = make_renderer(load_model({path.name!r}), scene)",
        "picture = renderer.render(scene.camera(0))  # rgb (H, W, 3) from 0 to 1, and depth (H, W)",
        "```",
        "",
        "## What it is",
        "",
        "| | |",
        "|---|---|",
        f"| network | `{kind}` {plain(', '.join(f'{key}={value}' for key, value in header['config'].items()))} |",
        *recipe_rows(model, recipe),
        f"| file | {path.stat().st_size:,} bytes; {form(header['packed'])} |",
        f"| scenes | {plain(', '.join(facts.scenes)) or 'not recorded'} |",
        f"| training | {_training(facts)} |",
        "",
        "## Quality",
        "",
        _quality(facts),
        "",
        "## Licence",
        "",
        "Not recorded here: that of the pictures, and of the weights it started from, holds.",
        "",
    ]
    return "\n".join(lines)


def _training(facts: ViewFacts) -> str:
    if not facts.rays:
        return "not recorded"
    return f"{facts.steps:,} steps of {facts.rays:,} rays in {facts.seconds:,.0f} s, on {facts.views} views of {facts.width}×{facts.height} pixels"


def _quality(facts: ViewFacts) -> str:
    if facts.psnr is None:
        return "Not measured; `shiftaddvit nvs evaluate SCENE FILE` does it on a scene's held-out views."
    where = facts.conditions
    return (
        f"Measured: PSNR **{facts.psnr:.2f} dB**, mean over {facts.held_out_views} held-out view{'s' * (facts.held_out_views != 1)} of "
        f"{plain(facts.scenes[0] if facts.scenes else 'a scene')} at {facts.width}×{facts.height}, on {facts.held_out_pixels:,} fixed pixels of them; "
        f"{plain(where.get('precision', '?'))} on {plain(where.get('device', '?'))}, torch {plain(where.get('torch', '?'))}, "
        f"{plain(where.get('time', '?'))}. `shiftaddvit nvs evaluate SCENE FILE` scores whole views."
    )
