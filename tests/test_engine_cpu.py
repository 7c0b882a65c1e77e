"""The engine on a CPU: its fast steps compute what the ops compute, with oneDNN and without, in float32 and with eight-bit inputs."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from engine_models import SIZE, converted, dense, images, randomised
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import nn

import shiftaddvit as sav
from shiftaddvit.engine import Engine, deploy, lower
from shiftaddvit.engine.bench_cpu import BASELINE, Contender, CpuPlan, _build, _contenders, _errors, _spread
from shiftaddvit.engine.cpu import linear as linears
from shiftaddvit.engine.cpu import prepare
from shiftaddvit.engine.cpu.attention import LinearAttention, SoftmaxAttention
from shiftaddvit.engine.cpu.linear import Both, Dense, Integer, Partition, Stacked, eight_bits, linear, routes
from shiftaddvit.engine.cpu.mlp import BlockedConvMlp, ConvMlp, PlainMlp, RoutedMlp
from shiftaddvit.engine.cpu.onednn import NONE, OneDNN, onednn
from shiftaddvit.engine.weights import Preparation, Projection, projection
from shiftaddvit.errors import UserError
from shiftaddvit.layers.moe import MoEConfig, MoELinear
from shiftaddvit.layers.shift import ShiftConfig
from shiftaddvit.numerics.power_of_two import channel_offset, quantize_q
from shiftaddvit.reparam import Recipe

needs_onednn = pytest.mark.skipif(not (onednn().convolutions and onednn().blocked and onednn().integers), reason="this torch has not all of oneDNN")
needs_bfloat16 = pytest.mark.skipif(not onednn().bfloat16, reason="this processor does not multiply bfloat16")
WITH_AVX2 = replace(onednn(), linears=False, bfloat16=False)
WIDE = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 96, 128), num_heads=(1, 2, 3, 2), mlp_ratios=(4, 4, 4, 2), sr_ratios=(4, 2, 1, 1), num_classes=7)
FOUR_BITS = Recipe(attention="linear", add="quant", attn_linear="shift", mlp="shift", shift=ShiftConfig(bits=4))
MIXTURE_OF_FOUR_BITS = replace(FOUR_BITS, attn_linear="moe", mlp="moe")


@cache
def wide(recipe: Recipe | str) -> nn.Module:
    """Wide enough for every form of the steps."""
    torch.manual_seed(0)
    return randomised(sav.reparameterize(randomised(PyramidVisionTransformerV2(**WIDE)), recipe))


@torch.no_grad()
def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest logit, of the worst image but one: codes and routes are decisions."""
    errors = ((y - expected).abs().amax(1) / expected.abs().max()).sort().values
    assert errors[-1] < 0.1
    return float(errors[-2])


def engine_of(model: nn.Module, **more) -> Engine:
    return deploy(model, device="cpu", image_size=more.pop("image_size", SIZE), **more)


def kinds(engine: Engine) -> set[type]:
    return {type(runner) for runner in engine.cpu_program.runners}


def mixture(inputs: int, outputs: int, bias: bool = True):
    torch.manual_seed(1)
    layer = randomised(MoELinear.from_linear(nn.Linear(inputs, outputs, bias=bias), MoEConfig()))
    return layer, projection(layer, "layer", Preparation(torch.float32, torch.device("cpu")))


def ways(made: Projection) -> tuple[Both, Stacked, Partition]:
    """A mixture in all of its forms."""
    router = routes(made.router, made.weight.dtype).t()
    experts = tuple(Dense.of(w, b) for w, b in zip(made.weight, linears.biases(made), strict=True))
    stacked = Stacked(Dense.of(*linears.stacked_experts(made)), made.weight.shape[1])
    return (Both(router, Dense.of(*linears.both_experts(made))), stacked, Partition(router, experts))


@pytest.mark.parametrize("have", (onednn(), WITH_AVX2), ids=("this processor", "AVX2"))
@pytest.mark.parametrize("recipe", ("pvt", "ours-quant-moe", "ours-quant-shift", "mlp-moe"))
def test_wide_models_equal_the_model(recipe: str, have: OneDNN, monkeypatch):
    pretend(monkeypatch, have)
    model = wide(recipe)
    assert error(engine_of(model)(images(3)), model(images(3)).detach()) < 1e-4


def pretend(monkeypatch, have: OneDNN) -> None:
    """As on a processor or with a torch that has this."""
    for part in ("linear", "embed", "mlp", "attention", "program"):
        monkeypatch.setattr(f"shiftaddvit.engine.cpu.{part}.onednn", lambda: have)


