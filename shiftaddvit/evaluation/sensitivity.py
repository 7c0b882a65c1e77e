"""Which layers can take which primitive, and what each costs in accuracy (the question of ShiftAddViT section 3)."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from shiftaddvit.errors import UserError, unknown
from shiftaddvit.reparam import Recipe, calibrate, reparameterize
from shiftaddvit.reparam.calibrate import needs_calibration
from shiftaddvit.reparam.sites import AttentionSite, MlpSite, find_sites

from .accuracy import Evaluation, compare, evaluate

PRIMITIVES: Mapping[str, Mapping[str, str]] = {
    "linear": {"attention": "linear"},
    "add": {"attention": "linear", "add": "quant"},
    "hash": {"attention": "linear", "add": "ksh"},
    "attn-shift": {"attn_linear": "shift"},
    "mlp-shift": {"mlp": "shift"},
}
"""What each primitive changes at one site; the names of `sensitivity`."""


@dataclass(frozen=True)
class SensitivityRow:
    """One primitive at one place, everything else dense, before any fine-tuning."""

    where: str
    """Module name, or `all` for every site of its kind at once."""
    primitive: str
    """A name of `PRIMITIVES`."""
    top1: float
    """Accuracy, in %."""
    difference: float
    """Against the dense model on the same images, in points (negative: worse)."""
    interval95: tuple[float, float]
    """95 % paired interval of `difference`."""
    p_value: float
    """Exact McNemar test of no difference."""


@dataclass(frozen=True)
class Sensitivity:
    """The dense accuracy and what each change does to it."""

    dense: Evaluation
    """The model as given."""
    rows: tuple[SensitivityRow, ...]
    """In the order of the model's modules."""
    skipped: tuple[tuple[str, str, str], ...]
    """(module, primitive, reason) where the primitive cannot go."""

    def table(self) -> Table:
        """For people: the costliest change last within each primitive."""
        table = Table(title=f"dense top-1 {self.dense.top1:.2f} % on {self.dense.images} images; changes before fine-tuning")
        for heading in ("primitive", "where", "top-1 %", "difference, points", "95 % interval"):
            table.add_column(heading, justify="left" if heading in ("primitive", "where") else "right")
        for row in sorted(self.rows, key=lambda row: (row.primitive, -row.difference)):
            low, high = row.interval95
            table.add_row(row.primitive, row.where, f"{row.top1:.2f}", f"{row.difference:+.2f}", f"{low:+.2f} … {high:+.2f}")
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"dense": self.dense.to_json(), "rows": [asdict(row) for row in self.rows], "skipped": [list(entry) for entry in self.skipped]}


def sensitivity(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    primitives: Iterable[str] = ("linear", "add", "attn-shift", "mlp-shift"),
    per_site: bool = True,
    calibration_images: Tensor | None = None,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    step: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Convert one site at a time (and, as `all`, every site of its kind) of the dense `model`, without fine-tuning, and evaluate.

    Args:
        model: the dense model; it is not changed.
        loader: images and labels; it is read once for each row.
        primitives: names of `PRIMITIVES`.
        per_site: also each attention and MLP by itself; otherwise only the `all` rows.
        calibration_images: (B, 3, H, W), needed for `hash`.
        step: told what is being evaluated, for progress.

    Raises:
        UserError: an unknown primitive, a converted model, or hashing without calibration images.
    """
    primitives = list(primitives)
    for name in primitives:
        if name not in PRIMITIVES:
            raise unknown("primitive", name, PRIMITIVES)
    if hasattr(model, "shiftaddvit_recipe"):
        raise UserError("sensitivity starts from the dense model, this one is already converted")
    if "hash" in primitives and calibration_images is None:
        raise UserError("the primitive 'hash' needs calibration_images")
    if step:
        step("dense")
    dense = evaluate(model, loader, device=device, amp_dtype=amp_dtype, progress=False)
    attentions, mlps = find_sites(model)
    rows: list[SensitivityRow] = []
    skipped: list[tuple[str, str, str]] = []
    for name in primitives:
        change = PRIMITIVES[name]
        sites: list[AttentionSite] | list[MlpSite] = mlps if "mlp" in change else attentions
        open_sites = []
        for site in sites:
            reason = _closed(site, change)
            if reason:
                skipped.append((site.name, name, reason))
            else:
                open_sites.append(site.name)
        places = [(place, (place,)) for place in open_sites] if per_site else []
        if open_sites:
            places.append(("all", tuple(open_sites)))
        for where, modules in places:
            if step:
                step(f"{name} at {where}")
            converted = _converted(model, modules, change, calibration_images)
            found = evaluate(converted, loader, device=device, amp_dtype=amp_dtype, progress=False)
            paired = compare(found, dense)
            rows.append(SensitivityRow(where, name, found.top1, paired.difference, tuple(paired.interval95), paired.p_value))
    return Sensitivity(dense, tuple(rows), tuple(skipped))


def _closed(site: AttentionSite | MlpSite, change: Mapping[str, str]) -> str:
    """Why the change cannot be made at this site; empty when it can."""
    if isinstance(site, MlpSite) or "attention" not in change:
        return ""
    return site.obstacle or ("the last stage keeps softmax attention" if site.last_stage else "")


def _converted(model: nn.Module, modules: tuple[str, ...], change: Mapping[str, str], images: Tensor | None) -> nn.Module:
    converted = reparameterize(deepcopy(model), Recipe(overrides=tuple((module, change) for module in modules)))
    if needs_calibration(converted):
        calibrate(converted, images.to(next(converted.parameters()).device))
    return converted
