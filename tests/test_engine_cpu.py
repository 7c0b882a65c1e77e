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
from shiftaddvit.engine.bench_cpu import CpuPlan, _build, _spread
from shiftaddvit.engine.cpu import linear as linears
from shiftaddvit.engine.cpu import prepare
from shiftaddvit.engine.cpu.attention import LinearAttention, SoftmaxAttention
from shiftaddvit.engine.cpu.linear import Both, Dense, Integer, Partition, eight_bits, linear
from shiftaddvit.engine.cpu.mlp import BlockedConvMlp, ConvMlp, PlainMlp, RoutedMlp
from shiftaddvit.engine.cpu.onednn import OneDNN, onednn
from shiftaddvit.engine.weights import Preparation, projection
from shiftaddvit.errors import UserError
from shiftaddvit.layers.moe import MoEConfig, MoELinear
from shiftaddvit.layers.shift import ShiftConfig
from shiftaddvit.numerics.power_of_two import channel_offset, quantize_q
from shiftaddvit.reparam import Recipe

needs_onednn = pytest.mark.skipif(onednn() != OneDNN(True, True, True), reason="this torch has not all of oneDNN")
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


@pytest.mark.parametrize("recipe", ("pvt", "ours-quant-moe", "ours-quant-shift", "mlp-moe"))
def test_wide_models_equal_the_model(recipe: str):
    model = wide(recipe)
    assert error(engine_of(model)(images(3)), model(images(3)).detach()) < 1e-4


@needs_onednn
def test_every_fast_form_is_in_use():
    found = kinds(engine_of(wide("ours-quant-moe"))) | kinds(engine_of(dense("vit")))
    found |= kinds(engine_of(converted("pvt_v1", Recipe(mlp="moe", moe=MoEConfig(router="mlp")))))
    assert {LinearAttention, SoftmaxAttention, BlockedConvMlp, ConvMlp, PlainMlp, RoutedMlp} <= found


@pytest.mark.parametrize("family", ("pvt_v2", "pvt_v1", "vit"))
def test_without_onednn_the_engine_is_right_and_says_so(family: str, monkeypatch):
    for part in ("linear", "embed", "mlp", "attention"):
        monkeypatch.setattr(f"shiftaddvit.engine.cpu.{part}.onednn", lambda: OneDNN(False, False, False))
    model = converted(family, "ours-quant-moe")
    engine = engine_of(model)
    assert error(engine(images(3)), model(images(3)).detach()) < 1e-4
    assert all("oneDNN" not in runner.how for runner in engine.cpu_program.runners)
    assert "oneDNN without convolutions, blocked chains, 8-bit linears" in str(OneDNN(False, False, False))


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
    before = torch.get_num_threads(), torch.get_num_interop_threads(), torch.backends.quantized.engine, torch.is_grad_enabled()
    engine_of(wide(FOUR_BITS), int8=True)(images(2))
    assert before == (torch.get_num_threads(), torch.get_num_interop_threads(), torch.backends.quantized.engine, torch.is_grad_enabled())


def test_reload_renews_what_onednn_holds():
    for recipe, int8 in (("ours-quant-moe", False), (FOUR_BITS, True)):
        first, second = wide(recipe), randomised(sav.reparameterize(randomised(PyramidVisionTransformerV2(**WIDE)), recipe))
        engine = engine_of(first, int8=int8)
        engine.reload(second)
        assert torch.equal(engine(images(2)), engine_of(second, int8=int8)(images(2)))


def test_other_backends_run_the_ops_as_they_are():
    assert engine_of(dense("vit"), backend="reference").cpu_program is None
    assert engine_of(dense("vit"), dtype=torch.bfloat16).cpu_program is None
    assert engine_of(dense("vit"), backend="cpu").cpu_program is not None


# One linear at a time


@pytest.mark.parametrize("inputs, outputs", ((7, 5), (16, 40), (64, 100), (160, 480)))
@pytest.mark.parametrize("tokens", (1, 49, 63, 197))
@torch.no_grad()
def test_both_ways_of_a_mixture_equal_the_layer(inputs: int, outputs: int, tokens: int):
    for bias in (True, False):
        layer, made = mixture(inputs, outputs, bias)
        x, residual = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
        experts = tuple(Dense(w.t(), b) for w, b in zip(made.weight, linears.biases(made), strict=True))
        for way in (linears.narrow(made), Partition(made.router.t(), experts)):
            assert torch.allclose(way(x), layer(x), atol=1e-4), type(way)
            assert torch.allclose(way(x, residual), residual + layer(x), atol=1e-4), type(way)


@pytest.mark.parametrize("chosen", (0, 1))
@torch.no_grad()
def test_all_rows_may_go_to_one_expert(chosen: int):
    layer, made = mixture(64, 96)
    x = torch.rand(50, 64)
    layer.router.weight[chosen], layer.router.weight[1 - chosen] = 1.0, -1.0
    made.router.copy_(layer.router.weight)
    assert isinstance(linear(made), Partition) and isinstance(linears.narrow(made), Both)
    for way in (linear(made), linears.narrow(made)):
        assert torch.allclose(way(x), layer.experts[chosen](x), atol=1e-4)


@torch.no_grad()
def test_nan_stays_in_its_row_of_a_mixture():
    _, made = mixture(64, 96)
    x = torch.randn(20, 64)
    x[3, 5] = float("nan")
    for way in (linear(made), linears.narrow(made)):
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
    engine = engine_of(wide("ours-quant-shift"), int8=True)
    assert all("int8" not in runner.how for runner in engine.cpu_program.runners)
    assert error(engine(images(3)), wide("ours-quant-shift")(images(3)).detach()) < 1e-4


@pytest.mark.parametrize("more", (dict(dtype=torch.bfloat16), dict(backend="reference")))
def test_eight_bits_are_refused_where_they_cannot_run(more: dict):
    with pytest.raises(UserError, match="int8=True"):
        engine_of(dense("vit"), int8=True, **more)


def test_backend_cpu_is_refused_in_half_precision():
    with pytest.raises(UserError, match="backend 'cpu' computes in float32"):
        engine_of(dense("vit"), backend="cpu", dtype=torch.bfloat16)


def test_describe_names_the_libraries():
    text = engine_of(wide("ours-quant-moe")).describe()
    for part in ("computed by", "rows by expert", "both experts", torch.backends.cpu.get_cpu_capability()):
        assert part in text


# The benchmark


def test_contenders_are_checked_before_they_are_timed():
    plan = CpuPlan(threads=torch.get_num_threads())
    found, call = _build("engine ours-quant-moe", "pvt_v2_b0", 1, plan)
    assert found["status"] == "measured" and found["error"] < 1e-4 and call().shape == (1, 1000)
    found, _ = _build("timm eager", "pvt_v2_b0", 1, plan)
    assert found["status"] == "measured" and found["error"] == 0


def test_spread_is_the_quartiles():
    assert _spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.parametrize("wrong", (dict(batches=()), dict(batches=(0,)), dict(threads=0), dict(rounds=2), dict(minutes=0.0)))
def test_wrong_plans_are_refused(wrong: dict):
    with pytest.raises(UserError):
        CpuPlan(**wrong)
