"""The paper's numbers, as data: never mixed with ours, always in columns of their own. `published.toml` is the only copy."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

CLASSIFICATION_DATA = "ImageNet-1k, 224×224; RTX 3090"
"""What the classification numbers were obtained on."""
VIEW_SYNTHESIS_DATA = "LLFF, 504×378; RTX 3090"
"""What the view synthesis numbers were obtained on."""


@dataclass(frozen=True)
class PublishedResult:
    """One row's numbers on one model."""

    top1: float | None = None
    """In %; None where there is none."""
    latency_ms: float | None = None
    """At batch 1."""
    images_per_s: float | None = None
    """Throughput."""
    energy_mj: float | None = None
    """Of one image, by the analytical Eyeriss model."""
    modularised_ms: float | None = None
    """Simulated latency: experts timed one by one, as if they ran in parallel for free."""
    compiled: bool = False
    """Whether latency and throughput are of a model compiled with TVM."""
    diverged: bool = False
    """The paper prints NaN for the accuracy."""


@dataclass(frozen=True)
class PublishedRow:
    """One row of the ablation table."""

    recipe: str
    """The recipe of the same row."""
    label: str
    """What a table calls it."""
    attention: str
    """`softmax`, `linear SRA` or `linear`."""
    add: str
    """How queries and keys become codes; empty for none."""
    attn_linear: str
    """What the linears of the attention are; empty for multiplications."""
    mlp: str
    """What the linears of the MLPs are; empty for multiplications."""
    results: Mapping[str, PublishedResult]
    """By name of the model."""


@dataclass(frozen=True)
class PublishedView:
    """One row of the view synthesis table."""

    row: str
    """`nerf`, `gnt`, or the recipe's name."""
    label: str
    """What a table calls it."""
    seconds: float
    """An image."""
    joules: float | None
    """An image, by the analytical model."""
    quality: Mapping[str, tuple[float, float, float]]
    """PSNR in dB, SSIM and LPIPS, by scene; `llff` is the mean of eight."""


@cache
def classification() -> tuple[PublishedRow, ...]:
    """The rows of the ablation table, in its order."""
    return tuple(
        PublishedRow(
            row["recipe"], row["label"], row["attention"], row.get("add", ""), row.get("attn_linear", ""), row.get("mlp", ""),
            {name: PublishedResult(**value) for name, value in row.items() if isinstance(value, dict)},
        )
        for row in _read()["classification"]
    )  # fmt: skip


@cache
def view_synthesis() -> tuple[PublishedView, ...]:
    """The rows of the view synthesis table, in its order."""
    scenes = ("llff", "orchids", "flower")
    return tuple(
        PublishedView(row["row"], row["label"], row["seconds"], row.get("joules"), {scene: tuple(row[scene]) for scene in scenes})
        for row in _read()["view_synthesis"]
    )


def _read() -> dict:
    return tomllib.loads((resources.files("shiftaddvit") / "published.toml").read_text(encoding="utf-8"))
