"""What `ops.bench` measures of the single products: each case holds an exact reference, our op and the baselines on the same data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from . import adder, matadd, matshift, moe_linear
from .matshift import formats


@dataclass(frozen=True)
class Case:
    """One problem."""

    op: str
    """The op's name."""
    shape: str
    """The problem, readable."""
    inputs: Callable[[], tuple]
    """Fresh random arguments, the same for every contender."""
    exact: Callable[..., Tensor]
    """The result in float64 or float32, from those arguments."""
    contenders: dict[str, Callable[..., Tensor]]
    """Ours and the baselines; names of ours start with `ours`."""
    bytes: int
    """The least that must move: each input read once, each output written once, in the dtypes of the first contender."""
    flop: int
    """Operations of the matrix products it needs."""
    tolerance: float = 1e-2
    """Largest ‖y − exact‖ / ‖exact‖ at which a time counts."""
    units: dict[str, float] = field(default_factory=dict)
    """What one unit of a contender's output is worth, where it is not 1."""
    unchecked: frozenset[str] = frozenset()
    """Baselines that compute something else of the same cost, such as one dense expert."""


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random values on the GPU."""
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def matshift_cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """The published shapes. The weights are 4-bit codes; the 5-bit codes of the same weights are read in the kernel."""
    for batch in batches:
        for tokens, k, n in ((3136, 64, 512), (3136, 512, 64), (784, 128, 1024), (784, 1024, 128)):
            yield _matshift_case(batch, tokens, k, n)


def _matshift_case(batch: int, tokens: int, k: int, n: int) -> Case:
    m = batch * tokens
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    codes = torch.where(codes == 8, 0, codes)
    weight = formats.decode(codes, 4)
    packed = formats.pack(formats.encode(weight, 5), 5)
    single, half, brain = weight, weight.half(), weight.bfloat16()
    integers, w_scale = formats.decode_int8(codes)
    shift, sign = weight.abs().clamp_min(2.0**-20).log2(), weight.sign()
    x_scale = torch.full((1,), 1 / 30, device="cuda")
    unit = float((single.square().sum(1).mean()).sqrt()) / 30
    out_scale = torch.full((1,), unit, device="cuda")

    def inputs() -> tuple:
        x = normal(m, k)
        return x, x.bfloat16(), x.half(), (x * 30).round().clamp(-127, 127).to(torch.int8)

    def published(x, *_):
        return F.linear(x, torch.exp2(torch.round(shift.clamp(-14, 0))) * torch.sign(torch.round(sign.clamp(-1, 1))))

    return Case(
        "matshift",
        f"({batch},{tokens},{k}->{n})",
        inputs,
        lambda x, *_: (x.double() if x.numel() < 2**24 else x) @ single.to(torch.float64 if x.numel() < 2**24 else x.dtype).t(),
        {
            "ours bf16": lambda x, xb, xh, xi: matshift.matshift(xb, brain),
            "ours int8 to int8": lambda x, xb, xh, xi: matshift.matshift_int8(xi, x_scale, integers, w_scale, None, out_scale),
            "ours bf16, 5-bit codes": lambda x, xb, xh, xi: matshift.matshift(xb, packed, bits=5),
            "ours fp32-grade": lambda x, xb, xh, xi: matshift.matshift(x, half),
            "cuBLAS bf16": lambda x, xb, xh, xi: F.linear(xb, brain),
            "cuBLAS fp16": lambda x, xb, xh, xi: F.linear(xh, half),
            "FakeShift fp32": published,
        },
        2 * (m * k + m * n + n * k),
        2 * m * n * k,
        5e-2,
        {"ours int8 to int8": unit},
    )


def matadd_cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """The published KᵀV shapes: code width 16, value width 32; and the second product."""
    for batch in batches:
        for heads, tokens in ((1, 3136), (2, 784), (5, 196)):
            rows = batch * heads

            def inputs(b=batch, h=heads, n=tokens) -> tuple:
                codes = (torch.rand(b, h, n, 16, device="cuda") > 0.5).float()
                v = normal(b, h, n, 32)
                return codes, v, codes.bfloat16(), v.bfloat16(), matadd.pack_codes(codes)

            yield Case(
                "matadd",
                f"KᵀV ({batch},{heads},{tokens},32,16)",
                inputs,
                lambda c, v, *_: c.double().transpose(-2, -1) @ v.double(),
                {
                    "ours bf16 values": lambda c, v, cb, vb, w: matadd.key_value(w, vb, 16),
                    "ours fp32 values": lambda c, v, cb, vb, w: matadd.key_value(w, v, 16),
                    "einsum fp32 (published)": lambda c, v, cb, vb, w: torch.einsum("bhnr,bhnd->bhrd", c, v),
                    "matmul fp32": lambda c, v, cb, vb, w: c.transpose(-2, -1) @ v,
                    "matmul bf16": lambda c, v, cb, vb, w: cb.transpose(-2, -1) @ vb,
                },
                rows * (tokens * (4 + 64) + 16 * 32 * 2),
                2 * rows * tokens * 16 * 32,
            )

            def queries(b=batch, h=heads, n=tokens) -> tuple:
                codes = (torch.rand(b, h, n, 16, device="cuda") > 0.5).bfloat16()
                return codes, normal(b, h, 16, 32, dtype=torch.bfloat16), matadd.pack_codes(codes)

            yield Case(
                "matadd",
                f"Q·context ({batch},{heads},{tokens},32,16)",
                queries,
                lambda c, s, w: c.double() @ s.double(),
                {
                    "ours bf16": lambda c, s, w: matadd.query_context(w, s),
                    "matmul bf16": lambda c, s, w: c @ s,
                },
                rows * (tokens * (4 + 64) + 16 * 32 * 2),
                2 * rows * tokens * 16 * 32,
            )


def moe_cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """Both dispatches against one dense linear, at B0's and B2's widths."""
    for batch in batches:
        for tokens, k, n in ((3136, 32, 256), (784, 64, 512), (196, 160, 640), (196, 320, 1280), (196, 1280, 320)):
            m = batch * tokens
            weight, router = normal(2, n, k, dtype=torch.bfloat16, scale=k**-0.5), normal(2, k)

            def exact(x, w=weight.float(), r=router):
                second = (x.float() @ r.t()).argmax(1, keepdim=True) == 1
                return torch.where(second, x.float() @ w[1].t(), x.float() @ w[0].t())

            ours = {
                f"ours {way}": lambda x, w=weight, r=router, way=way: moe_linear.routed_linear(x, r, w, dispatch=way)[0]
                for way in ("dual", "partition")
            }
            dense = {"one dense linear bf16": lambda x, w=weight: F.linear(x, w[0])}
            yield Case(
                "moe_linear",
                f"({m},{k}->{n})",
                lambda m=m, k=k: (normal(m, k, dtype=torch.bfloat16),),
                exact,
                ours | dense,
                2 * (m * k + m * n + 2 * n * k),
                2 * m * n * k,
                unchecked=frozenset(dense),
            )


def adder_cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """Forward, and the input's gradient. The work is two additions an element, on the ordinary float units."""
    for batch in batches:
        for tokens, k, n in ((3136, 64, 64), (196, 160, 640)):
            m, weight = batch * tokens, normal(n, k)
            yield Case(
                "adder",
                f"forward ({m},{k}->{n})",
                lambda m=m, k=k: (normal(m, k),),
                lambda x, w=weight: -torch.cdist(x, w, p=1),
                {
                    "ours": lambda x, w=weight: adder.adder_linear(x, w),
                    "cdist fp32": lambda x, w=weight: -torch.cdist(x, w, p=1),
                },
                4 * (m * k + m * n + n * k),
                2 * m * n * k,
                1e-5,
            )
            yield Case(
                "adder",
                f"gradient of x ({m},{k}->{n})",
                lambda m=m, k=k, n=n: (normal(m, k), normal(m, n)),
                lambda x, g, w=weight: torch.ops.shiftaddvit.adder_grad_x(x, w, g, "reference"),
                {"ours": lambda x, g, w=weight: torch.ops.shiftaddvit.adder_grad_x(x, w, g, "triton")},
                4 * (2 * m * k + m * n + n * k),
                4 * m * n * k,
                1e-5,
            )
