"""The card beside a saved model: what hubs want to know (front matter) and what a person does. A card that somebody changed is never replaced."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from shiftaddvit.files import atomic_write
from shiftaddvit.layers.moe import MoELinear, MoEMlp

FACTS = "shiftaddvit.facts"
"""The key of the facts among the strings of a model's file."""
_MARK = re.compile(r"\n<!-- card by shiftaddvit, sha256 ([0-9a-f]{64}); change the card and it is never replaced -->\n\Z")


@dataclass(frozen=True)
class ModelFacts:
    """What only the maker of a model knows; all of it optional. Travels in the model's file."""

    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """top1, top5, interval95, images, conditions, as an `Evaluation` says them; empty when it was not measured."""
    data: str = ""
    """What it was trained and evaluated on."""
    training: str = ""
    """How it was trained, in a line."""
    base: str = ""
    """Where its weights come from, in words."""
    base_model: str = ""
    """The same as a name on a model hub."""
    license: str = ""
    """SPDX identifier of the base weights' licence, in small letters."""
    energy: Mapping[str, Any] = field(default_factory=dict)
    """total_mj and settings of a modelled energy; empty when it was not computed."""

    def to_metadata(self) -> dict[str, str]:
        """As a string of the model's file; none when nothing is known."""
        known = {key: value for key, value in asdict(self).items() if value}
        return {FACTS: json.dumps(known, allow_nan=False)} if known else {}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "ModelFacts":
        """The inverse; fields of later versions are left out."""
        values = json.loads(metadata.get(FACTS, "{}"))
        return cls(**{entry.name: values[entry.name] for entry in fields(cls) if entry.name in values})

    @classmethod
    def of_evaluation(cls, evaluation: Mapping[str, Any] | None, **more: Any) -> "ModelFacts":
        """From an `Evaluation`'s JSON values (or None)."""
        kept = ("top1", "top5", "loss", "interval95", "images", "conditions")
        return cls(evaluation={key: evaluation[key] for key in kept} if evaluation else {}, **more)


def card_path(model: Path) -> Path | None:
    """Where the card of a model's file goes: `README.md` beside `model.safetensors`, else `NAME.md`; where that is not an untouched card of
    ours, `NAME.card.md`; None where that is not one either."""
    first = model.with_name("README.md") if model.name == "model.safetensors" else model.with_suffix(".md")
    for path in (first, model.with_suffix(".card.md")):
        if not path.exists() or is_untouched(path.read_text(encoding="utf-8", errors="replace")):
            return path
    return None


def is_untouched(text: str) -> bool:
    """Whether a text is a card of ours that nobody changed."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def write_card(path: Path, model: nn.Module, header: Mapping[str, Any], sizes: tuple[int, int], facts: ModelFacts) -> Path | None:
    """Write the card of the file `path`, which holds `model` and is described by its `header`; `sizes` are its bytes and those of the
    dense float32 weights. Returns where it went; None where the user's own files are in the way."""
    return put_card(path, _front_matter(header, facts) + _body(path, model, header, sizes, facts))


def put_card(path: Path, text: str) -> Path | None:
    """Write `text` as the card of the model's file `path`, marked as ours. Returns where it went; None where the user's own files are in
    the way."""
    target = card_path(path)
    if target is not None:
        mark = f"\n<!-- card by shiftaddvit, sha256 {_digest(text)}; change the card and it is never replaced -->\n"
        with atomic_write(target) as temporary:
            temporary.write_text(text + mark, encoding="utf-8")
    return target


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def front_matter(values: Mapping[str, Any]) -> str:
    """What hubs read, as YAML; every value is written as JSON, which is YAML too."""
    return "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()) + "---\n\n"


def _front_matter(header: Mapping[str, Any], facts: ModelFacts) -> str:
    architecture = header["architecture"]["name"]
    _, recipe = recipe_names(header["recipe"])
    tags = ["shiftaddvit", "vision", "image-classification", architecture] + ([] if header["recipe"] is None else ["shift-add", recipe])
    values: dict[str, Any] = {"library_name": "shiftaddvit", "pipeline_tag": "image-classification", "tags": tags}
    values |= {"license": facts.license} if facts.license else {"license": "other", "license_name": "of-the-base-weights"}
    if facts.base_model:
        values["base_model"] = facts.base_model
    if facts.data:
        values["datasets"] = [slug(facts.data)]
    values["metrics"] = ["accuracy"]
    if facts.evaluation and facts.data:
        metric = {"type": "accuracy", "name": "top-1 accuracy, %", "value": round(facts.evaluation["top1"], 2), "verified": False}
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": facts.data, "type": slug(facts.data)},
            "metrics": [metric],
        }
        values["model-index"] = [{"name": f"{architecture} {recipe}", "results": [result]}]
    return front_matter(values)


