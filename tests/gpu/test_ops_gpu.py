"""The Triton kernels on a real GPU: every op against its reference in float32 or float64, at the sizes of the models and odd ones."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ops_checks import error, poisoned_outputs, random_codes

from shiftaddvit.ops.adder import adder_linear
from shiftaddvit.ops.conv_gelu import conv_gelu
from shiftaddvit.ops.expert_sums import expert_sums
from shiftaddvit.ops.layer_norm import layer_norm
from shiftaddvit.ops.linear_attention import attention_encode, attention_mix
from shiftaddvit.ops.matadd import key_value, pack_codes, query_context
from shiftaddvit.ops.matshift import formats, matshift, matshift_int8
from shiftaddvit.ops.moe_linear import moe_linear, routed_linear
from shiftaddvit.ops.moe_train import moe_train
from shiftaddvit.ops.norm_linear import norm_linear
from shiftaddvit.ops.patch_embed import patch_embed
from shiftaddvit.ops.softmax_attention import softmax_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 5e-6}
DTYPES = tuple(TOLERANCE)
SHAPES = ((1, 32, 256), (49, 256, 1024), (63, 160, 640), (197, 192, 576), (3136, 64, 512), (100, 2048, 512), (784, 1024, 128), (50, 72, 33))


@pytest.fixture(autouse=True)
def exact_float32():
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bits", [0, 4, 5])
def test_matshift(bits, tokens, inputs, outputs, dtype):
    codes = random_codes(outputs, inputs, bits or 5).cuda()
    offset = torch.randint(-3, 3, (outputs, 1), device="cuda")
    weight = formats.pack(codes, bits) if bits else formats.decode(codes, 5, dtype=torch.float16 if dtype == torch.float32 else dtype)
    scale, bias, x = formats.channel_scale(offset, outputs), normal(outputs), normal(tokens, inputs, dtype=dtype)
    with poisoned_outputs():
        y = matshift(x, weight, bias, scale, bits, "gelu")
    exact = torch.nn.functional.gelu(x.double() @ formats.decode(codes, bits or 5, offset).double().t() + bias.double())
    assert error(y, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
def test_integers_are_the_same_on_gpu_and_cpu(tokens, inputs, outputs):
    weight, w_scale = formats.decode_int8(random_codes(outputs, inputs, 4))
    x = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8)
    one = torch.ones(1)
    with poisoned_outputs():
        y = matshift_int8(x.cuda(), one.cuda(), weight.cuda(), w_scale.cuda())
    assert torch.equal(y.cpu(), matshift_int8(x, one, weight, w_scale))
    rounded = matshift_int8(x.cuda(), one.cuda(), weight.cuda(), w_scale.cuda(), None, one.cuda() * 30)
    assert torch.equal(rounded.cpu(), matshift_int8(x, one, weight, w_scale, None, one * 30))


def routed_apart(a, router, dtype):
    """Rows that rounding them to `dtype` does not send to the other expert: errors of half a unit in the last place each, six deviations."""
    difference = (router[1] - router[0]).double()
    deviation = torch.finfo(dtype).eps / 2 / 3**0.5 * (a.double() * difference).norm(dim=-1)
    return (a.double() @ difference).abs() > 6 * deviation + 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
def test_norm_linear(tokens, inputs, outputs, experts, dtype):
    x, norm = normal(tokens, inputs, dtype=dtype) * 2 + 1, (normal(inputs) + 1, normal(inputs))
    weight, bias = normal(experts, outputs, inputs, dtype=dtype, scale=inputs**-0.5), normal(experts, outputs)
    router = normal(2, inputs) if experts == 2 else None
    with poisoned_outputs():
        y, _ = norm_linear(x, weight, bias, norm, 1e-6, router, activation="gelu")
    expected = reference_norm_linear(x, weight, bias, norm, router)
    keep = slice(None)
    if experts == 2:
        keep = routed_apart(torch.nn.functional.layer_norm(x.float(), (inputs,), *norm, 1e-6), router, dtype)
    assert error(y[keep], expected[keep]) < 2 * TOLERANCE[dtype]


def reference_norm_linear(x, weight, bias, norm, router):
    a = torch.nn.functional.layer_norm(x.double(), x.shape[-1:], norm[0].double(), norm[1].double(), 1e-6)
    return torch.nn.functional.gelu(pick(a, weight, bias, router))


def pick(a, weight, bias, router):
    y = torch.einsum("...k,enk->...en", a, weight.double()) + bias.double()
    if router is None:
        return y[..., 0, :]
    second = (a @ router[1].double() > a @ router[0].double()).unsqueeze(-1)
    return torch.where(second, y[..., 1, :], y[..., 0, :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "height", "width", "channels"), [(3, 7, 7, 1024), (2, 14, 14, 640), (2, 56, 56, 256), (1, 5, 9, 33), (40, 28, 28, 512)])
def test_conv_gelu(batch, height, width, channels, dtype):
    h = normal(batch, height * width, channels, dtype=dtype)
    taps, shift = normal(9, channels, dtype=dtype, scale=0.3), normal(channels)
    pictures = h.double().transpose(1, 2).reshape(batch, channels, height, width)
    y = torch.nn.functional.conv2d(pictures, taps.double().t().reshape(-1, 1, 3, 3), shift.double(), padding=1, groups=channels)
    expected = torch.nn.functional.gelu(y).flatten(2).transpose(1, 2)
    with poisoned_outputs():
        y = conv_gelu(h, height, width, taps, shift)
    # float16 is also summed and activated in float16: nine roundings of 2^-11, and tanh's own.
    assert error(y, expected) < (3e-3 if dtype == torch.float16 else 2 * TOLERANCE[dtype])
    if channels % 16 == 0:
        scale = torch.rand(channels, device=h.device) / 50
        bytes_ = torch.randint(-127, 128, h.shape, dtype=torch.int8, device=h.device)
        real = conv_gelu((bytes_ * scale).float(), height, width, taps.float(), shift)
        assert error(conv_gelu(bytes_, height, width, taps, shift, scale), real) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 256), (160, 640), (640, 160), (1024, 256)])
def test_norm_linear_between_bfloat16_and_float16(inputs, outputs, experts):
    x, weight = normal(300, inputs, dtype=torch.bfloat16), normal(experts, outputs, inputs, dtype=torch.float16, scale=inputs**-0.5)
    residual, router = normal(300, outputs, dtype=torch.bfloat16), normal(2, inputs) if experts == 2 else None
    expected = pick(x.double(), weight, torch.zeros(experts, outputs, device=x.device), router)
    keep = routed_apart(x, router, torch.float16) if experts == 2 else slice(None)
    with poisoned_outputs():
        h, y = (norm_linear(x, weight, router=router, residual=r)[0] for r in (None, residual))
    assert h.dtype == torch.float16 and error(h[keep], expected[keep]) < 1e-3
    assert y.dtype == torch.bfloat16 and error(y[keep], (expected + residual.double())[keep]) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(("tokens", "width", "heads"), [(3136, 32, 1), (784, 64, 2), (196, 160, 5), (196, 320, 5), (197, 192, 3), (1, 64, 1)])
@pytest.mark.parametrize("codes", ["zero-one", "plus-minus", "float"])
def test_linear_attention(tokens, width, heads, codes, experts, dtype):
    x = normal(2, tokens, width, dtype=dtype)
    qkv, qkv_bias = normal(experts, 3 * width, width, dtype=dtype, scale=width**-0.5), normal(experts, 3 * width)
    proj, proj_bias = normal(experts, width, width, dtype=dtype, scale=width**-0.5), normal(experts, width)
    first, second = (normal(2, width), normal(2, width)) if experts == 2 else (None, None)
    norm, conv = (normal(width) + 1, normal(width)), normal(heads, 9)
    with poisoned_outputs():
        encoded = attention_encode(x, qkv, heads, qkv_bias, norm, 1e-6, first, codes=codes, v_sum=True)
        y, _ = attention_mix(encoded, proj, proj_bias, second, x, conv, codes, "mean", prefix=1 if tokens > 1 else 0)
    reference = attention_encode(x, qkv, heads, qkv_bias, norm, 1e-6, first, codes=codes, v_sum=True, backend="reference")
    tolerance = 2e-2 if dtype == torch.float16 else 2e-4  # a code at its threshold may fall either way
    assert error(encoded.v, reference.v) < 2 * tolerance
    assert error(encoded.context.sum(1), reference.context.sum(1)) < 2 * tolerance
    # The second kernel on the first one's very output, so that only its own rounding counts.
    again, _ = attention_mix(encoded, proj, proj_bias, second, x, conv, codes, "mean", prefix=1 if tokens > 1 else 0, backend="reference")
    assert error(y, again) < (2e-2 if experts == 2 else 2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("context_mean", [False, True])
def test_linear_attention_normalised_by_similarity(context_mean):
    x, qkv, proj = normal(3, 196, 160, dtype=torch.float16), normal(480, 160, dtype=torch.float16), normal(160, 160, dtype=torch.float16)
    encoded = attention_encode(x, qkv, 5, codes="plus-minus", v_sum=True, k_sum=True)
    form = {"codes": "plus-minus", "local": "mean", "context_mean": context_mean, "output_unit": False, "similarity": True, "factor": 1 / 32}
    y, _ = attention_mix(encoded, proj, **form)
    assert error(y, attention_mix(encoded, proj, **form, backend="reference")[0]) < 2e-3


@pytest.mark.parametrize("dispatch", ["dual", "partition"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 32, 64), (1000, 160, 640), (9000, 320, 1280), (513, 640, 160)])
@pytest.mark.parametrize("spread", ["mixed", "one"])
def test_moe_linear_forward_and_backward(tokens, inputs, outputs, spread, dtype, dispatch):
    x, weight, bias = normal(tokens, inputs, dtype=dtype), normal(2, outputs, inputs, dtype=dtype, scale=inputs**-0.5), normal(2, outputs)
    gate = torch.rand(tokens, device="cuda") + 0.5
    index = torch.randint(0, 2, (tokens,), device="cuda") if spread == "mixed" else torch.ones(tokens, dtype=torch.long, device="cuda")
    ours = [t.clone().requires_grad_() for t in (x, weight, bias, gate)]
    theirs = [t.double().requires_grad_() for t in (x, weight, bias, gate)]
    with poisoned_outputs():
        y = moe_linear(ours[0], index, *ours[1:], dispatch)
        grad = torch.randn_like(y)
        y.backward(grad)
    every = torch.einsum("mk,enk->men", theirs[0], theirs[1]) + theirs[2]
    exact = torch.where((index == 1)[:, None], every[:, 1], every[:, 0]) * theirs[3][:, None]
    exact.backward(grad.double())
    assert error(y, exact) < TOLERANCE[dtype]
    for name, mine, other in zip(("x", "weight", "bias", "gate"), ours, theirs, strict=True):
        assert error(mine.grad, other.grad) < 3 * TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 32, 64), (9001, 32, 256), (9000, 256, 32), (3000, 33, 70), (9000, 320, 1280), (70000, 64, 64)])
def test_moe_train_forward_and_backward(tokens, inputs, outputs, dtype):
    x, weight, bias = normal(tokens, inputs, dtype=dtype), normal(2, outputs, inputs, dtype=dtype, scale=inputs**-0.5), normal(2, outputs)
    router, noise = normal(2, inputs, scale=inputs**-0.5), normal(tokens, 2, scale=0.5)
    ours = [t.clone().requires_grad_() for t in (x, router, weight, bias)]
    theirs = [t.double().requires_grad_() for t in (x, router, weight, bias)]
    with poisoned_outputs():
        y, clean, index = moe_train(ours[0], ours[1], noise, ours[2], ours[3])
        grad, to_clean = torch.randn_like(y), torch.randn_like(clean)
        torch.autograd.backward((y, clean), (grad, to_clean))
    exact_clean = theirs[0] @ theirs[1].t()
    gate = (exact_clean + noise).softmax(1).gather(1, index.long()[:, None])
    every = torch.einsum("mk,enk->men", theirs[0], theirs[2]) + theirs[3]
    exact = torch.where((index == 1)[:, None], every[:, 1], every[:, 0]) * (gate / gate.detach())
    torch.autograd.backward((exact, exact_clean), (grad.double(), to_clean.double()))
    decided = ((exact_clean + noise).diff(dim=1)[:, 0] > 0).to(torch.int8)
    assert (index != decided).sum() <= tokens // 10000 and error(clean, exact_clean) < 1e-5
    assert error(y, exact) < TOLERANCE[dtype]
    for name, mine, other in zip(("x", "router", "weight", "bias"), ours, theirs, strict=True):
        assert error(mine.grad, other.grad) < 3 * TOLERANCE[dtype], name


@pytest.mark.parametrize("dispatch", ["dual", "partition"])
def test_routed_linear_needs_no_sync_and_runs_in_a_graph(dispatch):
    x, router, weight = normal(2000, 160), normal(2, 160), normal(2, 96, 160)
    routed_linear(x, router, weight, dispatch=dispatch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        routed_linear(x, router, weight, dispatch=dispatch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, choice = routed_linear(x, router, weight, dispatch=dispatch)
    x.copy_(normal(2000, 160))
    graph.replay()
    expected, again = routed_linear(x, router, weight, dispatch=dispatch)
    assert torch.equal(y, expected) and torch.equal(choice, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "tokens", "r", "d"), [(1, 1, 3136, 16, 32), (32, 2, 784, 16, 32), (3, 5, 197, 64, 64), (1, 1, 50000, 32, 32), (2, 1, 1, 40, 20)])
def test_matadd(batch, heads, tokens, r, d, dtype):
    codes = torch.where(torch.rand(batch, heads, tokens, r, device="cuda") > 0.5, 1.0, -1.0)
    values, context = normal(batch, heads, tokens, d, dtype=dtype), normal(batch, heads, r, d, dtype=dtype)
    words = pack_codes(codes, -1, 1)
    assert torch.equal(words, pack_codes(codes, -1, 1, backend="reference"))
    with poisoned_outputs():
        sums, mixed = key_value(words, values, r, -1, 1), query_context(words, context, -1, 1)
    assert error(sums, codes.double().transpose(-2, -1) @ values.double()) < TOLERANCE[dtype]
    assert error(mixed, codes.double() @ context.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "side", "outputs", "kernel", "stride", "padding"), [(3, 224, 32, 7, 4, 3), (32, 56, 64, 3, 2, 1), (160, 14, 256, 3, 2, 1), (32, 56, 32, 8, 8, 0), (160, 14, 160, 2, 2, 0), (3, 98, 40, 14, 14, 0), (3, 224, 192, 16, 16, 0)])
def test_patch_embed(channels, side, outputs, kernel, stride, padding, dtype):
    weight, bias, norm = normal(outputs, channels, kernel, kernel, dtype=dtype, scale=0.05), normal(outputs), (normal(outputs), normal(outputs))
    planes = channels == 3
    x = normal(2, channels, side, side) if planes else normal(2, side * side, channels, dtype=dtype)
    prefix = normal(1, outputs)
    with poisoned_outputs():
        y = patch_embed(x, weight, bias, stride, padding, None if planes else (side, side), norm=norm, prefix=prefix)
    pictures = x.to(dtype).double() if planes else x.double().transpose(1, 2).reshape(2, channels, side, side)
    expected = torch.nn.functional.conv2d(pictures, weight.double(), bias.double(), stride, padding).flatten(2).transpose(1, 2)
    expected = torch.nn.functional.layer_norm(expected, (outputs,), norm[0].double(), norm[1].double(), 1e-6)
    expected = torch.cat([prefix.expand(2, 1, -1).double(), expected], 1)
    assert error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "heads"), [(49, 256, 8), (197, 192, 3), (1, 64, 1), (1000, 128, 2)])
def test_softmax_attention(tokens, width, heads, dtype):
    q, k, v = normal(2, tokens, 3 * width, dtype=dtype).split(width, -1)
    with poisoned_outputs():
        y = softmax_attention(q, k, v, heads)
    split = [t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    assert error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 9, 5), (1000, 64, 512), (197, 320, 63)])
def test_adder(tokens, inputs, outputs):
    x, weight, grad = normal(tokens, inputs), normal(outputs, inputs), normal(tokens, outputs)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    theirs = [t.cpu().double().requires_grad_() for t in (x, weight)]
    with poisoned_outputs():
        y = adder_linear(*ours)
        y.backward(grad)
    exact = adder_linear(*theirs)
    exact.backward(grad.cpu().double())
    for name, mine, other in (("y", y, exact), ("x", ours[0].grad, theirs[0].grad), ("weight", ours[1].grad, theirs[1].grad)):
        assert error(mine, other) < 2e-6, name


@pytest.mark.parametrize("tokens", [0, 1, 63, 197, 512, 50432, 802816])
def test_expert_sums(tokens):
    clean, grad = normal(tokens, 2), normal(2, 2)
    logits = clean + normal(tokens, 2, scale=0.5)
    ours = [t.clone().requires_grad_() for t in (logits, clean)]
    theirs = [t.double().requires_grad_() for t in (logits, clean)]
    with poisoned_outputs():
        sums = expert_sums(*ours, backend="triton")
        sums.backward(grad)
    importance = theirs[0].softmax(-1).sum(0)
    load = torch.special.ndtr((theirs[1] - theirs[0].flip(-1)) * 2).sum(0)
    exact = torch.stack([importance, load])
    exact.backward(grad.double())
    for name, mine, other in (("sums", sums, exact), ("logits", ours[0].grad, theirs[0].grad), ("clean", ours[1].grad, theirs[1].grad)):
        assert error(mine, other) < 2e-6, name
    assert torch.equal(expert_sums(logits, clean), sums)


def test_expert_sums_need_no_sync_and_run_in_a_graph():
    logits, clean, grad = normal(3000, 2).requires_grad_(), normal(3000, 2).requires_grad_(), normal(2, 2)

    def results():
        sums = expert_sums(logits, clean)
        return sums, *torch.autograd.grad(sums, (logits, clean), grad)

    results()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results()
    for tensor in (logits, clean):
        tensor.data.copy_(normal(3000, 2))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, results(), strict=True))


def test_programmatic_launches_change_nothing():
    x = normal(4, 196, 160, dtype=torch.float16)
    qkv, proj = normal(480, 160, dtype=torch.float16, scale=0.08), normal(160, 160, dtype=torch.float16, scale=0.08)
    fc1, fc2 = normal(640, 160, dtype=torch.float16, scale=0.08), normal(160, 640, dtype=torch.float16, scale=0.04)
    norm, taps, shift = (normal(160), normal(160)), normal(9, 640, dtype=torch.float16), normal(640)

    def chain(pdl):
        y = x
        for _ in range(6):
            y, _ = attention_mix(attention_encode(y, qkv, 5, norm=norm, pdl=pdl), proj, residual=y, pdl=pdl)
            h, _ = norm_linear(y, fc1, norm=norm, pdl=pdl)
            y, _ = norm_linear(conv_gelu(h, 14, 14, taps, shift, pdl=pdl), fc2, residual=y, pdl=pdl)
        return y

    expected = chain(False)
    for _ in range(5):
        assert torch.equal(chain(True), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(True)
    for _ in range(5):
        graph.replay()
    assert torch.equal(y, expected)


def test_ops_compile_with_inductor():
    weight, x = normal(2, 96, 64), normal(100, 64)
    router = normal(2, 64)

    def block(x):
        return torch.relu(routed_linear(x * 2, router, weight)[0]) + 1

    assert error(torch.compile(block, fullgraph=True)(x), block(x)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", ["none", "mean"])
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 32), (2, 49, 256), (3, 197, 384), (2, 3136, 64), (5, 63, 1000)])
def test_layer_norm(batch, tokens, width, pool, dtype):
    x, weight, bias = normal(batch, tokens, width, dtype=dtype) * 2 + 1, normal(width) + 1, normal(width)
    with poisoned_outputs():
        y = layer_norm(x, weight, bias, 1e-6, pool)
    exact = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-6)
    assert error(y, exact.mean(1) if pool == "mean" else exact) < (5e-6 if pool == "mean" else TOLERANCE[dtype])
