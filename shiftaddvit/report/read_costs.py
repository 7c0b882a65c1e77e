"""Readers of energies and of times."""

import json
from collections.abc import Mapping
from typing import Any

from .fields import Fields
from .networks import ModelRef, image_size, model_ref
from .results import EnergyResult, LayerEnergy, OpResult, Results, SpeedResult
from .sources import Source

LEVELS = ("dram", "buffer", "noc", "rf", "compute")


def read_energy(values: Fields, source: Source, found: Results) -> None:
    """One model's."""
    found.energies.append(_energy(values, values, source, None))


def read_energies(values: Fields, source: Source, found: Results) -> None:
    """One model's under several recipes."""
    recipes = values.fields("recipes")
    found.energies += [_energy(recipes.fields(name), values, source, name) for name in recipes.values]


def read_sweep(values: Fields, source: Source, found: Results) -> None:
    """A curve over a setting is a figure of its own (`energy --sweep --figure`); the page has no cell for it."""
    if len(values.numbers("values")) != len(values.numbers("total_mj", 0)):
        values.fail("'values' and 'total_mj' differ in length")


def _energy(values: Fields, whole: Fields, source: Source, recipe: str | None) -> EnergyResult:
    """An energy is the sum of its layers, a layer that of its levels."""
    settings, scale = values.fields("settings"), values.maybe("scale", 0) or 1.0
    layers, total = [], 0.0
    for layer in values.each("per_layer"):
        levels = layer.by_name("levels", 0)
        if not set(levels) <= set(LEVELS):
            layer.fail(f"unknown level {sorted(set(levels) - set(LEVELS))[0]!r}")
        pj = layer.number("total_pj", 0)
        layer.agree("total_pj", pj, sum(levels.values()))
        total += pj
        in_mj = {level: levels.get(level, 0.0) * scale * 1e-9 for level in LEVELS}
        layers.append(LayerEnergy(layer.text("name"), layer.text("kind"), layer.text("primitive"), in_mj))
    stated = values.number("total_mj", 0)
    values.agree("total_mj", stated, total * scale * 1e-9)
    model, name = _subject(values, whole, image_size(settings.values.get("image_size")), recipe)
    shares = tuple((entry.text("mixture"), _shift_share(entry)) for entry in values.each("tokens")) if "tokens" in values else ()
    described = settings.word("shift_share_source")
    kept = {key: value for key, value in settings.values.items() if key not in ("shift_share", "shift_share_source")}
    if isinstance(kept.get("bits"), Mapping):
        # A network without shifts has no word for their bits.
        kept["bits"] = {key: value for key, value in kept["bits"].items() if key != "shift_weight"}
    return EnergyResult(
        model, name, settings.text("mode"), json.dumps(kept, sort_keys=True), stated, settings.count("batch", 1) if "batch" in settings else 1,
        tuple(layers), shares if described.startswith("measured") else (), settings.maybe("shift_share", 0, 1), described, source,
    )  # fmt: skip


def _subject(values: Fields, whole: Fields, size: tuple[int, int] | None, recipe: str | None) -> tuple[ModelRef, str]:
    if "subject" not in whole:
        name, _, applied = values.text("model").rpartition(", ")
        return ModelRef(name or applied, "", size), recipe or applied
    subject = whole.fields("subject")
    return model_ref(subject, size), recipe or subject.text("recipe")


def _shift_share(entry: Fields) -> float:
    shares, kinds = entry.numbers("shares", 0, 1 + 1e-9), entry.list("primitives")
    if len(shares) != len(kinds):
        entry.fail("'shares' and 'primitives' differ in length")
    entry.agree("shares", sum(shares), 1.0)
    return sum(share for share, kind in zip(shares, kinds, strict=True) if kind == "shift")


def read_engine(values: Fields, source: Source, found: Results) -> None:
    """Whole models. A recipe's latency is its engine's in half precision, in float32 where the file has no other."""
    rows, listed = [], list(values.each("rows"))
    halves = {tuple(words[:2]) for row in listed if len(words := row.text("contender").split()) == 3}
    for row in listed:
        contender = row.text("contender")
        words = contender.split()
        recipe = words[1] if words[0] == "engine" and (len(words) == 3 or tuple(words) not in halves) else None
        rows.append(_speed(row, contender, recipe, image_size(row.values.get("image_size")) or (224, 224), source))
    found.speeds += rows


def read_train_bench(values: Fields, source: Source, found: Results) -> None:
    """Steps of training: rows of the table of speeds, never a latency."""
    size = image_size(values.fields("conditions").values.get("image_size"))
    found.speeds += [_speed(row, f"training step, {row.text('recipe')}, {row.text('mode')}", None, size, source) for row in values.each("rows")]


def _speed(row: Fields, contender: str, recipe: str | None, size: tuple[int, int] | None, source: Source) -> SpeedResult:
    """A time lies between its own percentiles, and gives the images a second."""
    status, batch = row.text("status"), row.count("batch", 1)
    times: dict[str, Any] = {"median_us": None, "low_us": None, "high_us": None}
    if status == "measured":
        times = {key: row.number(key, 0) for key in times}
        if not 0 < times["low_us"] <= times["median_us"] <= times["high_us"]:
            row.fail("the median time lies outside its own percentiles")
        row.agree("images_per_s", row.number("images_per_s", 0), batch / times["median_us"] * 1e6)
    return SpeedResult(ModelRef(row.text("model"), "", size), contender, recipe, batch, status, source=source, **times)


def read_ops(values: Fields, source: Source, found: Results) -> None:
    """Single ops."""
    rows = []
    for row in values.each("rows"):
        median, floor = row.maybe("median_us", 0), row.number("floor_us", 0)
        share = row.maybe("share_of_floor", 0)
        if median is not None and share is not None:
            row.agree("share_of_floor", share, floor / median if median else 0.0)
        rows.append(OpResult(row.text("op"), row.text("shape"), row.text("contender"), median, share, source))
    found.ops += rows
