"""The attention block equals LayerNorm, AngularAttention and the residual and never looks at batch-mates."""

import itertools

import pytest
import torch
from ops_checks import error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import AngularAttention, AngularConfig, BinaryConfig
from shiftaddvit.ops.bits import pack_bits, unpack_bits
from shiftaddvit.ops.linear_attention import attention_encode, attention_mix

BACKENDS = ("reference", "triton")


def layer(width, heads, binary, config, prefix, seed=0):
    torch.manual_seed(seed)
    outputs = 2 * width if config.shared_qk else 3 * width
    attention = AngularAttention(
        torch.nn.Linear(width, outputs), torch.nn.Linear(width, width), heads, width // heads, binary, config, prefix
    )
    if attention.token_conv is not None:
        torch.nn.init.normal_(attention.token_conv.weight)
    return torch.nn.LayerNorm(width, eps=1e-6), attention.eval()


def fused(x, norm, attention, backend):
    config, binary = attention.config, attention.add
    codes = "float" if binary is None else binary.codes
    rule = "token" if binary is None else binary.threshold
    encoded = attention_encode(
        x, attention.qkv.weight, attention.heads, attention.qkv.bias, (norm.weight, norm.bias), norm.eps, None, rule, None, codes,
        config.local == "mean", config.output_norm == "similarity", backend=backend,
    )  # fmt: skip
    conv = attention.token_conv.weight[:, 0, :, 0] if attention.token_conv is not None else None
    prefix = 0 if config.prefix_in_conv else attention.prefix_tokens
    return attention_mix(
        encoded, attention.proj.weight, attention.proj.bias, None, x, conv, codes, config.local, config.context == "mean",
        config.output_norm == "l2", config.output_norm == "similarity",
        1 / attention.head_dim if config.unit_codes and binary is not None else 1.0, prefix, backend=backend,
    )[0]  # fmt: skip


CASES = [
    (1, 49, 32, 1, BinaryConfig(), AngularConfig(), 0),
    (2, 100, 64, 2, BinaryConfig(codes="plus-minus"), AngularConfig(local="mean", context="sum"), 1),
    (3, 63, 48, 3, BinaryConfig(threshold="zero"), AngularConfig(local="none", output_norm="none", token_conv=3), 2),
    (1, 21, 128, 2, BinaryConfig(), AngularConfig.published(), 1),
    (2, 1, 32, 2, None, AngularConfig(token_conv=0), 0),
    (1, 70, 32, 1, None, AngularConfig(shared_qk=True), 0),
    (2, 70, 64, 2, BinaryConfig(codes="plus-minus"), AngularConfig(local="mean", output_norm="similarity", unit_codes=True), 1),
    (1, 66, 32, 1, None, AngularConfig(context="sum", output_norm="similarity"), 0),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "tokens", "width", "heads", "binary", "config", "prefix"), CASES)
@torch.no_grad()
def test_fused_block_equals_the_layers(batch, tokens, width, heads, binary, config, prefix, backend):
    norm, attention = layer(width, heads, binary, config, prefix)
    x = torch.randn(batch, tokens, width)
    with poisoned_outputs():
        y = fused(x, norm, attention, backend)
    assert error(y, x + attention(norm(x))) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_two_experts_route_every_token_in_both_kernels(backend):
    torch.manual_seed(0)
    batch, tokens, width, heads = 2, 37, 32, 2
    x = torch.randn(batch, tokens, width)
    qkv, qkv_bias, qkv_router = torch.randn(2, 96, 32) / 5, torch.randn(2, 96), torch.randn(2, 32)
    proj, proj_bias, proj_router = torch.randn(2, 32, 32) / 5, torch.randn(2, 32), torch.randn(2, 32)
    conv = torch.randn(heads, 9)
    encoded = attention_encode(x, qkv, heads, qkv_bias, router=qkv_router, codes="plus-minus", backend=backend)
    y, choice = attention_mix(encoded, proj, proj_bias, proj_router, None, conv, codes="plus-minus", backend=backend)

    routed = (x @ qkv_router.t()).argmax(-1)
    assert torch.equal(encoded.choice.long(), routed)
    every = torch.einsum("bnk,eok->ebno", x, qkv) + qkv_bias[:, None, None]
    q, k, v = torch.where(routed.bool()[..., None], every[1], every[0]).reshape(batch, tokens, 3, heads, 16).permute(2, 0, 3, 1, 4)
    q, k = (torch.where(t > t.mean(-1, keepdim=True), 1.0, -1.0) for t in (q, k))
    _, attention = layer(width, heads, BinaryConfig(), AngularConfig(), 0)
    attention.token_conv.weight.copy_(conv[:, None, :, None])
    merged = attention.mix(q, k, v).transpose(1, 2).flatten(2)
    routed = (merged @ proj_router.t()).argmax(-1)
    every = torch.einsum("bnk,eok->ebno", merged, proj) + proj_bias[:, None, None]
    assert torch.equal(choice.long(), routed)
    assert error(y, torch.where(routed.bool()[..., None], every[1], every[0])) < 1e-5