@needs_onednn
def test_every_fast_form_is_in_use(monkeypatch):
    pretend(monkeypatch, WITH_AVX2)
    found = kinds(engine_of(wide("ours-quant-moe"))) | kinds(engine_of(dense("vit")))
    found |= kinds(engine_of(converted("pvt_v1", Recipe(mlp="moe", moe=MoEConfig(router="mlp")))))
    assert {LinearAttention, SoftmaxAttention, BlockedConvMlp, ConvMlp, PlainMlp, RoutedMlp} <= found


@pytest.mark.parametrize("family", ("pvt_v2", "pvt_v1", "vit"))
def test_without_onednn_the_engine_is_right_and_says_so(family: str, monkeypatch):
    pretend(monkeypatch, NONE)
    model = converted(family, "ours-quant-moe")
    engine = engine_of(model)
    assert error(engine(images(3)), model(images(3)).detach()) < 1e-4
    assert all("oneDNN" not in runner.how for runner in engine.cpu_program.runners)
    assert str(NONE).startswith("oneDNN without convolutions, blocked chains, 8-bit linears, prepared linears, bfloat16")


def test_pictures_of_odd_sizes():
    model = wide("ours-quant-moe")
    x = torch.randn(3, 3, 36, 100, generator=torch.Generator().manual_seed(2))
    assert error(engine_of(model, image_size=(36, 100))(x), model(x).detach()) < 1e-4


def test_pictures_may_lie_anyhow_in_memory():
    engine, x = engine_of(wide("ours-quant-moe")), images(4)
    expected = engine(x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, dim=0)[::2], x.flip(3).contiguous().flip(3)):
        assert (engine(other) - expected).abs().max() < 1e-5


def test_empty_batch_gives_no_logits():
    assert engine_of(wide("ours-quant-moe"))(images(0)).shape == (0, 7)
    assert engine_of(wide(FOUR_BITS), int8=True)(images(0)).shape == (0, 7)


def test_images_in_parts_give_the_same_logits():
    program, x = lower(wide("ours-quant-moe"), image_size=SIZE), images(5)
    together = prepare(program)
    assert together.images >= 5
    assert (together.run(x) - replace(together, images=2).run(x)).abs().max() < 1e-5


def test_settings_of_torch_are_left_alone():
    before = (torch.get_num_threads(), torch.get_num_interop_threads(), torch.backends.quantized.engine, torch.is_grad_enabled())
    engine_of(wide(FOUR_BITS), int8=True)(images(2))
    assert before == (torch.get_num_threads(), torch.get_num_interop_threads(), torch.backends.quantized.engine, torch.is_grad_enabled())


def test_reload_renews_what_onednn_holds():
    for recipe, int8 in (("ours-quant-moe", False), (FOUR_BITS, True)):
        first, second = (wide(recipe), randomised(sav.reparameterize(randomised(PyramidVisionTransformerV2(**WIDE)), recipe)))
        engine = engine_of(first, int8=int8)
        engine.reload(second)
        assert torch.equal(engine(images(2)), engine_of(second, int8=int8)(images(2)))


def test_other_backends_run_the_ops_as_they_are():
    assert engine_of(dense("vit"), backend="reference").cpu_program is None
    assert engine_of(dense("vit"), dtype=torch.float16).cpu_program is None
    assert (engine_of(dense("vit"), dtype=torch.bfloat16).cpu_program is not None) == onednn().bfloat16
    assert engine_of(dense("vit"), backend="cpu").cpu_program is not None


# One linear at a time


@pytest.mark.parametrize("inputs, outputs", ((7, 5), (16, 40), (64, 100), (160, 480)))
@pytest.mark.parametrize("tokens", (1, 49, 63, 197))
@torch.no_grad()
def test_all_ways_of_a_mixture_equal_the_layer(inputs: int, outputs: int, tokens: int):
    for bias in (True, False):
        layer, made = mixture(inputs, outputs, bias)
        x, residual = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
        for way in ways(made):
            assert torch.allclose(way(x), layer(x), atol=1e-4), type(way)
            assert torch.allclose(way(x, residual), residual + layer(x), atol=1e-4), type(way)


@pytest.mark.parametrize("chosen", (0, 1))
@torch.no_grad()
def test_all_rows_may_go_to_one_expert(chosen: int):
    layer, made = mixture(64, 96)
    x = torch.rand(50, 64)
    layer.router.weight[chosen], layer.router.weight[1 - chosen] = 1.0, -1.0
    made.router.copy_(layer.router.weight)
    for way in ways(made):
        assert torch.allclose(way(x), layer.experts[chosen](x), atol=1e-4)


