"""What every option costs: energy on the analytical model, latency measured on a device, damage read from sensitivities."""

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from shiftaddvit.cost import Settings
from shiftaddvit.cost.estimate import model_energy
from shiftaddvit.errors import UserError
from shiftaddvit.evaluation.sensitivity import Sensitivity, SensitivityRow
from shiftaddvit.reparam import Recipe, reparameterize
from shiftaddvit.reparam.identity import Identity, identity
from shiftaddvit.schema import was_changed
from shiftaddvit.search_terms import DAMAGES, DENSE, UNITS

from .menu import Menu
from .options import Options, changes, check_options, recipe_of


@dataclass(frozen=True)
class CostTable:
    """One quantity of every option of every site, and of the rest of the network."""

    quantity: str
    """A name of `UNITS`."""
    identity: Identity
    """The dense model."""
    settings: Recipe
    """How primitives are made."""
    costs: Mapping[str, Mapping[str, float]]
    """By site and option."""
    rest: float
    """Of everything outside the sites."""
    conditions: Mapping[str, Any]
    """What the values depend on: units and bits, or device and versions."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "quantity": self.quantity, "unit": UNITS[self.quantity], "identity": self.identity.to_json(), "settings": self.settings.to_dict(),
            "conditions": dict(self.conditions), "rest": self.rest, "costs": {site: dict(values) for site, values in self.costs.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Any, source: str, quantity: str) -> "CostTable":
        """The inverse of `to_json`. UserError naming `source` for what is no table of `quantity`."""
        entries = ("quantity", "unit", "identity", "settings", "conditions", "rest", "costs")
        missing = [entry for entry in entries if not isinstance(values, Mapping) or entry not in values]
        if missing:
            raise UserError(f"{source} is no table of {quantity}: it lacks {', '.join(missing)}")
        if was_changed(values):
            raise UserError(f"{source} was changed after it was written: measure again")
        if values["quantity"] != quantity or values["unit"] != UNITS[quantity]:
            raise UserError(f"{source} holds {values['quantity']} in {values['unit']}, not {quantity} in {UNITS[quantity]}")
        costs = values["costs"]
        numbers = [values["rest"], *(cost for site in costs.values() for cost in site.values())]
        if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
            raise UserError(f"{source} has values that are no numbers")
        settings = Recipe.from_dict(values["settings"], source)
        return cls(quantity, Identity.from_json(values["identity"], source), settings, costs, values["rest"], values["conditions"])


def energy_table(
    model: nn.Module,
    options: Options,
    settings: Recipe = Recipe(),
    cost: Settings = Settings(),
    shift_share: float = 0.5,
    image_size: tuple[int, int] | None = None,
) -> CostTable:
    """mJ of one image on the analytical accelerator, mode `eyeriss`, by site. `shift_share` of a mixture's tokens are taken to go to
    its shift expert. Every operation is costed by itself, so the energies of sites add up exactly.

    Raises:
        UserError: mode `paper`, where one layer's energy depends on another's.
    """
    if cost.mode != "eyeriss":
        raise UserError("the search needs mode 'eyeriss': in mode 'paper' what an Add costs depends on other layers")
    found: dict[str, dict[str, float]] = {site: {} for site in options}
    rest = 0.0
    for option in (DENSE, *changes(options)):
        sites = [site for site, names in options.items() if option in names]
        choice = {site: option if site in sites else DENSE for site in options}
        energies = model_energy(_with(model, choice, settings), None, cost, shift_share, image_size)
        sums = by_site(((layer.name, layer.pj * 1e-9) for layer in energies.per_layer), options)
        for site in sites:
            found[site][option] = sums[site]
        if option == DENSE:
            rest = sums[""]
    described = cost.describe() | {"shift_share": shift_share, "image_size": energies.settings["image_size"], "batch": 1}
    return CostTable("energy", identity(model), settings, found, rest, described)


def damage_menu(sensitivity: Sensitivity, options: Options, source: str = "the sensitivity table") -> dict[str, dict[str, dict[str, float]]]:
    """Damage by quantity, site and option, nothing for `dense`."""
    rows = {(row.where, row.primitive): row for row in sensitivity.rows}
    found: dict[str, dict[str, dict[str, float]]] = {quantity: {site: {DENSE: 0.0} for site in options} for quantity in DAMAGES}
    for site, names in options.items():
        for name in names:
            if (site, name) in rows:
                for quantity, value in damages(rows[site, name], sensitivity).items():
                    found[quantity][site][name] = value
    check_options(options, found["kl"], source)
    return found


def damages(row: SensitivityRow, sensitivity: Sensitivity) -> dict[str, float]:
    """One change's damage, by quantity. A gain in accuracy or loss before fine-tuning is noise and counts as no damage, so that noise is
    not what the search optimises."""
    return {"kl": row.kl, "loss": max(0.0, row.loss - sensitivity.dense.loss), "drop": max(0.0, -row.difference)}


def build_menu(options: Options, damages: Mapping[str, Mapping[str, Mapping[str, float]]], tables: Iterable[CostTable]) -> Menu:
    """Everything that is known of every option."""
    values = dict(damages)
    rest = dict.fromkeys(damages, 0.0)
    for table in tables:
        check_options(options, table.costs, f"the {table.quantity} table")
        values[table.quantity], rest[table.quantity] = table.costs, table.rest
    columns = {q: tuple(np.array([by_site[site][name] for name in names]) for site, names in options.items()) for q, by_site in values.items()}
    return Menu(options, columns, rest)


def read_json(path: Path) -> Any:
    """A result file. UserError naming it if it is not there or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"result file {str(path)!r} does not exist") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"result file {str(path)!r} is not whole JSON: {error}") from None


def _with(model: nn.Module, choice: Mapping[str, str], settings: Recipe) -> nn.Module:
    # Costs depend on shapes only, so hash functions need no images here.
    return model if set(choice.values()) == {DENSE} else reparameterize(deepcopy(model), recipe_of(choice, settings))


def by_site(values: Iterable[tuple[str, float]], options: Options) -> dict[str, float]:
    """Sums by the site that a module name lies in; under the empty name what lies in none."""
    sums = dict.fromkeys((*options, ""), 0.0)
    for name, value in values:
        module = name.split(" ")[0]
        while module and module not in options:
            module = module.rpartition(".")[0]
        sums[module] += value
    return sums
