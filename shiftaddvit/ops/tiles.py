"""Pieces of kernels that several ops share. Imports triton: only the `triton.py` of an op may import this file."""

import triton
import triton.language as tl

# Φ(x) ≈ ½ (1 + tanh(x (A + B x² + C x⁴))), x² clamped: fitted to the exact GELU, |error| < 2.6e-5 before the tanh's own rounding.
GELU_A = tl.constexpr(0.7975008076)
GELU_B = tl.constexpr(0.0370120836)
GELU_C = tl.constexpr(-0.000352562296)


@triton.jit
def gelu(x, FAST: tl.constexpr):
    """GELU of float32: exact with erf, or with one hardware tanh (relative error 2^-11), enough for half-precision results."""
    if FAST:
        square = tl.minimum(x * x, 36.0)
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