@pytest.mark.parametrize("backend", ["triton"])
@torch.no_grad()
def test_an_image_does_not_see_its_batch_mates(backend):
    norm, attention = layer(32, 2, BinaryConfig(), AngularConfig(), 0)
    x = torch.randn(3, 50, 32)
    together = fused(x, norm, attention, backend)
    others = torch.randn(3, 50, 32) * 9
    others[1] = x[1]
    assert torch.equal(together[1], fused(others, norm, attention, backend)[1])
    # Alone its rows lie elsewhere in a tile, and the interpreter's products round by place ...
    torch.testing.assert_close(together[1:2], fused(x[1:2].contiguous(), norm, attention, backend), rtol=1e-5, atol=1e-6)
    # ... unless it fills whole tiles.
    x = torch.randn(3, 128, 32)
    assert torch.equal(fused(x, norm, attention, backend)[1:2], fused(x[1:2].contiguous(), norm, attention, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_given_thresholds_compare_unit_length_queries_and_keys(backend):
    torch.manual_seed(1)
    x, weight, levels = torch.randn(1, 40, 32), torch.randn(96, 32), torch.tensor([[0.05, -0.1], [0.0, 0.2]])
    encoded = attention_encode(x, weight, 2, rule="given", threshold=levels, backend=backend)
    q, k, v = (x @ weight.t()).reshape(1, 40, 3, 2, 16).permute(2, 0, 3, 1, 4)
    q, k = (t / t.norm(dim=-1, keepdim=True) > level[None, :, None, None] for t, level in ((q, levels[0]), (k, levels[1])))
    assert torch.equal(unpack_bits(encoded.queries, 16).bool(), q)
    assert error(encoded.context.sum(1), k.float().transpose(-2, -1) @ v) < 1e-5


@pytest.mark.parametrize("backend", ["triton"])
@torch.no_grad()
def test_context_summed_in_parts_is_the_whole_sum(backend, monkeypatch):
    from shiftaddvit.ops.linear_attention import triton as kernels

    norm, attention = layer(32, 1, BinaryConfig(), AngularConfig(local="mean"), 0)
    x = torch.randn(1, 200, 32)
    monkeypatch.setattr(kernels, "parts_for", lambda *_: 3)
    y = fused(x, norm, attention, backend)
    assert error(y, x + attention(norm(x))) < 1e-5


@pytest.mark.parametrize("codes", ["zero-one", "float"])
@torch.no_grad()
def test_kernels_and_reference_return_v_alike_and_agree(codes):
    from shiftaddvit.ops.linear_attention import reference
    from shiftaddvit.ops.linear_attention import triton as kernels

    torch.manual_seed(2)
    x, weight, bias, router = torch.randn(2, 130, 64), torch.randn(2, 192, 64) / 8, torch.randn(2, 192), torch.randn(2, 64)
    proj, conv, prefix = torch.randn(2, 64, 64) / 8, torch.randn(2, 9), 3
    arguments = (x, None, None, 1e-6, weight, bias, router, None, 2, "token", codes, True, True, 1)
    rest = (proj, None, router, x, codes, "mean", True, "similarity", 1.0, prefix)
    results = {}
    for name, ops in (("reference", reference), ("kernels", kernels)):
        with poisoned_outputs():
            queries, v, context, v_sum, choice, k_sum = ops.encode(*arguments)
            y, second = ops.mix(queries, v, context, v_sum, k_sum, conv, *rest)
        assert v.shape == x.shape and v.stride() == (130 * 192, 192, 1) and y.is_contiguous()
        results[name] = (queries, v, context, v_sum, choice, k_sum, y, second)
    for actual, expected in zip(results["kernels"], results["reference"], strict=True):
        assert error(actual, expected) < 1e-5


@torch.no_grad()
def test_values_with_rows_any_distance_apart():
    from shiftaddvit.ops.linear_attention import triton as kernels

    x, proj, conv = torch.randn(1, 40, 32), torch.randn(1, 32, 32), torch.randn(2, 3)
    queries, v, context, *_ = kernels.encode(x, None, None, 1e-6, torch.randn(1, 96, 32), None, None, None, 2, "zero", "zero-one", False, False, 1)
    rest = (context, *(torch.empty(0) for _ in range(2)), conv, proj, None, None, None, "zero-one", "own", False, "none", 1.0, 0)
    assert torch.equal(kernels.mix(queries, v, *rest)[0], kernels.mix(queries, v.contiguous(), *rest)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_float16_between_bfloat16_tokens(backend):
    torch.manual_seed(3)
    x, weight, proj = torch.randn(2, 40, 64).bfloat16(), (torch.randn(192, 64) / 8).half(), (torch.randn(64, 64) / 8).half()
    encoded = attention_encode(x, weight, 2, backend=backend)
    assert encoded.v.dtype == torch.float16
    y, _ = attention_mix(encoded, proj, residual=x, backend=backend)
    wide = attention_mix(attention_encode(x.float(), weight.float(), 2), proj.float(), residual=x.float())[0]
    assert y.dtype == torch.bfloat16 and error(y, wide) < 2e-2
    with pytest.raises(UserError, match="for torch.bfloat16, got torch.float32"):
        attention_encode(x, weight.float(), 2, backend=backend)


def test_bits_survive_packing():
    for d in (16, 32, 64):
        bits = torch.rand(3, 5, d) > 0.5
        assert torch.equal(unpack_bits(pack_bits(bits), d).bool(), bits)
    assert pack_bits(torch.ones(1, 32, dtype=torch.bool)).item() == -1


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_half_precision_zeros_and_empty(backend):
    norm, attention = layer(32, 1, BinaryConfig(), AngularConfig(), 0)
    norm, attention = norm.half(), attention.half()
    y = fused(torch.zeros(1, 10, 32).half(), norm, attention, backend)
    assert y.dtype == torch.float16 and torch.isfinite(y).all()
    assert fused(torch.zeros(0, 10, 32).half(), norm, attention, backend).shape == (0, 10, 32)


@pytest.mark.parametrize("backend", ["triton"])
@torch.no_grad()
def test_nan_in_one_image_stays_in_that_image(backend):
    norm, attention = layer(32, 2, BinaryConfig(), AngularConfig(), 0)
    x = torch.randn(2, 20, 32)
    x[0, 3, 4] = float("nan")
    y = fused(x, norm, attention, backend)
    assert torch.isnan(y[0]).any() and torch.isfinite(y[1]).all()


def test_opcheck_compile_and_export():
    x, weight, proj = torch.randn(1, 6, 32), torch.randn(96, 32), torch.randn(32, 32)

    class Block(torch.nn.Module):
        def forward(self, x):
            return attention_mix(attention_encode(x, weight, 2, backend="reference"), proj, residual=x, backend="reference")[0]

    expected = Block()(x)
    assert torch.equal(torch.compile(Block(), fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(Block(), (x,)).module()(x), expected)
    for codes, sums in itertools.product(("zero-one", "float"), (False, True)):
        args = (x, None, None, 1e-6, weight[None], None, None, None, 2, "token", codes, sums, sums, 1, False, "reference")
        torch.library.opcheck(torch.ops.shiftaddvit.attention_encode.default, args, test_utils=("test_schema", "test_faketensor"))


def test_mistakes_are_named():
    x = torch.randn(1, 6, 32)
    with pytest.raises(UserError, match="heads must split 32 channels"):
        attention_encode(x, torch.randn(96, 32), 3)
    with pytest.raises(UserError, match="rule 'given' and only with it"):
        attention_encode(x, torch.randn(96, 32), 2, rule="given")
    encoded = attention_encode(x, torch.randn(96, 32), 2)
    with pytest.raises(UserError, match="v_sum=True"):
        attention_mix(encoded, torch.randn(32, 32), local="mean")
