"""The search on a small pyramid: tables add up, recipes do what was chosen, budgets hold, and what does not fit is refused by name."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_models import SIZE, dense, images
from torch import nn

import shiftaddvit as sav
from shiftaddvit.autorecipe import (
    Budget,
    CostTable,
    Goal,
    Tables,
    additivity,
    energy_table,
    latency_table,
    measure_together,
    options_of,
    search,
    solve,
)
from shiftaddvit.autorecipe.costs import read_json
from shiftaddvit.autorecipe.figure import front_figure
from shiftaddvit.autorecipe.options import changes, choice_of, fixed_rows, recipe_of
from shiftaddvit.cost import Settings
from shiftaddvit.cost.estimate import model_energy
from shiftaddvit.errors import UserError
from shiftaddvit.evaluation import evaluate
from shiftaddvit.evaluation.sensitivity import Sensitivity, sensitivity
from shiftaddvit.layers.moe import MoEConfig, MoELinear
from shiftaddvit.layers.shift import ShiftConfig, ShiftLinear
from shiftaddvit.reparam import Recipe, reparameterize
from shiftaddvit.schema import stamped
from shiftaddvit.search_terms import DENSE

GOAL = Goal(("kl", "energy"), "kl", "energy")
PRIMITIVES = ("add", "attn-shift", "attn-moe", "mlp-shift", "mlp-moe")
"""Fewer than there are, to be quick."""


def fit(tables: Tables, *budgets: str, goal: Goal = GOAL, points: int | None = 6):
    return solve(tables, [Budget.parse(budget) for budget in budgets], goal, points)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return dense("pvt_v2")


@pytest.fixture(scope="module")
def loader() -> list:
    x = images(24)
    return [(x[:12], torch.arange(12) % 7), (x[12:], torch.arange(12) % 7)]


@pytest.fixture(scope="module")
def damages(model, loader) -> Sensitivity:
    return sensitivity(model, loader, primitives=changes(options_of(model, PRIMITIVES)), together=False)


@pytest.fixture(scope="module")
def tables(model, damages) -> Tables:
    options = options_of(model, PRIMITIVES)
    return Tables(options, damages, (energy_table(model, options, image_size=(SIZE, SIZE)),))


def some_choices(tables: Tables, count: int = 4) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    return [{site: str(rng.choice(names)) for site, names in tables.options.items()} for _ in range(count)]


def converted(model: nn.Module, choice: dict[str, str]) -> nn.Module:
    return reparameterize(deepcopy(model), recipe_of(choice))


def test_every_attention_and_mlp_has_its_options(model):
    options = options_of(model)
    assert [site for site in options if site.endswith("attn")] == [f"stages.{i}.blocks.0.attn" for i in range(4)]
    assert options["stages.0.blocks.0.mlp"] == (DENSE, "mlp-shift", "mlp-moe")
    assert len(options["stages.0.blocks.0.attn"]) == 12
    assert options["stages.3.blocks.0.attn"] == (DENSE, "attn-shift", "attn-moe"), "the last stage keeps softmax attention"
    assert "msa" not in changes(options_of(dense("vit"))), "a plain transformer has MSA already"


def test_energy_of_a_network_is_the_sum_over_its_sites(model, tables):
    for choice in some_choices(tables):
        whole = model_energy(converted(model, choice), None, Settings(), 0.5, (SIZE, SIZE)).total_mj
        assert tables.menu.total("energy", tables.menu.picks(choice)) == pytest.approx(whole, rel=1e-12)


def test_recipe_makes_exactly_what_was_chosen(model, tables):
    for choice in some_choices(tables):
        recipe = Recipe.from_dict(recipe_of(choice).to_dict())
        assert choice_of(recipe, tables.options) == choice
        network = converted(model, choice)
        for site, option in choice.items():
            kinds = {type(module) for module in network.get_submodule(site).modules()}
            assert (MoELinear in kinds) == ("moe" in option) and (ShiftLinear in kinds) == ("shift" in option or "moe" in option), (site, option)


def test_written_recipe_is_read_again(tmp_path, tables):
    choice = some_choices(tables, 1)[0]
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_of(choice, name="searched").to_toml())
    assert Recipe.from_toml(path) == recipe_of(choice, name="searched")


def test_shipped_rows_are_choices_with_the_energy_of_their_recipe(model, tables):
    rows = fixed_rows(tables.options)
    assert {"ours-quant-add", "ours-quant-shift", "ours-quant-moe"} <= set(rows) and "ecoformer" not in rows
    for name in ("ours-quant-moe", "ours-quant-shift"):
        whole = model_energy(reparameterize(deepcopy(model), name), None, Settings(), 0.5, (SIZE, SIZE)).total_mj
        assert tables.menu.total("energy", tables.menu.picks(rows[name])) == pytest.approx(whole, rel=1e-12)


def test_divergence_is_that_of_the_two_networks(model, loader, damages):
    row = next(row for row in damages.rows if row.primitive == "add+attn-shift")
    other = converted(model, {row.where: row.primitive})
    with torch.no_grad():
        p, q = (torch.cat([network(x) for x, _ in loader]).softmax(1) for network in (model, other))
    assert row.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3)
    assert row.kl > 0 and all(row.kl >= 0 for row in damages.rows)


@pytest.mark.parametrize("share", [0.85, 1.0])
def test_found_network_keeps_the_energy_budget(model, tables, share):
    found = fit(tables, f"energy={share}")
    whole = model_energy(converted(model, found.point.choice), None, Settings(), 0.5, (SIZE, SIZE)).total_mj
    assert found.met and whole <= share * found.dense.totals["energy"] * (1 + 1e-9)
    assert found.point.totals["kl"] <= min(p.totals["kl"] for p in (*found.front, *found.rows.values()) if p.totals["energy"] <= whole * (1 + 1e-9))


def test_no_shipped_row_and_no_other_point_dominates_the_front(tables):
    found = fit(tables, points=None)
    points = [(p.totals["energy"], p.totals["kl"]) for p in found.front]
    rows = [(p.totals["energy"], p.totals["kl"]) for p in found.rows.values()]
    assert len(points) > 10
    for energy, kl in points:
        assert not any(e <= energy and d <= kl and (e < energy or d < kl) for e, d in (*points, *rows))


def test_options_that_are_left_out_are_nowhere_on_the_front(tables):
    found = fit(tables, points=None)
    assert found.left_out
    for point in found.front:
        assert not any(option in found.left_out.get(site, {}) for site, option in point.choice.items())
    energies = tables.cost("energy").costs
    for site, values in energies.items():
        for option, energy in values.items():
            if energy > values[DENSE]:
                assert option in found.left_out[site], "it costs more than leaving the site alone, and harms"


def test_budget_for_the_drop_finds_the_least_energy(tables):
    found = fit(tables, "drop=5", goal=Goal(("energy", "drop"), "drop", "energy"))
    assert found.point.totals["drop"] <= 5 + 1e-9
    assert all(p.totals["energy"] >= found.point.totals["energy"] - 1e-12 for p in found.front if p.totals["drop"] <= 5)


def test_budget_that_cannot_be_met_gives_the_nearest_point(tables):
    found = fit(tables, "energy=0.01")
    assert not found.met and found.point.totals["energy"] == pytest.approx(tables.menu.least("energy"))
    assert "cannot be met" in found.headline()[0] and "energy ≤ 0.01 of dense" in found.headline()[0]


def test_search_goes_the_whole_way(model, loader, damages, tmp_path):
    found = search(model, loader, ["energy=0.85"], damages=damages, points=6, primitives=PRIMITIVES)
    assert found.met and found.share(found.point, "energy") <= 0.85
    again = evaluate(converted(model, found.point.choice), loader, progress=False)
    assert found.together.top1 == again.top1 and found.together.loss == pytest.approx(again.loss - damages.dense.loss)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(values["front"]) <= 7 and values["recipe"]["overrides"] and values["tables"]["sensitivity"]["images"] == 24
    assert all(path.stat().st_size > 1000 for path in front_figure(found, tmp_path / "front.svg"))


def test_dense_model_is_left_as_it_was(model, tables, loader):
    assert not hasattr(model, "shiftaddvit_recipe") and not any(isinstance(m, ShiftLinear) for m in model.modules())


def test_latency_is_measured_for_every_option_and_read_again(model, tmp_path):
    options = options_of(model, ("attn-shift", "mlp-shift"))
    table = latency_table(model, options, images(2), seconds=0.001)
    assert {site: tuple(values) for site, values in table.costs.items()} == options
    assert table.rest > 0 and all(value > 0 for values in table.costs.values() for value in values.values())
    assert table.conditions["batch"] == 2 and table.conditions["device"]
    again = CostTable.from_json(json.loads(json.dumps(table.to_json())), "latency.json", "latency")
    assert again == table


def test_latency_budget_is_met_with_a_table_of_another_device(model, damages):
    energies = energy_table(model, options_of(model, PRIMITIVES), image_size=(SIZE, SIZE))
    invented = {site: {o: 10.0 - 3 * ("shift" in o) + 5 * ("moe" in o) for o in values} for site, values in energies.costs.items()}
    table = replace(energies, quantity="latency", costs=invented, rest=20.0, conditions={"device": "a board"})
    found = search(
        model, None, ["latency=90us", "energy=1.05"], damages=damages, latencies=table, primitives=PRIMITIVES, image_size=(SIZE, SIZE), points=6
    )
    assert found.met and found.point.totals["latency"] <= 90 and found.share(found.point, "energy") <= 1.05
    assert found.cost == "latency" and found.together is None and found.to_json()["tables"]["latency"]["device"] == "a board"


def test_sums_are_compared_with_measurements(model, loader, tables, damages):
    found = additivity(model, loader, tables.menu, damages, count=5)
    assert all(len(found.predicted[q]) == len(found.measured[q]) == 5 for q in ("kl", "loss", "drop"))
    assert set(found.rank_correlation) == {"kl", "loss", "drop"}
    single = {site: DENSE for site in tables.options} | {"stages.0.blocks.0.mlp": "mlp-shift"}
    joint = measure_together(model, loader, [single], damages)[0]
    assert joint.kl == pytest.approx(tables.menu.total("kl", tables.menu.picks(single)), rel=1e-6), "one site by itself is its own sum"


def test_other_images_are_refused(model, loader, damages):
    other = [(x, (y + 1) % 7) for x, y in loader]
    with pytest.raises(UserError, match="same images"):
        search(model, other, ["energy=0.8"], damages=damages, primitives=PRIMITIVES)


def test_sensitivities_survive_json(damages):
    again = Sensitivity.from_json(json.loads(json.dumps(damages.to_json(), allow_nan=False)), "s.json")
    assert again.rows == damages.rows and again.identity == damages.identity and again.settings == damages.settings


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda v: v.pop("identity"), "s.json does not say which model it is of"),
        (lambda v: v.pop("rows"), "s.json holds no sensitivities"),
        (lambda v: v["rows"][2].pop("kl"), "s.json: row 3 is not a sensitivity .missing: kl"),
        (lambda v: v["settings"].update(shfit={}), "unknown field of s.json 'shfit'"),
        (lambda v: v.update(dense={}), "not an evaluation"),
    ],
)
def test_damaged_sensitivities_are_named(damages, damage, words):
    values = json.loads(json.dumps(damages.to_json()))
    damage(values)
    with pytest.raises(UserError, match=words):
        Sensitivity.from_json(values, "s.json")


def test_edited_sensitivities_are_named(damages):
    values = json.loads(json.dumps(stamped("sensitivity", damages.to_json())))
    assert Sensitivity.from_json(values, "s.json").rows == damages.rows
    values["rows"][0]["kl"] = 0.0
    with pytest.raises(UserError, match="s.json was changed after it was written"):
        Sensitivity.from_json(values, "s.json")


def test_edited_latencies_are_named(model, tables):
    table = replace(tables.cost("energy"), quantity="latency", conditions={"device": "a board"})
    values = json.loads(json.dumps(stamped("search-latency", table.to_json())))
    assert CostTable.from_json(values, "l.json", "latency") == table
    values["rest"] = 0.0
    with pytest.raises(UserError, match=r"l\.json was changed after it was written"):
        CostTable.from_json(values, "l.json", "latency")


def test_what_is_written_of_each_site_adds_up_to_the_totals(tables):
    found = fit(tables, "energy=0.8")
    values = json.loads(json.dumps(found.to_json()))
    assert {site["name"]: site["becomes"] for site in values["sites"]} == found.point.choice
    for quantity, total in found.point.totals.items():
        summed = values["rest"].get(quantity, 0.0) + sum(site["here"][quantity] for site in values["sites"])
        assert summed == pytest.approx(total, rel=1e-9, abs=1e-12), quantity
    assert values["rest"]["energy"] + sum(site["dense"]["energy"] for site in values["sites"]) == pytest.approx(found.dense.totals["energy"])


def test_half_a_file_is_named(tmp_path):
    path = tmp_path / "s.json"
    path.write_text('{"rows": [')
    with pytest.raises(UserError, match="s.json' is not whole JSON"):
        read_json(path)
    with pytest.raises(UserError, match="none.json' does not exist"):
        read_json(tmp_path / "none.json")


def test_sensitivities_of_another_model_are_refused(model, damages):
    other = dense("pvt_v2")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(UserError, match="the sensitivity table was measured with other weights"):
        search(other, None, ["energy=0.8"], damages=damages)
    with pytest.raises(UserError, match=r"of another model: it has stages.0.blocks.0.attn .* where this one has blocks.0.attn"):
        search(dense("vit"), None, ["energy=0.8"], damages=damages, primitives=PRIMITIVES)
    deeper = dense("pvt_v2", depths=(1, 1, 2, 1))
    with pytest.raises(UserError, match="of another model"):
        search(deeper, None, ["energy=0.8"], damages=damages)


def test_tables_with_other_settings_or_without_a_value_are_refused(model, damages):
    with pytest.raises(UserError, match="other settings of the primitives"):
        search(model, None, ["energy=0.8"], damages=damages, settings=Recipe(shift=ShiftConfig(bits=4)))
    fewer = replace(damages, rows=tuple(row for row in damages.rows if row.primitive != "add"))
    with pytest.raises(UserError, match="no value for 'add' at stages.0.blocks.0.attn"):
        search(model, None, ["energy=0.8"], damages=fewer, primitives=PRIMITIVES)


def test_converted_model_is_refused(model):
    with pytest.raises(UserError, match="already converted"):
        search(converted(model, {"stages.0.blocks.0.mlp": "mlp-shift"}), [])
    with pytest.raises(UserError, match="needs a loader"):
        search(model)
    with pytest.raises(UserError, match="gave no image"):
        search(model, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("energy=0.6", Budget("energy", 0.6, True)),
        ("energy = 0.5 mJ", Budget("energy", 0.5)),
        ("energy=20uJ", Budget("energy", 0.02)),
        ("latency=1.5ms", Budget("latency", 1500.0)),
        ("latency=0.8", Budget("latency", 0.8, True)),
        ("drop=1", Budget("drop", 1.0)),
        ("kl=1e-2", Budget("kl", 0.01)),
    ],
)
def test_budgets_are_read_as_people_write_them(text, expected):
    found = Budget.parse(text)
    assert (found.quantity, found.share) == (expected.quantity, expected.share) and found.limit == pytest.approx(expected.limit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("energy", "looks like energy=0.6"),
        ("enrgy=1", "did you mean 'energy'"),
        ("energy=fast", "needs a number"),
        ("energy=3ms", "units one of uJ, µJ, mJ, J"),
        ("energy=0", "must be a number above 0"),
        ("drop=-1", "at least 0"),
        ("energy=1.2.3", "needs a number"),
    ],
)
def test_budgets_that_make_no_sense_are_named(text, words):
    with pytest.raises(UserError, match=words):
        Budget.parse(text)


def test_settings_reach_the_recipe_and_the_tables(model):
    paper = Recipe(moe=MoEConfig(gate="paper"), shift=ShiftConfig(bits=4))
    options = options_of(model, ("mlp-shift", "mlp-moe"))
    five, four = (energy_table(model, options, made, image_size=(SIZE, SIZE)) for made in (Recipe(), paper))
    assert four.costs["stages.0.blocks.0.mlp"]["mlp-shift"] < five.costs["stages.0.blocks.0.mlp"]["mlp-shift"]
    assert recipe_of({"stages.0.blocks.0.mlp": "mlp-moe"}, paper).moe.gate == "paper"


def test_public_name_is_the_function():
    assert sav.search is search