@torch.no_grad()
def test_nan_stays_in_its_row_of_a_mixture():
    _, made = mixture(64, 96)
    x = torch.randn(20, 64)
    x[3, 5] = float("nan")
    for way in ways(made):
        y = way(x)
        assert y[3].isnan().all() and y[torch.arange(20) != 3].isfinite().all()


# Eight bits


def four_bits(outputs: int, inputs: int) -> torch.Tensor:
    torch.manual_seed(3)
    weight = torch.randn(outputs, inputs)
    return quantize_q(weight, bits=4, offset=channel_offset(weight))


def test_codes_of_four_bits_are_exact_in_eight():
    weight = four_bits(40, 33)
    weight[7] = 0
    values, scale = eight_bits(weight)
    assert values.abs().max() == 64 and torch.equal(values * scale.unsqueeze(1), weight)
    gamma = torch.rand(40, 1) + 0.1  # LayerScale in the projection keeps the codes
    assert eight_bits(weight * gamma) is not None


def test_other_weights_are_not_taken_for_exact():
    torch.manual_seed(0)
    weight = torch.randn(40, 33)
    assert eight_bits(weight) is None
    assert eight_bits(quantize_q(weight, bits=5, offset=channel_offset(weight))) is None


@needs_onednn
@pytest.mark.parametrize("tokens, inputs, outputs", ((1, 33, 96), (49, 256, 100), (197, 160, 480), (63, 1000, 96)))
@torch.no_grad()
def test_integer_linear_errs_only_by_rounding_its_input(tokens: int, inputs: int, outputs: int):
    layer = nn.Linear(inputs, outputs)
    layer.weight.copy_(four_bits(outputs, inputs))
    made = linear(projection(layer, "layer", Preparation(torch.float32, torch.device("cpu"))), int8=True)
    assert isinstance(made, Integer)
    x, residual = torch.randn(tokens, inputs) * 3, torch.randn(tokens, outputs)
    unit = float(x.abs().max()) / 127
    rounded = (torch.add(torch.tensor(128.5), x, alpha=1 / unit).floor().double() - 128) * unit
    assert (rounded - x).abs().max() < 0.501 * unit
    expected = rounded @ layer.weight.double().t() + layer.bias + residual
    assert (made(x, residual) - expected).abs().max() < 2e-5 * expected.abs().max()


@needs_onednn
@torch.no_grad()
def test_integer_linear_of_zeros_infinity_and_nan():
    layer = nn.Linear(16, 96)
    layer.weight.copy_(four_bits(96, 16))
    made = linear(projection(layer, "layer", Preparation(torch.float32, torch.device("cpu"))), int8=True)
    assert torch.equal(made(torch.zeros(3, 16)), layer.bias.expand(3, -1))
    for value in (float("nan"), float("inf")):
        assert made(torch.full((3, 16), value)).isnan().all()


@needs_onednn
@pytest.mark.parametrize("recipe", (FOUR_BITS, MIXTURE_OF_FOUR_BITS))
@torch.no_grad()
def test_eight_bit_engine_is_near_the_model_and_independent_of_batch_mates(recipe: Recipe):
    model, x = wide(recipe), images(4)
    engine = engine_of(model, int8=True)
    assert "oneDNN int8" in engine.describe()
    y, expected = engine(x), model(x)
    assert 1e-5 < float((y - expected).norm() / expected.norm()) < 5e-2
    assert torch.equal(y[[2, 0]], engine(x[[2, 0]]))


def test_eight_bit_engine_leaves_weights_of_five_bits_in_float32():
    with pytest.warns(UserWarning, match="int8=True changes nothing here"):
        engine = engine_of(wide("ours-quant-shift"), int8=True)
    assert all("int8" not in runner.how for runner in engine.cpu_program.runners)
    assert error(engine(images(3)), wide("ours-quant-shift")(images(3)).detach()) < 1e-4


@pytest.mark.parametrize("more", (dict(dtype=torch.bfloat16), dict(backend="reference")))
def test_eight_bits_are_refused_where_they_cannot_run(more: dict):
    with pytest.raises(UserError, match="int8=True"):
        engine_of(dense("vit"), int8=True, **more)


def test_backend_cpu_is_refused_in_half_precision(monkeypatch):
    with pytest.raises(UserError, match="backend 'cpu' computes in float32"):
        engine_of(dense("vit"), backend="cpu", dtype=torch.float16)
    pretend(monkeypatch, WITH_AVX2)
    with pytest.raises(UserError, match="backend 'cpu' computes in float32 and, on processors that multiply it, bfloat16"):
        engine_of(dense("vit"), backend="cpu", dtype=torch.bfloat16)


