"""Numerics: parity with the published implementations, exact values, and the gradients that training relies on."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from shiftaddvit.numerics import binarize, binary_threshold, exponent_range, fixed_point, quantize_ps, quantize_q
from shiftaddvit.numerics.hashing import _descend, hash_codes, kernel_features, similarity_targets, squared_distances, train_hash
from shiftaddvit.numerics.power_of_two import channel_offset, nearest_exponent, power_of_two

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
finite = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32, allow_subnormal=False)


def golden(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def is_power_of_two_or_zero(weight: torch.Tensor) -> bool:
    mantissa, _ = torch.frexp(weight[weight != 0].abs())
    return bool((mantissa == 0.5).all())


def test_ps_equals_the_published_layer_in_value_and_gradients():
    data = golden("deepshift_ps")
    x, shift, sign, bias = (data[key].clone().requires_grad_() for key in ("x", "shift", "sign", "bias"))
    y = linear(fixed_point(x), quantize_ps(shift, sign, bits=5), fixed_point(bias))
    y.backward(data["grad_y"])
    for name, actual in (("y", y), ("grad_x", x.grad), ("grad_shift", shift.grad), ("grad_sign", sign.grad), ("grad_bias", bias.grad)):
        close(actual.detach(), data[name])


def test_q_equals_the_published_layer_in_value_and_gradients():
    data = golden("deepshift_q")
    x, weight, bias = (data[key].clone().requires_grad_() for key in ("x", "weight", "bias"))
    y = linear(fixed_point(x), quantize_q(weight, bits=5, published_range=True), fixed_point(bias))
    y.backward(data["grad_y"])
    for name, actual in (("y", y), ("grad_x", x.grad), ("grad_weight", weight.grad), ("grad_bias", bias.grad)):
        close(actual.detach(), data[name])


@pytest.mark.parametrize(("bits", "low"), [(2, 0), (3, -2), (4, -6), (5, -14), (6, -30)])
def test_exponent_range_leaves_a_code_for_zero(bits, low):
    assert exponent_range(bits) == (low, 0)
    # one sign bit; the other states hold zero and every exponent
    assert 1 + (0 - low + 1) == 2 ** (bits - 1)
    assert exponent_range(bits, published_q=True) == (low - 1, 0)


@pytest.mark.parametrize("bits", [1, 7])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be from 2 to 6"):
        exponent_range(bits)


def test_power_of_two_is_exact_over_the_whole_range():
    exponents = torch.arange(-126, 128)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-126, 128)]


@given(st.lists(finite, min_size=1, max_size=20), st.sampled_from([4, 5]), st.sampled_from(["log", "value"]))
def test_every_quantised_weight_is_zero_or_a_signed_power_of_two(values, bits, rounding):
    weight = torch.tensor([values], dtype=torch.float32)
    low, high = exponent_range(bits)
    for offset in (None, channel_offset(weight, rounding)):
        shift = 0 if offset is None else int(offset)
        quantised = quantize_q(weight, bits, rounding, offset)
        assert is_power_of_two_or_zero(quantised)
        assert torch.equal(torch.sign(quantised), torch.sign(weight))
        magnitudes = quantised[quantised != 0].abs()
        assert ((magnitudes >= 2.0 ** (low + shift)) & (magnitudes <= 2.0 ** (high + shift))).all()


@given(st.floats(min_value=2.0**-14, max_value=1.0, width=32), st.sampled_from(["log", "value"]))
def test_ps_and_q_agree_on_an_inherited_weight(value, rounding):
    weight = torch.tensor([[value, -value]])
    q = quantize_q(weight, 5, rounding)
    # log2 is not exact at the switch itself
    boundary = math.sqrt(2) if rounding == "log" else 1.5
    mantissa = 2 * math.frexp(value)[0]
    if abs(mantissa - boundary) > 1e-5:
        assert torch.equal(quantize_ps(weight.abs().log2(), weight.sign(), 5, rounding), q)


@given(st.floats(min_value=2.0**-14, max_value=1.0, width=32))
def test_value_rounding_is_nearest_in_value_and_log_rounding_in_the_logarithm(value):
    weight = torch.tensor([[value]])
    powers = 2.0 ** torch.arange(-14.0, 1.0, dtype=torch.float64)
    nearest = float((powers - value).abs().min())
    assert abs(float(quantize_q(weight, 5, "value")) - value) == pytest.approx(nearest, rel=1e-6, abs=1e-12)
    distance = float((powers.log2() - math.log2(value)).abs().min())
    assert abs(math.log2(float(quantize_q(weight, 5, "log"))) - math.log2(value)) == pytest.approx(distance, abs=1e-6)


@pytest.mark.parametrize(("rounding", "switch"), [("log", math.sqrt(2)), ("value", 1.5)])
def test_rounding_switches_at_its_own_point(rounding, switch):
    below, above = torch.tensor([[0.125 * switch * (1 - 1e-6)]]), torch.tensor([[0.125 * switch * (1 + 1e-6)]])
    assert quantize_q(below, 5, rounding).item() == 0.125 and quantize_q(above, 5, rounding).item() == 0.25
    one = torch.ones(1, 1)
    assert quantize_ps(below.log2() - 1e-5, one, 5, rounding).item() == 0.125
    assert quantize_ps(above.log2() + 1e-5, one, 5, rounding).item() == 0.25


def test_zeros_stay_zero_and_are_no_small_power():
    assert quantize_q(torch.tensor([[0.0, -0.0, 1e-9]]), 5).tolist() == [[0.0, 0.0, 2.0**-14]]
    signs = torch.tensor([[0.0, 0.5, -0.5, 0.51, -3.0]])
    assert quantize_ps(torch.zeros(1, 5), signs, 5).tolist() == [[0.0, 0.0, 0.0, 1.0, -1.0]]


def test_nan_is_not_hidden():
    nan = torch.tensor([[math.nan, 1.0]])
    one = torch.ones(1, 2)
    for weight in (quantize_q(nan), quantize_ps(nan, one), quantize_ps(one, nan), fixed_point(nan)):
        assert weight.isnan().tolist() == [[True, False]]
    assert binarize(nan, torch.tensor(0.0)).isnan().tolist() == [[True, False]]


def test_channel_offset_puts_each_rows_largest_weight_at_exponent_zero():
    weight = torch.tensor([[5.0, 0.3], [0.01, -0.02], [0.0, 0.0]])
    offset = channel_offset(weight)
    assert offset.tolist() == [[2], [-6], [0]]
    assert quantize_q(weight, 5, offset=offset).tolist() == [[4.0, 0.25], [2.0**-7, -(2.0**-6)], [0.0, 0.0]]
    assert quantize_q(weight, 5)[0, 0] == 1.0  # saturates without


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1.2e-38, 1e-36, 1e-34, 3e38])
def test_rows_of_extreme_weights_stay_finite(largest):
    """Pre-trained models have dead channels whose weights decayed to denormal numbers."""
    weight = torch.tensor([[largest, -largest / 3, 0.0]])
    offset = channel_offset(weight)
    for quantised in (quantize_q(weight, 5, offset=offset), quantize_ps(torch.full((1, 3), -14.0), weight.sign(), 5, offset=offset)):
        assert quantised.isfinite().all() and is_power_of_two_or_zero(quantised)
        assert torch.equal(quantised.sign(), weight.sign())
    assert quantize_q(weight, 5, offset=offset).abs().max() <= max(2 * largest, 1e-25)


def test_ps_gradients_are_g_w_ln2_and_g():
    shift = torch.tensor([[-1.2, -3.0, 4.0, -20.0]], requires_grad=True)
    sign = torch.tensor([[1.0, -2.0, 0.2, -0.9]], requires_grad=True)
    grad = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    weight = quantize_ps(shift, sign, 5)
    weight.backward(grad)
    assert weight.tolist() == [[0.5, -0.125, 0.0, -(2.0**-14)]]
    torch.testing.assert_close(shift.grad, grad * weight.detach() * math.log(2))
    assert torch.equal(sign.grad, grad)  # straight through, also where the clamp bites


def test_q_gradient_passes_straight_through():
    weight = torch.tensor([[3.0, 0.0, -1e-9, 0.3]], requires_grad=True)
    grad = torch.randn(1, 4)
    quantize_q(weight, 5, offset=torch.tensor([[1]], dtype=torch.int32)).backward(grad)
    assert torch.equal(weight.grad, grad)


@given(finite)
def test_fixed_point_is_the_published_formula(value):
    step, limit = 2.0**-16, 2.0**15
    expected = np.clip(np.floor(np.float32(value) / np.float32(step)) * np.float32(step), -limit, np.float32(limit - step))
    assert fixed_point(torch.tensor(value, dtype=torch.float32)).item() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fixed_point_does_not_overflow_in_half_precision(dtype):
    x = torch.tensor([0.75, -1.5, 100.0, 30000.0], dtype=dtype, requires_grad=True)
    y = fixed_point(x)
    y.sum().backward()
    assert y.dtype == dtype and torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones_like(x))


def test_binarize_compares_with_its_threshold_and_knows_both_codes():
    x = torch.tensor([[[[0.2, 0.4, 0.6]]]])
    threshold = binary_threshold(x, "token")
    assert binarize(x, threshold).tolist() == [[[[0.0, 0.0, 1.0]]]]
    assert binarize(x, threshold, "plus-minus").tolist() == [[[[-1.0, -1.0, 1.0]]]]


def test_gradient_window_is_about_the_threshold_or_as_published_about_the_value():
    values, threshold = torch.tensor([-0.6, -0.1, 0.0, 0.5, 1.0, 1.2, 1.6]), torch.tensor(0.5)
    for published, open_ in ((False, [0, 1, 1, 1, 1, 1, 0]), (True, [0, 0, 1, 1, 1, 0, 0])):
        x = values.clone().requires_grad_()
        binarize(x, threshold, published_window=published).sum().backward()
        assert x.grad.tolist() == open_
    x = values.clone().requires_grad_()
    binarize(x, threshold, "plus-minus").sum().backward()
    assert x.grad.tolist() == [0, 2, 2, 2, 2, 2, 0]  # the step is twice as high


def test_no_gradient_reaches_the_threshold():
    x = torch.randn(2, 2, 3, 4, requires_grad=True)
    binarize(x, binary_threshold(x, "token")).sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("rule", ["token", "zero"])
def test_default_thresholds_look_at_one_token_only(rule):
    x = torch.randn(3, 2, 5, 8)
    codes = binarize(x, binary_threshold(x, rule))
    alone = x[1:2, :, 2:3]
    assert torch.equal(binarize(alone, binary_threshold(alone, rule)), codes[1:2, :, 2:3])
    assert binary_threshold(x, "tensor").numel() == 1


def test_unknown_threshold_and_codes_are_named():
    with pytest.raises(ValueError, match="'median'"):
        binary_threshold(torch.zeros(1, 1, 1, 1), "median")
    with pytest.raises(ValueError, match="'two'"):
        binarize(torch.zeros(1), torch.zeros(()), "two")


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
def test_squared_distances_equal_the_materialised_difference(seed, tokens, anchors):
    generator = torch.Generator().manual_seed(seed)
    x, a = torch.randn(2, 3, tokens, 4, generator=generator), torch.randn(1, 3, anchors, 4, generator=generator)
    plain = (x.unsqueeze(-2) - a.unsqueeze(-3)).square().sum(-1)
    torch.testing.assert_close(squared_distances(x, a), plain, rtol=1e-4, atol=1e-4)


def test_hash_training_equals_the_published_one():
    data = golden("ksh")
    features = kernel_features(data["x"], data["anchor"])
    mean = features.mean(dim=(0, 2), keepdim=True)
    close(mean, data["mvec"])
    assert torch.equal(similarity_targets(data["x"], data["x"], 10).to(torch.int8), data["similarity"])
    directions = train_hash(features - mean, data["similarity"], data["A_init"])
    close(directions, data["A_trained"])
    assert torch.equal(hash_codes(features - mean, directions), data["codes"])


def test_hash_training_keeps_a_bit_only_where_hard_signs_agree_better():
    """The published case keeps none of its bits (100 small steps flip too few signs), so a larger step is tried here."""
    data = golden("ksh")
    features = kernel_features(data["x"], data["anchor"])
    features = features - features.mean(dim=(0, 2), keepdim=True)
    directions = train_hash(features, data["similarity"], data["A_init"], learning_rate=50.0)
    changed = (directions != data["A_init"]).flatten(2).any(-1).any(0)
    assert changed.any()
    remaining, bits = 16 * data["similarity"].float(), 16

    def loss(a: torch.Tensor) -> float:
        y = torch.where((features @ a.unsqueeze(-1)).squeeze(-1) > 0, 1.0, -1.0)
        return -torch.einsum("bhi,bhij,bhj->", y, remaining, y).item()

    for bit in range(bits):
        if changed[bit]:
            assert loss(directions[:, bit]) < loss(data["A_init"][:, bit])
        y = torch.where((features @ directions[:, bit].unsqueeze(-1)).squeeze(-1) > 0, 1.0, -1.0)
        remaining = remaining - y.unsqueeze(-1) * y.unsqueeze(-2)


def test_written_out_hash_gradient_equals_autograd():
    torch.manual_seed(0)
    batch, heads, tokens, anchors, bits = 2, 3, 7, 5, 4
    features, start = torch.randn(batch, heads, tokens, anchors), torch.randn(heads, anchors)
    targets = torch.randn(batch, heads, tokens, tokens)  # not symmetric
    direction = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([direction], lr=0.3, momentum=0.9, nesterov=True)
    for _ in range(5):
        y = 2 * torch.sigmoid((features @ direction.unsqueeze(-1)).squeeze(-1)) - 1
        loss = -torch.einsum("bhi,bhij,bhj->bh", y, targets, y).mean() / (tokens * bits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(_descend(features, targets, start, bits, 5, 0.3, 0.9), direction.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 5, 30])
def test_targets_and_features_work_with_few_tokens(tokens):
    x = torch.randn(2, 2, tokens, 4)
    targets = similarity_targets(x, x, 10)
    top = max(1, min(10, tokens // 2))
    assert ((targets == 1).sum(-1) == top).all()
    features = kernel_features(x, torch.randn(1, 2, 25, 4))
    assert train_hash(features, targets, torch.randn(2, 3, 25), steps=3).isfinite().all()


def test_identical_tokens_do_not_divide_by_zero():
    x = torch.ones(1, 1, 4, 3)
    assert kernel_features(x, torch.ones(1, 1, 2, 3)).isfinite().all()


@pytest.mark.parametrize("plus_minus", [False, True])
def test_hash_codes_have_two_values_and_the_gradient_of_the_sigmoid(plus_minus):
    torch.manual_seed(0)
    features, directions = torch.randn(1, 2, 6, 5, requires_grad=True), torch.randn(2, 3, 5)
    codes = hash_codes(features, directions, plus_minus)
    assert set(codes.unique().tolist()) == ({-1.0, 1.0} if plus_minus else {0.0, 1.0})
    weights = torch.randn_like(codes)
    (gradient,) = torch.autograd.grad((codes * weights).sum(), features)
    soft = torch.sigmoid(features @ directions.transpose(-2, -1)) * (2 if plus_minus else 1)
    (expected,) = torch.autograd.grad((soft * weights).sum(), features)
    torch.testing.assert_close(gradient, expected)


def test_nearest_exponent_of_zero_is_below_every_range():
    assert nearest_exponent(torch.zeros(1)).item() == -127
