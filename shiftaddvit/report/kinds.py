"""One reader for each kind of result file: it checks every field that the page shows, and what they say of one another."""

import json
import re
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shiftaddvit.intervals import wilson_interval

from .fields import Fields, Unusable
from .networks import ModelRef, image_size, model_ref, recipe_name
from .read_costs import read_energies, read_energy, read_engine, read_ops, read_sweep, read_train_bench
from .read_dispatch import read_dispatch
from .read_experts import read_expert_times
from .read_search import read_search, read_search_latency
from .results import (
    Accuracy,
    Results,
    RunResult,
    SensitivityResult,
    ViewResult,
)
from .sources import Source

_SEED = re.compile(r"-s(\d+)$")
_UNSHARED = ("seed", "log_every", "checkpoint_minutes", "tensorboard", "evaluate_every", "compile", "cuda_graph", "channels_last")
"""Settings of a run that do not make it another experiment."""


def accuracy(values: Fields) -> Accuracy:
    """An evaluation; its numbers must be those of its own bits."""
    images = values.count("images", 1)
    try:
        bits = b64decode(values.text("correct"), validate=True)
    except (NotBase64, ValueError):
        raise Unusable(f"{values.where or 'the evaluation'}: 'correct' is not base64") from None
    if len(bits) != (images + 7) // 8:
        values.fail(f"'correct' holds {len(bits)} bytes, but {images} images need {(images + 7) // 8}")
    right = int.from_bytes(bits) >> (8 * len(bits) - images)
    count = right.bit_count()
    top1, interval = values.number("top1", 0, 100), values.pair("interval95", 0, 100)
    values.agree("top1", top1, 100 * count / images)
    for stated, found in zip(interval, wilson_interval(count, images), strict=True):
        values.agree("interval95", stated, found, 1e-5)
    top5 = values.number("top5", 0, 100)
    if top5 < top1 - 1e-9:
        values.fail(f"top5 {top5:g} is below top1 {top1:g}")
    return Accuracy(top1, top5, interval, images, right, values.text("labels_digest"))


def read_finetune(values: Fields, source: Source, found: Results) -> None:
    """A run with an evaluation; one without has only its curve."""
    if "evaluation" not in values:
        return
    evaluation, path = values.fields("evaluation"), Path(source.path)
    label = path.parent.name if path.name == "result.json" else path.stem
    if "model" not in values:
        values.fail("does not say which model it is of; give the folder it was written in, or add nothing and train again")
    config = {key: value for key, value in values.fields("config").values.items() if key not in _UNSHARED}
    recipe = values.values.get("recipe")
    seed = _SEED.search(label)
    number = values.fields("config").values.get("seed")
    name = label.removesuffix(seed[0]) if seed else label
    model = model_ref(values, _size(evaluation))
    name = name.removeprefix(f"{model.name}-") or name
    data = values.word("data", "data set not recorded")
    found.runs.append(
        RunResult(
            model,
            data,
            recipe_name(recipe),
            _canonical([recipe, config, values.values.get("loading")]),
            name,
            accuracy(evaluation),
            number if isinstance(number, int) else None,
            source,
        )
    )


def read_quickstart(values: Fields, source: Source, found: Results) -> None:
    """All its rows."""
    model = model_ref(values, image_size(values.values.get("image_size"))) if "model" in values else ModelRef("pvt_v2_b0", "quickstart", (32, 32))
    data = values.word("data", "Fashion-MNIST, the embedded part")
    seed, tuning = values.count("seed"), values.values.get("finetune")
    config = {key: value for key, value in tuning.items() if key not in _UNSHARED} if isinstance(tuning, Mapping) else tuning
    variant = _canonical(["quickstart", values.values.get("budget"), config])
    for row in values.each("rows"):
        mults, dense = row.number("multiplications", 0), row.number("dense_multiplications", 1)
        removed = row.number("removed", -100, 1)
        row.agree("removed", removed, 1 - mults / dense)
        share = row.maybe("shift_share", 0, 1)
        found.runs.append(
            RunResult(
                model,
                data,
                row.word("recipe", "dense"),
                variant,
                row.text("name"),
                accuracy(row.fields("evaluation")),
                seed,
                source,
                share,
                removed,
                row.count("bytes", 1),
            )
        )