# bfloat16


@needs_bfloat16
@torch.no_grad()
def test_a_router_in_two_parts_chooses_as_in_float32():
    generator = torch.Generator().manual_seed(5)
    a, router = (torch.randn(20000, 64, generator=generator).bfloat16(), torch.randn(2, 64, generator=generator))
    exact = a.double() @ (router[1] - router[0]).double()
    split, plain = (a @ routes(router, torch.bfloat16).t(), a @ (router[1] - router[0]).bfloat16())
    wrong = (linears.second(split) != (exact > 0)).sum()
    assert wrong <= 2 and 10 * wrong < ((plain > 0) != (exact > 0)).sum()


@needs_bfloat16
@torch.no_grad()
def test_mixtures_in_bfloat16_err_by_rounding_only():
    for inputs, outputs in ((16, 40), (64, 100), (160, 96)):
        layer, _ = mixture(inputs, outputs)
        made = projection(layer, "layer", Preparation(torch.bfloat16, torch.device("cpu")))
        x, residual = (torch.randn(63, inputs).bfloat16(), torch.randn(63, outputs).bfloat16())
        expected = residual.float() + layer(x.float())
        for way in ways(made):
            y = way(x, residual.clone())
            assert y.dtype == torch.bfloat16 and (y.float() - expected).norm() < 6e-3 * expected.norm(), type(way)


@needs_bfloat16
@pytest.mark.parametrize(
    "family, recipe", (("vit", "ours-quant-shift"), ("pvt_v1", "ours-quant-moe"), ("pvt_v2", "ours-quant-moe"), ("pvt_v2", "pvt"))
)
@torch.no_grad()
def test_bfloat16_is_as_near_as_autocast(family: str, recipe: str):
    model, x = (wide(recipe) if family == "pvt_v2" else converted(family, recipe), images(16))
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        own = (model(x).float() - exact).norm() / exact.norm()
    engine = engine_of(model, dtype=torch.bfloat16)
    y = engine(x)
    assert y.dtype == torch.float32 and (y - exact).norm() / exact.norm() <= max(1e-2, 2 * float(own))
    assert "products in bfloat16" in engine.describe()


def test_describe_names_the_libraries():
    text = engine_of(wide("ours-quant-moe")).describe()
    for part in ("computed by", "rows by expert", "both experts", torch.backends.cpu.get_cpu_capability()):
        assert part in text


# The benchmark


def test_contenders_are_checked_before_they_are_timed():
    plan = CpuPlan(threads=torch.get_num_threads())
    found, call = _build(Contender("engine", "ours-quant-moe"), "pvt_v2_b0", 1, plan)
    assert found["status"] == "measured" and found["error"] < 1e-4 and call().shape == (1, 1000)
    found, _ = _build(BASELINE, "pvt_v2_b0", 1, plan)
    assert found["status"] == "measured" and found["error"] == 0


def test_wrong_logits_are_told_from_rounded_ones():
    exact = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert _errors(exact + 1e-6, exact, lambda: exact, torch.float32)["status"] == "measured"
    assert _errors(exact + 1e-2, exact, lambda: exact, torch.float32)["status"] == "wrong"
    assert _errors(exact * 1.009, exact, lambda: exact, torch.bfloat16)["status"] == "measured"
    assert _errors(exact * 1.02, exact, lambda: exact, torch.bfloat16)["status"] == "wrong"
    assert _errors(exact * 1.02, exact, lambda: exact * 1.011, torch.bfloat16)["status"] == "measured"
    assert _errors(exact * float("nan"), exact, lambda: exact, torch.bfloat16)["status"] == "wrong"


def test_contenders_have_names_of_their_own():
    names = [str(contender) for contender in _contenders(CpuPlan())]
    assert names[0] == "timm eager" and len(set(names)) == len(names)
    assert {"timm eager bfloat16", "timm compiled bfloat16", "engine dense", "engine ours-quant-moe bfloat16"} <= set(names)
    assert not [name for name in map(str, _contenders(CpuPlan(dtypes=("bfloat16",), compiled=False))) if "compiled" in name]


def test_spread_is_the_quartiles():
    assert _spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.parametrize(
    "wrong", (dict(batches=()), dict(batches=(0,)), dict(threads=0), dict(rounds=2), dict(minutes=0.0), dict(dtypes=()), dict(dtypes=("float16",)))
)
def test_wrong_plans_are_refused(wrong: dict):
    with pytest.raises(UserError):
        CpuPlan(**wrong)
