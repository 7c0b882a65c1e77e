"""`search`: from tables and budgets to a recipe."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from shiftaddvit.cost import Settings
from shiftaddvit.errors import UserError
from shiftaddvit.evaluation.sensitivity import Sensitivity, sensitivity, settings_of
from shiftaddvit.reparam import Recipe
from shiftaddvit.reparam.identity import identity
from shiftaddvit.search_terms import COSTS, DAMAGES

from .budget import Budget
from .check import measure_together
from .costs import CostTable, build_menu, damage_menu, energy_table
from .latency import latency_table
from .menu import Menu, Picks
from .optimise import front, least, nearest
from .options import SEARCHED, Options, changes, fixed_rows, options_of, recipe_of
from .result import Found, Point

FRONT_POINTS = 40


@dataclass(frozen=True)
class Tables:
    """What is known of a model's options."""

    options: Options
    """What each site may become."""
    damage: Sensitivity
    """Measured, each site by itself."""
    costs: tuple[CostTable, ...]
    """Energy, and latency where it was asked for."""
    menu: Menu = field(init=False, repr=False)
    """All of it, as the optimisation reads it."""

    def __post_init__(self) -> None:
        """Raise UserError for tables of different models or settings, or with values missing."""
        for table in self.costs:
            self.damage.identity.check_layers(table.identity, f"the {table.quantity} table")
            if settings_of(table.settings) != settings_of(self.damage.settings):
                raise UserError(f"the {table.quantity} table was made with other settings of the primitives than the sensitivities")
        object.__setattr__(self, "menu", build_menu(self.options, damage_menu(self.damage, self.options), self.costs))

    def cost(self, quantity: str) -> CostTable | None:
        """The table of a quantity."""
        return next((table for table in self.costs if table.quantity == quantity), None)


