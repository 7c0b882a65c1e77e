"""Mode `paper` gives the published energies, to the digit where they were published and where a test says so."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftaddvit.cost import BitWidths, NoMapping, Settings, compare, cost_operations, energy
from shiftaddvit.cost.experts import divide
from shiftaddvit.cost.operations import Nest
from shiftaddvit.cost.paper import map_nest
from shiftaddvit.errors import UserError
from shiftaddvit.reparam import Recipe, reparameterize

PAPER = Settings(mode="paper")


def linear(n: int, c: int, m: int, primitive: str = "mult") -> Nest:
    return Nest("layer", "linear", primitive, 1, n, c, m)


def pj(nest: Nest, bits: int = 32) -> float:
    return sum(energy for _, energy in map_nest(nest, bits).cells)


@pytest.mark.parametrize(
    ("mj", "nest"),
    [
        (0.603522867, linear(49, 256, 1024)),
        (0.310053619, linear(197, 192, 192)),
        (0.062647208, linear(196, 160, 160, "shift")),
        (0.074195354, Nest("sum", "product", "add", 1, 32, 3136, 32)),
        (0.727100416, Nest("embed", "conv", "mult", 1, 1, 3, 32, 7, 7, 224, 224, 56, 56, (4, 4))),
        (1.019849933, Nest("depthwise", "conv", "mult", 256, 1, 1, 1, 3, 3, 56, 56, 56, 56)),
    ],
)
def test_single_operations_have_their_published_energy(mj, nest):
    assert pj(nest) * 1e-9 == pytest.approx(mj, rel=1e-6)


def test_patch_convolution_has_no_mapping_and_is_named():
    with pytest.raises(NoMapping, match="patch_embed.proj.*16×16"):
        energy("deit_tiny_patch16_224", mode="paper")


@pytest.mark.parametrize(
    ("recipe", "coverage", "mj"),
    [
        ("msa", "released", 28.28),
        ("msa", "full", 102.86),
        ("pvt", "released", 27.89),
        ("pvt", "full", 30.14),
        ("dense", "full", 30.14),
        ("ecoformer", "released", 27.370),
        ("ecoformer", "full", 33.640),
    ],
)
def test_pvt_v2_b0_baselines(recipe, coverage, mj):
    assert energy("pvt_v2_b0", recipe=recipe, mode="paper", coverage=coverage).total_mj == pytest.approx(mj, rel=2e-4)


@pytest.mark.parametrize(("share", "mj"), [(0, 31.723), (0.5, 24.971), (0.6, 23.741), (1, 17.378)])
def test_pvt_v2_b0_mixtures_at_a_forced_share(share, mj):
    found = {
        coverage: energy("pvt_v2_b0", recipe="ours-quant-moe", mode="paper", coverage=coverage, shift_share=share, stage4_matmuls=False)
        for coverage in ("released", "full")
    }
    assert found["released"].total_mj == pytest.approx(mj, abs=6e-4)
    assert found["full"].total_mj == found["released"].total_mj


def test_last_stage_products_add_their_part():
    with_and_without = [
        energy("pvt_v2_b0", recipe="ours-quant-moe", mode="paper", coverage="released", shift_share=0.5, stage4_matmuls=on).total_mj
        for on in (True, False)
    ]
    assert with_and_without[0] - with_and_without[1] == pytest.approx(0.146, abs=5e-4)


def test_published_shiftaddvit_energy_fits_a_share_of_042():
    """The true shares are unpublished. PVTv2-B0 fits with mixtures in attention and MLPs, DeiT-T nearly with mixtures in its MLPs alone;
    with both it would take a share of 0.33."""
    found = energy("pvt_v2_b0", recipe="ours-quant-moe", mode="paper", shift_share=0.42)
    assert found.total_mj == pytest.approx(27.13, rel=0.0245)
    with torch.device("meta"):
        deit = reparameterize(timm.create_model("deit_tiny_patch16_224"), Recipe(attention="linear", add="quant", mlp="moe"))
    found = energy(deit, mode="paper", shift_share=0.42, exclude=["patch_embed.proj"])
    assert found.total_mj == pytest.approx(38.21, rel=0.03)


def test_deit_without_its_patch_embedding():
    found = energy("deit_tiny_patch16_224", recipe="msa", mode="paper", exclude=("patch_embed.proj",))
    assert found.total_mj == pytest.approx(65.974, abs=5e-4)
    assert any(entry.name == "patch_embed.proj" and "excluded" in entry.reason for entry in found.uncosted)


def test_exact_divisors_make_odd_counts_dear():
    """What the documentation says about this mode, with its numbers."""
    assert pj(linear(38_707, 64, 64)) / pj(linear(38_704, 64, 64)) == pytest.approx(9.40, abs=0.01)

    def an_image(share: float, batch: int = 1) -> float:
        return energy("pvt_v2_b0", recipe="ours-quant-moe", mode="paper", shift_share=share, batch=batch).total_mj / batch

    assert [an_image(share) for share in (0.38, 0.39, 0.4)] == pytest.approx([26.76, 28.92, 26.98], abs=0.006)
    assert [an_image(0.42), an_image(0.42, batch=8)] == pytest.approx([26.47, 56.13], abs=0.006)


def test_random_splits_seldom_leave_the_range_of_their_pure_forms():
    random = np.random.default_rng(0)
    above = 0
    for _ in range(400):
        n, share = int(random.choice([3136, 784, 196, 49])), random.random()
        c, m = (int(x) for x in random.choice([32, 64, 160, 256], 2))
        mults, shifts = divide(n, (1 - share, share))
        total = sum(pj(linear(count, c, m, p)) for count, p in ((mults, "mult"), (shifts, "shift")) if count)
        above += total > pj(linear(n, c, m)) * (1 + 1e-9)
    assert 0.01 < above / 400 < 0.1


def test_at_eight_bits_a_shift_is_the_dearer_one():
    """Its operands keep ten bits, so the published model turns the comparison round; mode `eyeriss` does not."""
    assert pj(linear(196, 64, 64, "shift"), bits=8) > pj(linear(196, 64, 64), bits=8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "eyeriss", "word_bits": 8}, "belong to mode 'paper'"),
        ({"mode": "paper", "bits": BitWidths(activation=8)}, "belong to mode 'eyeriss'"),
        ({"mode": "paper", "units": "65nm"}, "'65nm' belongs to mode 'eyeriss'"),
        ({"mode": "paper", "fusion": "none"}, "belongs to mode 'eyeriss'"),
        ({"fusion": "all"}, "'rows' or 'none'"),
    ],
)
def test_a_setting_of_the_other_mode_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        energy("pvt_v2_b0", **wrong)


def test_view_synthesis_networks():
    assert energy("nerf", mode="paper").total_mj == pytest.approx(1_064_960, rel=1e-5)
    assert energy("gnt", mode="paper").total_mj == pytest.approx(1_849_000, rel=5e-3)


def test_ecoformer_costs_more_than_spatial_reduction():
    found = compare("pvt_v2_b0", ["ours-quant-moe"], "ecoformer", PAPER)
    assert set(found.energies) == {"msa", "pvt", "ecoformer", "ours-quant-moe"}
    assert found.saving("ecoformer", "pvt") < 0 < found.saving("ours-quant-moe")


def test_index_bug_costs_every_add_like_the_first():
    on, off = (energy("pvt_v2_b0", recipe="ours-quant-add", mode="paper", add_index_bug=bug) for bug in (True, False))
    adds = [layer.pj for layer in on.per_layer if layer.primitive == "add"]
    assert len(adds) == 12 and len(set(adds)) == 1
    assert adds[0] * 1e-9 == pytest.approx(0.074195354, rel=1e-6)
    assert len({layer.pj for layer in off.per_layer if layer.primitive == "add"}) > 1


def test_kernels_are_squares_and_groups_share_one_weight():
    window = Nest("token_conv", "conv", "mult", 5, 1, 1, 1, 9, 1, 196, 32, 196, 32)
    square = Nest("conv", "conv", "mult", 1, 5, 1, 1, 3, 3, 196, 32, 196, 32)
    assert pj(window) == pj(square)


def test_eight_bits_have_room_for_more():
    assert pj(linear(196, 160, 640), bits=8) < pj(linear(196, 160, 640), bits=32) / 4 * 1.01
    nest = Nest("patch", "conv", "mult", 1, 1, 3, 192, 16, 16, 224, 224, 14, 14, (16, 16))
    assert pj(nest, bits=8) > 0, "a 16×16 kernel fits the doubled register file"


def test_model_energy_falls_with_the_share_and_stays_between_its_pure_forms():
    """At the token counts of a real network; see docs/energy.md for counts whose divisors are few."""
    totals = []
    for share in np.linspace(0, 1, 6):
        found = energy("pvt_v2_b0", recipe="ours-quant-moe", mode="paper", shift_share=float(share))
        totals.append(sum(layer.pj for layer in found.per_layer if layer.role != "router"))
    assert totals == sorted(totals, reverse=True)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 4000),
    c=st.sampled_from([16, 25, 32, 49, 160, 197, 256]),
    m=st.sampled_from([1, 2, 32, 160, 197, 1000]),
    primitive=st.sampled_from(["mult", "shift", "add"]),
)
def test_levels_and_operands_add_up(n, c, m, primitive):
    found = cost_operations([linear(n, c, m, primitive)], PAPER)
    layer = found.per_layer[0]
    assert sum(layer.by_level().values()) == pytest.approx(layer.pj, rel=1e-12)
    assert sum(layer.by_operand().values()) == pytest.approx(layer.pj, rel=1e-12)
    assert found.total_mj == pytest.approx(layer.pj * 1e-9, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 500), c=st.sampled_from([32, 64, 160, 197]), m=st.sampled_from([32, 160, 512]), batch=st.integers(1, 8))
def test_an_image_in_a_batch_costs_no_more_than_alone(n, c, m, batch):
    assert pj(linear(n * batch, c, m)) / batch <= pj(linear(n, c, m)) * (1 + 1e-9)


@given(tokens=st.integers(0, 4000), share=st.floats(0, 1))
def test_no_token_is_lost_or_made_when_they_are_divided(tokens, share):
    mults, shifts = divide(tokens, (1 - share, share))
    assert mults + shifts == tokens and min(mults, shifts) >= 0


def test_an_expert_without_tokens_costs_nothing():
    found = energy("pvt_v2_b0", recipe="ours-quant-moe", mode="paper", shift_share=0.0)
    assert not any(layer.primitive == "shift" for layer in found.per_layer)


def test_the_first_of_the_best_tilings_is_taken():
    """The joint choice, slowly: energy and latency of every factorisation, in order."""
    n, c, m = 12, 10, 6
    best = _dumb(n, c, m)
    assert pj(linear(n, c, m)) == pytest.approx(best, rel=1e-12)


def _dumb(n: int, c: int, m: int) -> float:
    found = []
    for m0, m1, m2, m3 in _factors(m, 4):
        for c0, c1, c2 in _factors(c, 3):
            for n0, n3 in _factors(n, 2):
                fits = m0 <= 16 and m1 * c1 < 192 and c0 < 12 and m0 * c0 < 960 and n0 * c1 * c0 + n0 * m2 * m1 * m0 < 65536
                if not fits:
                    continue
                i, w, o = n * c, c * m, n * m
                words = 400 * (m3 * i + n3 * w + o) + 44.4 * (m3 * m2 * i + max(2 * (c2 - 1), 1) * o)
                words += 14.8 * (m3 * m2 * m1 * i + n3 * w) + 7.4 * max(c2 * (c1 - 1), 1) * o
                words += 7.4 * (n * c * m + max(2 * c2 * c1 * (c0 - 1), 1) * o) + 14.8 * n * c * m
                found.append((words + 3.7 * n * c * m, n3 * n0 * m3 * m2 * m0 * c2 * c0))
    energies, latencies = np.array(found).T
    merit = (energies - energies.min()) / energies.max() + (latencies - latencies.min()) / latencies.max()
    return float(energies[merit.argmin()])


def _factors(n: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(n,)]
    return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in _factors(n // d, parts - 1)]
