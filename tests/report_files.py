"""Result files as their writers write them, made in no time: what the report's tests read."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np

from shiftaddvit.intervals import wilson_interval
from shiftaddvit.schema import stamped

CONDITIONS = {"device": "a test", "torch": "2.11.0", "time": "2026-11-01T10:00:00+00:00", "dtype": "float32", "batch": 100, "image_size": [64, 64]}
PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAGUlEQVR4nGPQLDyHFTHgkmDQLDyHFTEMUgkAe4FXIWJLnIkAAAAASUVORK5CYII="


def evaluation(right: int, images: int = 200, seed: int = 0) -> dict[str, Any]:
    """`right` of `images`, the wrong ones drawn at random."""
    bits = np.zeros(images, dtype=bool)
    bits[np.random.default_rng(seed).permutation(images)[:right]] = True
    return {
        "top1": 100 * right / images, "top5": 99.5, "loss": 0.5, "images": images, "unreadable": 0, "images_per_second": 100.0,
        "interval95": list(wilson_interval(right, images)), "labels_digest": "abc", "conditions": CONDITIONS, "correct": b64encode(np.packbits(bits).tobytes()).decode(),
    }  # fmt: skip


def finetune(right: int, recipe: dict[str, Any] | None, seed: int = 0, data: str = "Tiny-ImageNet-200", **more: Any) -> dict[str, Any]:
    values = {
        "model": {"name": "pvt_v2_b0", "args": {"num_classes": 200}}, "recipe": recipe, "evaluation": evaluation(right, seed=seed), "history": [], "stages": [],
        "config": {"seed": seed, "optimizer": "adamw"}, "conditions": CONDITIONS,
    }  # fmt: skip
    return stamped("finetune", values | more) | {"data": data}


def energy(recipe: str, layers: int = 3, size: int = 64, **more: Any) -> dict[str, Any]:
    levels = {"dram": 4e6, "buffer": 1e6, "noc": 1e6, "rf": 2e6, "compute": 1e6}
    rows = [
        {"name": f"stages.0.blocks.{i}.attn.qkv", "kind": "linear", "primitive": "shift", "levels": levels, "total_pj": 9e6} for i in range(layers)
    ]
    values = {
        "subject": {"model": {"name": "pvt_v2_b0", "args": {}}, "recipe": recipe}, "model": f"pvt_v2_b0, {recipe}", "total_mj": layers * 9e6 * 1e-9, "scale": 1.0,
        "per_layer": rows, "tokens": [], "settings": {"mode": "eyeriss", "batch": 1, "image_size": [size, size], "shift_share": None, "shift_share_source": "no mixtures"},
        "conditions": CONDITIONS,
    }  # fmt: skip
    return stamped("energy", values | more)


def dispatch(recipe: str = "ours-quant-moe", **more: Any) -> dict[str, Any]:
    layers = [
        {"name": "stages.0.blocks.0.mlp.fc1", "experts": ["mult", "shift"], "tokens": 16, "grid": [4, 4], "prefix": 0, "share": [0.25, 0.75]},
        {"name": "stages.1.blocks.0.attn.qkv", "experts": ["mult", "shift"], "tokens": 5, "grid": [2, 2], "prefix": 1, "share": [0.4, 0.6]},
    ]
    experts = {"stages.0.blocks.0.mlp.fc1": "0110000011111111", "stages.1.blocks.0.attn.qkv": "10110"}
    pictures = [
        {"name": f"{n}.png", "image": PNG, "width": 8, "height": 8, "label": n, "predicted": "cat", "experts": experts} for n in ("cat", "dog")
    ]
    values = {
        "model": {"name": "pvt_v2_b0", "args": {}},
        "recipe": {"name": recipe},
        "file": None,
        "images": 10,
        "layers": layers,
        "pictures": pictures,
        "conditions": CONDITIONS,
    }
    return stamped("dispatch", values | more)


def engine(image_size: int = 224) -> dict[str, Any]:
    rows = [
        {
            "model": "pvt_v2_b0",
            "batch": 1,
            "contender": "engine ours-quant-moe bfloat16",
            "status": "measured",
            "median_us": 500.0,
            "low_us": 490.0,
            "high_us": 520.0,
            "images_per_s": 2000.0,
        },
        {"model": "pvt_v2_b0", "batch": 32, "contender": "timm float16 eager", "status": "wrong", "error": 1.0},
    ]
    return stamped("engine-bench", {"conditions": CONDITIONS, "rows": rows})


def view(row: str, psnr: float = 27.0, **more: Any) -> dict[str, Any]:
    views = [{"name": str(i), "psnr": psnr, "ssim": 0.9, "lpips": None, "seconds": 1.0} for i in range(2)]
    values = {
        "row": row,
        "scene": "fern",
        "width": 504,
        "height": 378,
        "psnr": psnr,
        "ssim": 0.9,
        "lpips": None,
        "seconds_per_image": 1.0,
        "views": views,
        "conditions": CONDITIONS,
    }
    return stamped("nvs-evaluate", values | more)


def put(folder: Path, name: str, values: dict[str, Any]) -> Path:
    """Write a file as `write_json` does."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1))
    return path


def log(folder: Path, name: str, finished: bool = True) -> Path:
    """A run's log, and its result if it finished."""
    events = [
        {"time": 1, "event": "step", "stage": stage, "epoch": epoch, "step": step, "loss": 2.0 - 0.1 * stage, "lr": 1e-3}
        for stage in (0, 1)
        for epoch in (0, 1)
        for step in (5, 10)
    ]
    path = folder / name / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "st')
    if finished:
        put(folder / name, "result.json", finetune(150, {"name": name}))
    return path