def search(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    budgets: Iterable[Budget | str] = (),
    *,
    primitives: Sequence[str] = SEARCHED,
    settings: Recipe | None = None,
    damages: Sensitivity | None = None,
    latencies: CostTable | None = None,
    energy: Settings = Settings(),
    shift_share: float = 0.5,
    damage: str = "kl",
    minimise: str | None = None,
    image_size: tuple[int, int] | None = None,
    batch: int = 1,
    points: int | None = FRONT_POINTS,
    calibration_images: Tensor | None = None,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> Found:
    """Assign a primitive to every attention and MLP of the dense `model` under budgets (docs/search.md).

    Args:
        model: dense; it is not changed.
        loader: images that the final accuracy is *not* measured on, labelled, always in the same order. None with `damages` of a file:
            then the found network is not measured as a whole.
        budgets: as `Budget.parse` reads them; with none the least damage is found, which is the dense network's.
        primitives: what may be chosen.
        settings: how primitives are made (shift, binary, angular, moe); those of `damages`, or the defaults.
        damages: sensitivities measured before, of this model with these weights.
        latencies: measured before, on the device that is meant. Without it and with a budget for latency (or `minimise="latency"`),
            latency is measured on `device`.
        energy: the accelerator; mode `eyeriss`.
        shift_share: share of a mixture's tokens that is taken to go to its shift expert.
        damage: what the front trades for cost: `kl`, `loss` or `drop`; a budget for one of them goes before it.
        minimise: a quantity; the damage where there is a budget for a cost, else energy.
        image_size: height and width; by default those of the loader's images, or the model's own.
        batch: images at once, for latency.
        points: of the front; None for all.

    Raises:
        UserError: tables of another model, budgets that make no sense, and what `sensitivity` and `latency_table` raise.
    """
    limits = [Budget.parse(budget) if isinstance(budget, str) else budget for budget in budgets]
    goal = _goal(limits, damage, minimise)
    if damages is None and loader is None:
        raise UserError("the search needs a loader to measure sensitivities on, or damages measured before")
    mine = identity(model)
    if damages is not None:
        mine.check(damages.identity, "the sensitivity table")
        if settings is not None and settings_of(settings) != settings_of(damages.settings):
            raise UserError("the sensitivity table was made with other settings of the primitives: leave settings out, or measure it again")
    settings = settings_of(settings if settings is not None else damages.settings if damages is not None else Recipe())
    options = options_of(model, primitives, settings)
    example = next((images for images, _ in loader), None) if loader is not None else None
    if loader is not None and example is None:
        raise UserError("the loader gave no image to search on")
    size = image_size or (tuple(example.shape[-2:]) if example is not None else None)
    # What needs no images goes first: a table that does not fit is refused before minutes are spent.
    tables = [energy_table(model, options, settings, energy, shift_share, size)]
    if latencies is None and "latency" in (*goal.objectives, *(limit.quantity for limit in limits)):
        step("measuring latency")
        images = _images(example, batch, size, model)
        latencies = latency_table(model, options, images, settings, device or next(model.parameters()).device)
    if latencies is not None:
        mine.check_layers(latencies.identity, "the latency table")
        tables.append(latencies)
    if damages is None:
        damages = sensitivity(
            model, loader, primitives=changes(options), together=False, settings=settings, calibration_images=calibration_images,
            device=device, amp_dtype=amp_dtype, step=step,
        )  # fmt: skip
    step("optimising")
    found = solve(Tables(options, damages, tuple(tables)), limits, goal, points)
    if loader is not None:
        step("measuring the found network as a whole")
        joint = measure_together(
            model, loader, [found.point.choice], damages, calibration_images=calibration_images, device=device, amp_dtype=amp_dtype
        )
        found = replace(found, together=joint[0])
    return found


@dataclass(frozen=True)
class Goal:
    """What is minimised, and the two axes of the front."""

    objectives: tuple[str, ...]
    """The first is minimised; the others settle ties, in this order."""
    damage: str
    """One of `DAMAGES`."""
    cost: str
    """One of `COSTS`."""


def solve(tables: Tables, budgets: Sequence[Budget], goal: Goal, points: int | None = FRONT_POINTS) -> Found:
    """The optimum, the front, the fixed rows beside them; no model is needed. Several budgets may be on one quantity: the lowest counts."""
    start = time.monotonic()
    menu = tables.menu
    dense: Picks = (0,) * len(menu.sites)
    limits: dict[str, float] = {}
    for budget in budgets:
        menu.check(budget.quantity)
        limit = budget.absolute(menu.total(budget.quantity, dense))
        limits[budget.quantity] = min(limit, limits.get(budget.quantity, limit))
    picks, met = least(menu, goal.objectives, limits), True
    if picks is None:
        met, closest = False, nearest(menu, limits)
        relaxed = {quantity: max(limit, menu.total(quantity, closest)) for quantity, limit in limits.items()}
        picks = least(menu, goal.objectives, relaxed)
    others = {quantity: limit for quantity, limit in limits.items() if quantity not in (goal.damage, goal.cost)}
    curve = front(menu, goal.damage, goal.cost, others, points) or [picks]
    rows = {name: menu.picks(choice) for name, choice in fixed_rows(tables.options, tables.damage.settings).items()}
    text = ", ".join(map(str, budgets)) or "no budget"
    recipe = recipe_of(menu.choice(picks), tables.damage.settings, "searched", f"Found by search: least {goal.objectives[0]}, {text}.")
    return Found(
        recipe, tuple(budgets), met, goal.objectives[0], goal.damage, goal.cost, _point(menu, picks), _point(menu, dense),
        tuple(_point(menu, p) for p in curve), {name: _point(menu, p) for name, p in rows.items() if p != dense},
        _left_out(menu, goal), tuple(tables.costs), tables.damage, seconds=time.monotonic() - start,
    )  # fmt: skip


def _goal(budgets: Sequence[Budget], damage: str, minimise: str | None) -> Goal:
    if damage not in DAMAGES:
        raise UserError(f"damage must be one of {', '.join(DAMAGES)}, got {damage!r}")
    if minimise not in (None, *DAMAGES, *COSTS):
        raise UserError(f"minimise must be one of {', '.join((*DAMAGES, *COSTS))}, got {minimise!r}")
    quantities = [budget.quantity for budget in budgets]
    damage = next((q for q in (minimise, *quantities) if q in DAMAGES), damage)
    limited = [q for q in quantities if q in COSTS]
    cost = next((q for q in (minimise, *limited) if q in COSTS), "energy")
    first = minimise or (damage if limited or not quantities else cost)
    return Goal(tuple(dict.fromkeys((first, damage, cost))), damage, cost)


def _left_out(menu: Menu, goal: Goal) -> dict[str, dict[str, str]]:
    """By site and option: the option that beats it in damage and cost at once, so that no point of the front needs it."""
    found: dict[str, dict[str, str]] = {}
    lean = menu.useful((goal.damage, goal.cost))
    for number, (site, names) in enumerate(menu.options.items()):
        damage, cost = menu.costs[goal.damage][number], menu.costs[goal.cost][number]
        for index, name in enumerate(names):
            if name not in lean.options[site]:
                better = [i for i, other in enumerate(names) if other in lean.options[site] and damage[i] <= damage[index] and cost[i] <= cost[index]]
                found.setdefault(site, {})[name] = names[better[0]]
    return found


def _point(menu: Menu, picks: Picks) -> Point:
    return Point(menu.choice(picks), menu.totals(picks))


def _images(example: Tensor | None, batch: int, size: tuple[int, int] | None, model: nn.Module) -> Tensor:
    """A batch for timing: the loader's images as often as needed, or noise."""
    if batch < 1:
        raise UserError(f"batch must be at least 1, got {batch}")
    if example is not None and tuple(example.shape[-2:]) == size:
        return example.cpu().repeat(-(-batch // len(example)), 1, 1, 1)[:batch]
    size = size or tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:])
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
