"""The depthwise convolution and GELU kernel equals torch's layers in float64, on odd shapes and in every format."""

import pytest
import torch
import torch.nn.functional as F
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.conv_gelu import conv_gelu

BACKENDS = ("reference", "triton")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def exact(h, height, width, taps, shift):
    pictures = h.double().transpose(1, 2).reshape(h.shape[0], -1, height, width)
    y = F.conv2d(pictures, taps.double().t().reshape(-1, 1, 3, 3), shift.double(), padding=1, groups=h.shape[2])
    return F.gelu(y).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "height", "width", "channels"), [(1, 1, 1, 16), (2, 7, 7, 40), (3, 3, 5, 96), (1, 14, 14, 160), (1, 17, 9, 33), (1, 2, 56, 32)]
)
def test_it_is_the_depthwise_convolution_then_gelu(batch, height, width, channels, backend):
    h, taps, shift = random(batch, height * width, channels), random(9, channels), random(channels)
    with poisoned_outputs():
        y = conv_gelu(h, height, width, taps, shift, backend=backend)
    assert error(y, exact(h, height, width, taps, shift)) < 2e-6


def test_float16_in_the_interpreter_which_has_only_the_float32_form():
    h, taps, shift = random(2, 49, 64).half(), random(9, 64).half(), random(64)
    y = conv_gelu(h, 7, 7, taps, shift, backend="triton")
    assert y.dtype == torch.float16 and error(y, exact(h, 7, 7, taps, shift)) < 5e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_is_read_in_units_of_each_channel(backend):
    h = torch.randint(-127, 128, (2, 12, 32), dtype=torch.int8)
    scale, taps, shift = torch.rand(32) / 50, random(9, 32), random(32)
    assert error(conv_gelu(h, 3, 4, taps, shift, scale, backend=backend), exact(h * scale, 3, 4, taps, shift)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_among_its_neighbours_and_infinity_is_no_hang(backend):
    h = random(1, 25, 16)
    h[0, 0, 3], h[0, 24, 5] = float("nan"), float("inf")
    y = conv_gelu(h, 5, 5, torch.ones(9, 16), torch.zeros(16), backend=backend).reshape(5, 5, 16)
    assert y[:2, :2, 3].isnan().all() and y[2:, :, 3].isfinite().all() and y[..., 4].isfinite().all()
    assert not y[3:, 3:, 5].isfinite().any() and y[:3, :3, 5].isfinite().all()


def test_non_contiguous_and_empty_inputs():
    taps, shift = random(9, 16), random(16)
    h = random(2, 16, 12).transpose(1, 2)
    assert error(conv_gelu(h, 3, 4, taps, shift, backend="triton"), exact(h, 3, 4, taps, shift)) < 2e-6
    assert conv_gelu(random(0, 12, 16), 3, 4, taps, shift, backend="triton").shape == (0, 12, 16)


def test_opcheck_and_compile():
    args = random(2, 6, 32), 2, 3, random(9, 32), random(32)
    torch.library.opcheck(torch.ops.shiftaddvit.conv_gelu.default, (*args, None, False, "reference"))
    compiled = torch.compile(lambda h: conv_gelu(h, *args[1:]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(args[0]), conv_gelu(*args))


def test_mistakes_say_what_is_wrong():
    taps, shift = random(9, 16), random(16)
    with pytest.raises(UserError, match=r"h must be \(B, 2·3, C\)"):
        conv_gelu(random(1, 5, 16), 2, 3, taps, shift)
    with pytest.raises(UserError, match="h_scale goes with int8"):
        conv_gelu(random(1, 6, 16).to(torch.int8), 2, 3, taps, shift)
    with pytest.raises(UserError, match=r"conv_weight must be \(9, 16\)"):
        conv_gelu(random(1, 6, 16), 2, 3, random(9, 8), shift)
    with pytest.raises(UserError, match="must share one of"):
        conv_gelu(random(1, 6, 16).half(), 2, 3, taps, shift)