def results(folder: Path) -> Path:
    """One of everything."""
    put(folder, "pvt_v2_b0-dense-s0.json", finetune(160, None))
    for seed in (0, 1):
        put(folder, f"pvt_v2_b0-ours-quant-moe-s{seed}.json", finetune(150 + 4 * seed, {"name": "ours-quant-moe"}, seed))
    put(folder, "energy/dense.json", energy("dense", 4))
    put(folder, "energy/moe.json", energy("ours-quant-moe", 3))
    put(folder, "engine.json", engine())
    put(folder, "dispatch.json", dispatch())
    put(folder, "fern.json", view("gnt-shift"))
    log(folder, "ours-quant-linear")
    return folder


def sensitivity() -> dict[str, Any]:
    """One row a layer, more rows than a table shows without scrolling."""
    rows = [
        {
            "where": f"stages.{i}.blocks.0.attn",
            "primitive": "add",
            "top1": 75.0 - i / 4,
            "difference": -i / 4,
            "interval95": [-i - 1.0, 1.0],
            "kl": 0.1,
        }
        for i in range(30)
    ]
    return stamped("sensitivity", {"model": {"name": "pvt_v2_b0", "args": {}}, "dense": evaluation(150), "rows": rows, "skipped": []})


def quickstart() -> dict[str, Any]:
    rows = [
        {
            "name": name, "recipe": recipe, "evaluation": evaluation(right), "multiplications": mults, "dense_multiplications": 1000, "removed": 1 - mults / 1000,
            "shift_share": None, "bytes": 1000 * mults, "seconds": 1.0,
        }
        for name, recipe, right, mults in (("dense", "dense", 160, 1000), ("+ add", "ours-quant-add", 158, 900), ("+ MoE", "ours-quant-moe", 156, 600))
    ]  # fmt: skip
    return stamped("quickstart", {"rows": rows, "seconds": 3.0, "budget": {}, "finetune": {}, "seed": 0, "conditions": CONDITIONS})


def ops() -> dict[str, Any]:
    rows = [
        {"op": "matshift", "shape": f"3136×{k}×128", "contender": c, "median_us": t, "floor_us": 5.0, "share_of_floor": 5.0 / t}
        for k in (32, 64) for c, t in (("shiftaddvit", 8.0), ("torch bfloat16", 10.0))
    ]  # fmt: skip
    return stamped("ops-bench", {"ceilings": {}, "conditions": CONDITIONS, "rows": rows})


def train_bench() -> dict[str, Any]:
    row = {"model": "pvt_v2_b0", "recipe": "ours-quant-moe", "mode": "bf16", "batch": 32, "status": "measured"}
    times = {"median_us": 1e4, "low_us": 9e3, "high_us": 1.1e4, "images_per_s": 3200.0}
    return stamped("train-bench", {"kind": "train", "conditions": CONDITIONS, "rows": [row | times]})


def dispatch_of_a_network(pictures: int = 8) -> dict[str, Any]:
    """As many mixtures and tokens as PVTv2-B0 has at 224×224."""
    blocks = [f"stages.{stage}.blocks.{block}" for stage in range(4) for block in range(2)]
    layers = [
        {"name": f"{block}.{linear}", "experts": ["mult", "shift"], "tokens": side * side, "grid": [side, side], "prefix": 0, "share": [0.5, 0.5]}
        for block in blocks for linear in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for side in [56 >> int(block.split(".")[1])]
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    shown = [
        {
            "name": f"{n}.png", "image": PNG, "width": 8, "height": 8, "label": f"class {n}", "predicted": f"class {n}",
            "experts": {layer["name"]: "".join(map(str, rng.integers(0, 2, layer["tokens"]))) for layer in layers},
        }
        for n in range(pictures)
    ]  # fmt: skip
    return stamped("dispatch", dispatch() | {"layers": layers, "pictures": shown})


def more(folder: Path) -> Path:
    """What `results` lacks, so that with it there is a file of every kind; its search's files are `report_search_files`' to add."""
    put(folder, "quick/quickstart.json", quickstart())
    put(folder, "sensitivity.json", sensitivity())
    put(folder, "ops.json", ops())
    put(folder, "train.json", train_bench())
    put(folder, "network.json", dispatch_of_a_network())
    put(folder, "evaluate.json", stamped("evaluate", {"file": "m.safetensors", "split": "val", "precision": "no", **evaluation(155)}))
    one = {key: value for key, value in energy("msa", 4).items() if key != "shiftaddvit"}
    put(
        folder,
        "compare.json",
        stamped("energy-compare", {"subject": one["subject"], "baseline": "msa", "recipes": {"msa": one}, "conditions": CONDITIONS}),
    )
    put(folder, "sweep.json", stamped("energy-sweep", {"over": "shift_share", "values": [0, 1], "total_mj": [2.0, 1.0], "conditions": CONDITIONS}))
    scene = {"scene": "fern", "width": 504, "height": 378, "conditions": CONDITIONS}
    put(folder, "views.json", stamped("nvs-bench", scene | {"rows": [{"row": "gnt", "seconds": 2.0, "joules": 30.0}]}))
    put(folder, "nvs/result.json", stamped("nvs-train", {"steps": 10, "train_psnr": 20.0, "held_out_psnr": 19.0, "conditions": CONDITIONS}))
    return folder
