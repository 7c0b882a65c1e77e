"""Which layers can take which primitive, and what each costs in accuracy (the question of ShiftAddViT section 3)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.reparam import Recipe, calibrate, reparameterize
from shiftaddvit.reparam.calibrate import needs_calibration
from shiftaddvit.reparam.identity import Identity, identity
from shiftaddvit.reparam.sites import AttentionSite, MlpSite, find_sites
from shiftaddvit.schema import was_changed
from shiftaddvit.search_terms import change_of

from .accuracy import Evaluation, compare, evaluate

USUAL = ("linear", "add", "attn-shift", "mlp-shift")
"""Primitives that are measured unless told otherwise."""


@dataclass(frozen=True)
class SensitivityRow:
    """One primitive at one place, everything else dense, before any fine-tuning."""

    where: str
    """Module name, or `all` for every site of its kind at once."""
    primitive: str
    """A name of `PRIMITIVES`, or several joined by `+`."""
    top1: float
    """Accuracy, in %."""
    difference: float
    """Against the dense model on the same images, in points (negative: worse)."""
    interval95: tuple[float, float]
    """95 % paired interval of `difference`."""
    p_value: float
    """Exact McNemar test of no difference."""
    loss: float
    """Mean cross-entropy, in nats."""
    kl: float
    """Mean KL divergence from the dense model's classes to these, in nats: never negative, and far less noisy than the accuracy."""


@dataclass(frozen=True)
class Sensitivity:
    """The dense accuracy and what each change does to it."""

    identity: Identity
    """The dense model."""
    settings: Recipe
    """How primitives are made: shift, binary, hash, angular and moe of a recipe that converts nothing."""
    dense: Evaluation
    """The model as given."""
    rows: tuple[SensitivityRow, ...]
    """In the order of the model's modules."""
    skipped: tuple[tuple[str, str, str], ...]
    """(module, primitive, reason) where the primitive cannot go."""

    def table(self) -> Table:
        """For people: the costliest change last within each primitive."""
        table = Table(title=f"dense top-1 {self.dense.top1:.2f} % on {self.dense.images} images; changes before fine-tuning")
        for heading in ("primitive", "where", "top-1 %", "difference, points", "95 % interval", "KL, nats"):
            table.add_column(heading, justify="left" if heading in ("primitive", "where") else "right")
        for row in sorted(self.rows, key=lambda row: (row.primitive, -row.difference)):
            low, high = row.interval95
            table.add_row(row.primitive, row.where, f"{row.top1:.2f}", f"{row.difference:+.2f}", f"{low:+.2f} … {high:+.2f}", f"{row.kl:.4f}")
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "identity": self.identity.to_json(), "settings": self.settings.to_dict(), "dense": self.dense.to_json(),
            "rows": [asdict(row) for row in self.rows], "skipped": [list(entry) for entry in self.skipped],
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Any, source: str) -> "Sensitivity":
        """The inverse of `to_json`; other entries are ignored. UserError naming `source` for what is no such result."""
        if not isinstance(values, Mapping) or not {"dense", "rows", "skipped"} <= set(values):
            raise UserError(
                f"{source} holds no sensitivities: it needs the entries dense, rows and skipped, as 'shiftaddvit sensitivity --json' writes"
            )
        if was_changed(values):
            raise UserError(f"{source} was changed after it was written: measure again")
        names = {f.name for f in fields(SensitivityRow)}
        rows = []
        for number, row in enumerate(values["rows"], start=1):
            if not isinstance(row, Mapping) or set(row) != names:
                missing = sorted(names - set(row)) if isinstance(row, Mapping) else sorted(names)
                raise UserError(f"{source}: row {number} is not a sensitivity (missing: {', '.join(missing) or 'nothing, but there is more'})")
            rows.append(SensitivityRow(**row | {"interval95": tuple(row["interval95"])}))
        settings = Recipe.from_dict(values.get("settings", {}), source)
        skipped = tuple((where, name, reason) for where, name, reason in values["skipped"])
        return cls(Identity.from_json(values.get("identity"), source), settings, Evaluation.from_json(values["dense"]), tuple(rows), skipped)


