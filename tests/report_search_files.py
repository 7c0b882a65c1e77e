"""A search's files as their writers write them, with numbers that add up, made in no time."""

from pathlib import Path
from typing import Any

import report_files as files

from shiftaddvit.schema import stamped
from shiftaddvit.search_terms import change_of

SITES = ("stages.0.blocks.0.attn", "stages.0.blocks.0.mlp", "stages.1.blocks.0.attn", "stages.1.blocks.0.mlp")
ENERGY = {"dense": 2.0, "attn-shift": 1.25, "add": 1.75, "add+attn-moe": 1.25, "mlp-shift": 1.0, "mlp-moe": 1.5}
"""mJ of an option, at any layer."""
HARM = {"dense": 0.0, "attn-shift": 0.25, "add": 1.0, "add+attn-moe": 1.25, "mlp-shift": 0.5, "mlp-moe": 0.125}
"""KL divergence; the accuracy loses as many points, the loss rises by half."""
REST = 2.0
OPTIONS = {True: ("dense", "attn-shift", "add", "add+attn-moe"), False: ("dense", "mlp-shift", "mlp-moe")}
"""Of an attention, and of an MLP."""


def here(option: str) -> dict[str, float]:
    """Every quantity of one layer."""
    return {"kl": HARM[option], "loss": HARM[option] / 2, "drop": HARM[option], "energy": ENERGY[option]}


def point(choice: dict[str, str]) -> dict[str, Any]:
    """A choice with its totals."""
    layers = [here(choice.get(site, "dense")) for site in SITES]
    totals = {quantity: sum(layer[quantity] for layer in layers) + (REST if quantity == "energy" else 0.0) for quantity in layers[0]}
    return {"totals": totals, "choice": choice}


FOUND = {"stages.0.blocks.0.attn": "attn-shift", "stages.0.blocks.0.mlp": "mlp-moe", "stages.1.blocks.0.mlp": "mlp-shift"}
FRONT = (
    {"stages.0.blocks.0.mlp": "mlp-moe"},
    {"stages.0.blocks.0.mlp": "mlp-moe", "stages.1.blocks.0.mlp": "mlp-moe"},
    FOUND,
    {"stages.0.blocks.0.attn": "attn-shift", "stages.0.blocks.0.mlp": "mlp-shift", "stages.1.blocks.0.mlp": "mlp-shift"},
)
ROWS = {
    "mlp-shift": dict.fromkeys(SITES[1::2], "mlp-shift"),
    "ours-quant-moe": dict.fromkeys(SITES[::2], "add+attn-moe") | dict.fromkeys(SITES[1::2], "mlp-moe"),
}


def search(**changes: Any) -> dict[str, Any]:
    """`search.json`, stamped after the changes: found costs 7.75 mJ of 10, harms by 0.875 predicted and 1.5 measured."""
    overrides = [{"modules": site, **change_of(option)} for site, option in FOUND.items()]
    values = {
        "model": {"name": "pvt_v2_b0", "args": {"num_classes": 10}}, "file": None, "data": "some images", "split": "train", "images": 100,
        "seed": 0,
        "identity": {"sites": [f"{site} (fc1 8→32, fc2 32→8)" for site in SITES], "weights": "0123456789abcdef"}, "budgets": ["energy ≤ 0.8 of dense"],
        "met": True, "minimised": "kl", "damage": "kl", "cost": "energy",
        "units": {"energy": "mJ", "latency": "µs", "kl": "nats", "loss": "nats", "drop": "points"}, "found": point(FOUND),
        "sites": [{"name": s, "becomes": FOUND.get(s, "dense"), "here": here(FOUND.get(s, "dense")), "dense": {"energy": ENERGY["dense"]}} for s in SITES],
        "rest": {"energy": REST},
        "together": {"top1": 87.5, "drop": 1.5, "interval95": [0.5, 2.5], "loss": 0.25, "kl": 0.75}, "dense": point({}),
        "front": [point(choice) for choice in FRONT], "rows": {name: point(choice) for name, choice in ROWS.items()}, "left_out": {},
        "recipe": {"name": "searched", "overrides": overrides},
        "tables": {"energy": {"image_size": [64, 64]}, "sensitivity": {"images": 100, "top1": 89.0}},
        "seconds": 0.1, "conditions": files.CONDITIONS,
    }  # fmt: skip
    return stamped("search", values | changes) | {"data": changes.get("data", "some images")}


def search_latency(**changes: Any) -> dict[str, Any]:
    """`latency.json` of a search's folder."""
    costs = {site: {option: 10.0 * ENERGY[option] for option in OPTIONS[site.endswith("attn")]} for site in SITES}
    values = {
        "quantity": "latency", "unit": "µs", "identity": {"sites": list(SITES), "weights": "0123456789abcdef"}, "settings": {},
        "conditions": files.CONDITIONS, "rest": 7.5, "costs": costs,
    }  # fmt: skip
    return stamped("search-latency", values | changes)


def expert_row(**changes: Any) -> dict[str, Any]:
    """One layer's times: 200 µs for multiplications, 50 µs for shifts."""
    row = {
        "device": "a test, 1 thread", "layer": "linear", "shape": [64, 256], "experts": ["mult", "shift"], "tokens": 3136, "dtype": "float32",
        "seconds": [2e-4, 5e-5], "conditions": files.CONDITIONS, "mixtures": ["stages.0.blocks.0.mlp.fc1"],
    }  # fmt: skip
    return row | changes


def expert_latency(*rows: dict[str, Any]) -> dict[str, Any]:
    """`latency.json` of a run's folder."""
    return stamped("expert-latency", {"rows": list(rows or (expert_row(), expert_row(layer="mlp", shape=[64, 256, 64])))})


def everything(folder: Path) -> Path:
    """A file of every kind, two searches, and a file that cannot be read."""
    files.more(files.results(folder))
    for name, values in (("search/search", search()), ("search/latency", search_latency()), ("run/latency", expert_latency())):
        files.put(folder, f"{name}.json", values)
    files.put(folder, "unmet/search.json", search(budgets=["energy ≤ 1 mJ"], met=False))
    (folder / "half.json").write_text('{"shiftaddvit"')
    return folder


OLD_KEY = "cpu x2 | linear 64->256 mult/shift | tokens 3136 | torch.float32"
"""How a row was known before there were stamps."""