def _body(path: Path, model: nn.Module, header: Mapping[str, Any], sizes: tuple[int, int], facts: ModelFacts) -> str:
    architecture, recipe = header["architecture"], header["recipe"]
    name, _ = recipe_names(recipe)
    lines = [f"# {architecture['name']}, {plain(name)}", ""]
    if recipe is None:
        lines += ["A dense vision transformer, saved by shiftaddvit.", ""]
    else:
        lines += ["A vision transformer that shifts and adds where its dense form multiplies (ShiftAddViT, NeurIPS 2023), made by shiftaddvit.", ""]
        if recipe.get("description"):
            lines += [plain(recipe["description"]), ""]
    lines += [
        "## Use",
        "",
        "```python",
        "import shiftaddvit as sav",
        f"model = sav.load({path.name!r})  # evaluation mode",
        "logits = model(images)  # (B, 3, H, W) to (B, classes)",
        "```",
        "",
    ]
    lines += ["## What it is", "", "| | |", "|---|---|", f"| architecture | `{architecture['name']}` {plain(_arguments(architecture['args']))}|"]
    lines += recipe_rows(model, recipe)
    lines += [f"| file | {sizes[0]:,} bytes, {sizes[0] / sizes[1]:.3f}× the dense float32 weights; {form(header['packed'])} |"]
    lines += [f"| base weights | {plain(facts.base) or 'not recorded'} |", f"| training | {plain(facts.training) or 'not recorded'} |", ""]
    lines += ["## Accuracy", "", _accuracy(facts), "", "## Energy", "", _energy(facts), ""]
    if not facts.license:
        lines += ["## Licence", "", "Not recorded here: that of the base weights and of the data holds.", ""]
    return "\n".join(lines)


def recipe_names(recipe: Mapping[str, Any] | None) -> tuple[str, str]:
    """What a card calls a recipe: in a sentence, and as a tag."""
    name = "dense" if recipe is None else recipe.get("name")
    return name or "a recipe of its own", name or "custom"


def recipe_rows(model: nn.Module, recipe: Mapping[str, Any] | None) -> list[str]:
    """The rows of a card's table that say what was converted; none for a dense model."""
    if recipe is None:
        return []
    columns = [f"{key} = {recipe[key]}" for key in ("attention", "add", "attn_linear", "mlp") if key in recipe]
    by_layer = "; differs by layer" if recipe.get("overrides") else ""
    return [
        f"| recipe | {plain(recipe_names(recipe)[0])}: {plain(', '.join(columns)) or 'as the dense model'}{by_layer} |",
        f"| converted | {converted(model)} |",
    ]


def form(packed: bool) -> str:
    """In which of a layer's lives a file holds its model."""
    return "packed: shift weights as integer codes, no further training" if packed else "latent: can be trained on"


def converted(model: nn.Module) -> str:
    """What the layers of a model compute with, counted; parts of a mixture count as the mixture."""
    words = {"shift": "shift layer", "adder": "adder layer", "add": "addition over binary codes"}
    kinds = ("mixture of experts", *words.values(), "linear layer left multiplying")
    counts: Counter[str] = Counter()
    mixtures: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in mixtures):
            continue
        if isinstance(module, (MoELinear, MoEMlp)):
            mixtures.append(name)
            counts[kinds[0]] += 1
        elif (primitive := getattr(module, "primitive", None)) in words:
            counts[words[primitive]] += 1
        elif isinstance(module, nn.Linear):
            counts[kinds[-1]] += 1
    return ", ".join(f"{counts[kind]} × {kind}" for kind in kinds if counts[kind]) or "nothing"


def _accuracy(facts: ModelFacts) -> str:
    found = facts.evaluation
    if not found:
        return "Not measured."
    low, high = found["interval95"]
    where = found["conditions"]
    precise = f"{where.get('dtype', '?')}{' autocast' if where.get('autocast') else ''}, batch {where.get('batch', '?')}"
    return (
        f"Measured: top-1 **{found['top1']:.2f} %** (95 % interval {low:.2f} … {high:.2f}), top-5 {found['top5']:.2f} %, "
        f"on {found['images']:,} images{' of ' + plain(facts.data) if facts.data else ''}; {plain(precise)} on {plain(where.get('device', '?'))}, "
        f"torch {plain(where.get('torch', '?'))}, {plain(where.get('time', '?'))}."
    )


def _energy(facts: ModelFacts) -> str:
    if not facts.energy:
        return "Not computed; `shiftaddvit energy FILE` does it."
    settings = facts.energy["settings"]
    share = (
        ""
        if settings.get("shift_share") is None
        else f"; {100 * settings['shift_share']:.0f} % of the tokens on shift ({plain(settings['shift_share_source'])})"
    )
    size = "×".join(map(str, settings.get("image_size") or ["?"]))
    return (
        f"Modelled, not measured: **{facts.energy['total_mj']:.4g} mJ** for one image of {size}, "
        f"analytical Eyeriss model, mode `{plain(settings['mode'])}`{share}."
    )


def _arguments(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in args.items()) + " " if args else ""


def slug(text: str) -> str:
    """A name as hubs write them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "unknown"


def plain(value: Any) -> str:
    """A text that stays one cell of a Markdown table and is no HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