def sensitivity(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    primitives: Iterable[str] = USUAL,
    per_site: bool = True,
    together: bool = True,
    settings: Recipe = Recipe(),
    calibration_images: Tensor | None = None,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    step: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Convert one site at a time (and, as `all`, every site of its kind) of the dense `model`, without fine-tuning, and evaluate.

    Args:
        model: the dense model; it is not changed.
        loader: images and labels, always in the same order; it is read once for each row.
        primitives: names of `PRIMITIVES`, or several for one attention joined by `+`.
        per_site: also each attention and MLP by itself; otherwise only the `all` rows.
        together: the `all` rows.
        settings: how primitives are made; its columns and overrides are not used.
        calibration_images: (B, 3, H, W), needed for `hash`.
        step: told what is being evaluated, for progress.

    Raises:
        UserError: an unknown primitive, a converted model, or hashing without calibration images.
    """
    changes = {name: change_of(name) for name in primitives}
    if hasattr(model, "shiftaddvit_recipe"):
        raise UserError("sensitivity starts from the dense model, this one is already converted")
    if any(change.get("add") == "ksh" for change in changes.values()) and calibration_images is None:
        raise UserError("the primitive 'hash' needs calibration_images")
    settings = settings_of(settings)
    if step:
        step("dense")
    dense, expected = classes_of(model, loader, device, amp_dtype)
    attentions, mlps = find_sites(model)
    rows: list[SensitivityRow] = []
    skipped: list[tuple[str, str, str]] = []
    for name, change in changes.items():
        sites: list[AttentionSite] | list[MlpSite] = mlps if "mlp" in change else attentions
        open_sites = []
        for site in sites:
            reason = closed(site, change, settings)
            if reason:
                skipped.append((site.name, name, reason))
            else:
                open_sites.append(site.name)
        places = [(place, (place,)) for place in open_sites] if per_site else []
        if open_sites and together:
            places.append(("all", tuple(open_sites)))
        for where, modules in places:
            if step:
                step(f"{name} at {where}")
            recipe = replace(settings, overrides=tuple((module, change) for module in modules))
            found, classes = classes_of(converted(model, recipe, calibration_images), loader, device, amp_dtype)
            paired = compare(found, dense)
            rows.append(
                SensitivityRow(
                    where, name, found.top1, paired.difference, tuple(paired.interval95), paired.p_value, found.loss, divergence(expected, classes)
                )
            )
    return Sensitivity(identity(model), settings, dense, tuple(rows), tuple(skipped))


def settings_of(recipe: Recipe) -> Recipe:
    """How the recipe makes primitives, converting nothing."""
    return replace(recipe, attention="keep", add="none", attn_linear="mult", mlp="mult", overrides=(), name="", description="")


def classes_of(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str | None, amp_dtype: torch.dtype | None
) -> tuple[Evaluation, Float[Tensor, "images classes"]]:
    """The evaluation, and log-probabilities of every image that could be read, on the CPU."""
    with _logits(model) as parts:
        found = evaluate(model, loader, device=device, amp_dtype=amp_dtype, progress=False)
    logits = torch.cat([part.cpu() for part in parts])
    if found.unreadable:
        logits = logits[torch.cat([labels for _, labels in loader]).cpu() >= 0]
    return found, logits.double().log_softmax(dim=1)


def divergence(expected: Float[Tensor, "images classes"], found: Float[Tensor, "images classes"]) -> float:
    """Mean KL(expected ‖ found) of log-probabilities, in nats."""
    return float((expected.exp() * (expected - found)).sum(dim=1).mean().clamp_min(0))


def converted(model: nn.Module, recipe: Recipe, images: Tensor | None = None) -> nn.Module:
    """A copy of the dense model, converted and calibrated but not trained; what starts at random starts alike every time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        changed = reparameterize(deepcopy(model), recipe)
        if needs_calibration(changed):
            calibrate(changed, images.to(next(changed.parameters()).device))
    return changed


@contextmanager
def _logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Every forward's logits, kept where they are made."""
    parts: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        parts.append((output[0] if isinstance(output, (tuple, list)) else output).float())

    handle = model.register_forward_hook(keep)
    try:
        yield parts
    finally:
        handle.remove()


def closed(site: AttentionSite | MlpSite, change: Mapping[str, str], settings: Recipe = Recipe()) -> str:
    """Why the change cannot be made at this site; empty when it can."""
    if isinstance(site, MlpSite) or "attention" not in change:
        return ""
    if change["attention"] == "msa" and site.kind != "sra":
        return "its attention is softmax attention over all tokens already"
    return site.obstacle or ("the last stage keeps softmax attention" if site.last_stage and settings.last_stage_softmax else "")
