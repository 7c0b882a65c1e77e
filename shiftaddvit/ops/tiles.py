"""Pieces of kernels that several ops share. Imports triton: only the kernels of an op may import this file."""

import triton
import triton.language as tl

# Φ(x) ≈ ½ (1 + tanh(x (A + B x² + C x⁴))), x² clamped: fitted to the exact GELU, |error| < 2.6e-5 before the tanh's own rounding.
GELU_A = tl.constexpr(0.7975008076)
GELU_B = tl.constexpr(0.0370120836)
GELU_C = tl.constexpr(-0.000352562296)
GELU_LIMIT = tl.constexpr(36.0)


@triton.jit
def gelu(x, FAST: tl.constexpr):
    """GELU of float32: exact with erf, or with one hardware tanh (relative error 2^-11), enough for half-precision results."""
    if FAST:
        square = tl.minimum(x * x, GELU_LIMIT)
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;",
            "=f,f",
            [x * (GELU_A + square * (GELU_B + square * GELU_C))],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return 0.5 * x + 0.5 * x * t
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """With programmatic dependent launch: let the next kernel start its launch, then wait until this one's inputs are written."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def store_int8(pointers, value, mask):
    """Round half away from zero, saturate to ±127 and store; NaN becomes 0."""
    value = tl.minimum(tl.maximum(value, -127.0), 127.0)
    value = value + tl.where(value < 0, -0.5, 0.5)
    tl.store(pointers, value.to(tl.int32).to(tl.int8), mask=mask)


@triton.jit
def normalised_rows(x, inside, width, eps):
    """(x − mean) / √(var + eps) of every row of a (rows, width padded) float32 tile, zero outside; variance from the differences."""
    mean = tl.sum(tl.where(inside, x, 0.0), 1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / width
    return centred * tl.rsqrt(variance + eps)[:, None]


@triton.jit
def load_columns(matrix, n, k, N, K, BK: tl.constexpr, T: tl.constexpr):
    """The (BK, len(n)) tile of the transpose of a row-major (N, K) matrix that starts at column k."""
    ks = k + tl.arange(0, BK)
    return tl.load(matrix + n[None, :] * K + ks[:, None], mask=(ks[:, None] < K) & (n[None, :] < N), other=0.0).to(T)


@triton.jit
def complete(
    acc, m, n, second, bias, residual, M, N, EXPERTS: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A product's tile plus the bias of each row's expert, through the activation, plus the residual."""
    if HAS_BIAS:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if EXPERTS == 2:
            shift = tl.where(second[:, None], tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :], shift)
        acc = acc + shift
    if GELU:
        acc = gelu(acc, FAST)
    if HAS_RESIDUAL:
        inside = (m[:, None] < M) & (n[None, :] < N)
        acc = acc + tl.load(residual + m[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def store_tile(out, acc, m, n, M, N, out_scale, INT8: tl.constexpr):
    """Store in the dtype of out, or rounded to int8 in units of `out_scale`."""
    inside = (m[:, None] < M) & (n[None, :] < N)
    where = out + m[:, None].to(tl.int64) * N + n[None, :]
    if INT8:
        store_int8(where, acc / tl.load(out_scale), inside)
    else:
        tl.store(where, acc.to(out.dtype.element_ty), mask=inside)