def read_evaluate(values: Fields, source: Source, found: Results) -> None:
    """One model, or two."""
    both = [values, values.fields("against")] if "against" in values else [values]
    for one in both:
        file = one.text("file")
        model = model_ref(one, _size(one)) if "model" in one else ModelRef(Path(file).stem, "", _size(one))
        recipe = recipe_name(one.values.get("recipe")) if "model" in one else Path(file).stem
        data = f"{values.word('data', 'data set not recorded')}, {values.word('split', '')}".rstrip(", ")
        found.runs.append(RunResult(model, data, recipe, file, file, accuracy(one), None, source))


def read_sensitivity(values: Fields, source: Source, found: Results) -> None:
    """Every change at every place."""
    dense = accuracy(values.fields("dense"))
    model = values.values.get("model")
    name = model if isinstance(model, str) else values.fields("model").text("name") if "model" in values else ""
    rows = []
    for row in values.each("rows"):
        low, high = row.pair("interval95")
        top1, difference = row.number("top1", 0, 100), row.number("difference", -100, 100)
        row.agree("difference", difference, top1 - dense.top1, 1e-5)
        if not low <= difference <= high:
            row.fail("the difference lies outside its own interval")
        rows.append(SensitivityResult(name, row.text("where"), row.text("primitive"), top1, difference, (low, high), source))
    found.sensitivities += rows


def read_view_scores(values: Fields, source: Source, found: Results) -> None:
    """Quality on a scene's held-out views."""
    views = list(values.each("views"))
    if not views:
        values.fail("has no views")
    psnr, ssim = values.number("psnr", 0, 200), values.number("ssim", -1, 1)
    values.agree("psnr", psnr, sum(view.number("psnr", 0, 200) for view in views) / len(views))
    values.agree("ssim", ssim, sum(view.number("ssim", -1, 1) for view in views) / len(views))
    lpips = values.maybe("lpips", 0, 10)
    if lpips is not None:
        values.agree("lpips", lpips, sum(view.number("lpips", 0, 10) for view in views) / len(views))
    scene = f"{values.text('scene')}, {values.count('width', 1)}×{values.count('height', 1)}"
    row = values.word("row") or _row_of_file(values.word("model", Path(source.path).stem))
    found.views.append(ViewResult(row, scene, psnr, ssim, lpips, values.maybe("seconds_per_image", 0), None, source))


def read_view_times(values: Fields, source: Source, found: Results) -> None:
    """Seconds and modelled joules an image."""
    scene = f"{values.text('scene')}, {values.count('width', 1)}×{values.count('height', 1)}"
    rows = [
        ViewResult(row.text("row"), scene, None, None, None, row.number("seconds", 0), row.maybe("joules", 0), source) for row in values.each("rows")
    ]
    found.views += rows


def read_view_training(values: Fields, source: Source, found: Results) -> None:
    """Its curve is in the log beside it; there is no cell of its own."""
    values.count("steps")


def _row_of_file(model: str) -> str:
    """A run's folder names the row of the model in it."""
    path = Path(model)
    return path.parent.name if path.name == "model.safetensors" and path.parent.name else path.stem


def _size(evaluation: Fields) -> tuple[int, int] | None:
    conditions = evaluation.values.get("conditions")
    return image_size(conditions.get("image_size")) if isinstance(conditions, Mapping) else None


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


READERS: Mapping[str, Callable[[Fields, Source, Results], None]] = {
    "dispatch": read_dispatch,
    "energy": read_energy,
    "energy-compare": read_energies,
    "energy-sweep": read_sweep,
    "engine-bench": read_engine,
    "evaluate": read_evaluate,
    "expert-latency": read_expert_times,
    "finetune": read_finetune,
    "nvs-bench": read_view_times,
    "nvs-evaluate": read_view_scores,
    "nvs-train": read_view_training,
    "ops-bench": read_ops,
    "quickstart": read_quickstart,
    "search": read_search,
    "search-latency": read_search_latency,
    "sensitivity": read_sensitivity,
    "train-bench": read_train_bench,
}
"""By kind; as many as there are kinds."""
