"""MatAdd: products with binary codes, kept as bits, equal the dense products forward and backward."""

import pytest
import torch
from ops_checks import SIZES, error, poisoned_outputs

from shiftaddvit.errors import UserError
from shiftaddvit.ops.bits import unpack_bits
from shiftaddvit.ops.matadd import key_value, pack_codes, query_context
from shiftaddvit.ops.matadd.reference import add_literally

BACKENDS = ("reference", "triton")
KINDS = ((0.0, 1.0), (-1.0, 1.0), (-0.5, 0.5))


def problem(tokens, r=16, d=32, kind=(0.0, 1.0), batch=2, heads=2):
    generator = torch.Generator().manual_seed(tokens + r + d)
    bits = torch.rand(batch, heads, tokens, r, generator=generator) > 0.5
    codes = torch.where(bits, kind[1], kind[0])
    return codes, torch.randn(batch, heads, tokens, d, generator=generator), torch.randn(batch, heads, r, d, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", SIZES)
def test_products_with_bits_equal_products_with_codes(tokens, kind, backend):
    codes, values, context = problem(tokens, kind=kind)
    words = pack_codes(codes, *kind, backend=backend)
    with poisoned_outputs():
        sums = key_value(words, values, 16, *kind, backend=backend)
    assert error(sums, codes.double().transpose(-2, -1) @ values.double()) < 1e-6
    with poisoned_outputs():
        mixed = query_context(codes, context, *kind, backend=backend)
    assert error(mixed, codes.double() @ context.double()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("r", "d"), [(5, 20), (32, 64), (64, 48), (40, 16)])
def test_any_code_width_and_value_width(r, d, backend):
    codes, values, context = problem(70, r, d, (-1.0, 1.0))
    words = pack_codes(codes, -1, 1, backend=backend)
    assert torch.equal(unpack_bits(words, r).bool(), codes > 0)
    with poisoned_outputs():
        assert error(key_value(words, values, r, -1, 1, backend), codes.double().transpose(-2, -1) @ values.double()) < 1e-6
        assert error(query_context(codes, context, -1, 1, backend), codes.double() @ context.double()) < 1e-6


def test_the_product_is_what_additions_alone_give():
    codes, values, _ = problem(20)
    words = pack_codes(codes)
    assert error(key_value(words, values, 16, backend="triton"), add_literally(words, values.double(), 16)) < 1e-6


def test_parts_add_up(monkeypatch):
    from shiftaddvit.ops.matadd import triton as kernels

    codes, values, _ = problem(16500, batch=1, heads=1, d=16)
    monkeypatch.setattr(kernels, "processors", lambda device: 2)
    y = key_value(codes, values, backend="triton")
    assert error(y, codes.double().transpose(-2, -1) @ values.double()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_split_heads_need_no_copy_and_empty_is_empty(backend):
    codes, _, context = problem(40)
    values = torch.randn(2, 40, 2, 32).transpose(1, 2)
    assert error(key_value(codes, values, backend=backend), codes.double().transpose(-2, -1) @ values.double()) < 1e-6
    assert torch.equal(key_value(codes[:, :, :0], values[:, :, :0], backend=backend), torch.zeros(2, 2, 16, 32))
    assert query_context(codes[:0], context[:0], backend=backend).shape == (0, 2, 40, 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_sums_in_float32(backend):
    codes, values, _ = problem(100)
    y = key_value(codes.half(), values.half(), backend=backend)
    assert y.dtype == torch.float16
    assert error(y, codes.double().transpose(-2, -1) @ values.half().double()) < 6e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_every_sum_it_is_added_to(backend):
    codes, values, _ = problem(30, kind=(-1.0, 1.0))
    values[0, 0, 7, 3] = float("nan")
    y = key_value(codes, values, low=-1, backend=backend)
    assert torch.isnan(y[0, 0, :, 3]).all() and torch.isnan(y).sum() == 16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_codes_and_values(kind, backend):
    codes, values, context = problem(21, kind=kind)
    for op, other, exact in (
        (key_value, values, lambda c, v: c.transpose(-2, -1) @ v),
        (query_context, context, lambda c, v: c @ v),
    ):
        ours = [t.clone().requires_grad_() for t in (codes, other)]
        theirs = [t.double().requires_grad_() for t in (codes, other)]
        y = op(*ours, low=kind[0], high=kind[1], backend=backend)
        grad = torch.randn_like(y)
        y.backward(grad)
        exact(*theirs).backward(grad.double())
        assert error(ours[0].grad, theirs[0].grad) < 1e-6, op.__name__
        assert error(ours[1].grad, theirs[1].grad) < 1e-6, op.__name__


def test_opcheck_compile_and_export():
    codes, values, context = problem(6, batch=1)
    words, ops = pack_codes(codes), torch.ops.shiftaddvit
    values, context, codes = values.requires_grad_(), context.requires_grad_(), codes.requires_grad_()
    torch.library.opcheck(ops.matadd_pack.default, (codes.detach(), 0.5, "reference"))
    torch.library.opcheck(ops.matadd_key_value.default, (words, values, 16, 0.0, 1.0, "reference"))
    torch.library.opcheck(ops.matadd_query_context.default, (words, context, 0.0, 1.0, "reference"))
    torch.library.opcheck(ops.matadd_key_value_dense.default, (codes, values, 0.0, 1.0, "reference"))
    torch.library.opcheck(ops.matadd_query_context_dense.default, (codes, context, 0.0, 1.0, "reference"))

    class Attend(torch.nn.Module):
        def forward(self, codes, values):
            return query_context(codes, key_value(codes, values))

    inputs = codes.detach(), values.detach()
    expected = Attend()(*inputs)
    assert torch.equal(torch.compile(Attend(), fullgraph=True, backend="aot_eager")(*inputs), expected)
    assert torch.equal(torch.export.export(Attend(), inputs).module()(*inputs), expected)


def test_mistakes_are_named():
    codes, values, _ = problem(6)
    words = pack_codes(codes)
    with pytest.raises(UserError, match="with r given"):
        key_value(words, values)
    with pytest.raises(UserError, match="low must be less than high"):
        key_value(codes, values, low=2.0)
    with pytest.raises(UserError, match=r"codes must be \(2, 2, 6\)"):
        key_value(codes[:, :, :3], values)
