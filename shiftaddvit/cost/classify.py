"""From an operator, or a module that is taken as a whole, to the operations of the energy model."""

from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor, nn

from shiftaddvit.baselines.adder_attention import AdderScores
from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import MatAdd

from . import streams
from .operations import Nest, Operation, Stream
from .shape_tensor import ShapeTensor


def whole_module(module: nn.Module, name: str, inputs: Sequence[Tensor], output: Tensor) -> Nest:
    """The loop nest of a module that declares its primitive: a product (MatAdd), a linear layer, or a convolution."""
    primitive = module.primitive
    if getattr(module, "enabled", True) is False:
        primitive = "mult"  # switched off, it computes with its latent values
    bits = getattr(module, "bits", None) if primitive == "shift" else None
    x = inputs[0]
    if len(inputs) == 2:
        left, right = inputs
        return Nest(name, "product", primitive, prod(left.shape[:-2]), left.shape[-2], left.shape[-1], right.shape[-1])
    if hasattr(module, "in_features"):
        tokens = _count(x) // module.in_features
        return Nest(name, "linear", primitive, 1, tokens, module.in_features, module.out_features, weight_bits=bits)
    if hasattr(module, "kernel_size"):
        (rows, columns), groups = module.kernel_size, module.groups
        batch, channels, h, w = x.shape
        _, outputs, e, f = output.shape
        return Nest(name, "conv", primitive, groups, batch, channels // groups, outputs // groups, rows, columns, h, w, e, f,
                    tuple(module.stride), bits)  # fmt: skip
    raise UserError(
        f"{name} ({type(module).__name__}) declares the primitive {primitive!r} but is neither a linear layer (in_features), a convolution "
        "(kernel_size) nor a product of two inputs"
    )


def shape_only(module: nn.Module) -> Callable[..., Tensor] | None:
    """A forward that gives the shape alone, for the modules whose weights are dear to decode; None runs the module's own."""

    def linear(x: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], module.out_features))

    def product(left: Tensor, right: Tensor) -> Tensor:
        return left.new_empty((*left.shape[:-1], right.shape[-1]))

    def convolution(x: Tensor) -> Tensor:
        sizes = zip(x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
        return x.new_empty((x.shape[0], module.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)))

    if hasattr(module, "in_features"):
        return linear
    if hasattr(module, "out_channels"):
        return convolution
    return product if isinstance(module, MatAdd | AdderScores) else None


def operator(name: str, module: str, leaf: bool, args: tuple, results: Sequence[Tensor]) -> list[Operation] | None:
    """The operations of one operator of PyTorch in module `module`; none for views and constants; None if it is unknown."""
    if name in streams.FREE:
        return []
    name = name.removesuffix("_") if not name.startswith("_") else name
    if name in streams.FREE:
        return []
    out = results[0]
    if name in _NESTS:
        return _NESTS[name](module, leaf, args, out)
    if name.startswith("_scaled_dot_product"):
        return _attention(module, args)
    return _stream(name, module, args, results)


def _stream(name: str, module: str, args: tuple, results: Sequence[Tensor]) -> list[Operation] | None:
    tensors = [x for x in _flat(args) if isinstance(x, Tensor)]
    live = [x for x in tensors if isinstance(x, ShapeTensor)] or tensors
    read, written = _count(live[0]), _count(results[0])
    if name in streams.BINARY:
        function = streams.BINARY[name]
        operands = {getattr(x, "origin", x): _count(x) for x in tensors if x.dim() > 0}  # one that came from another is not read again
        sizes = sorted(operands.values())
        if len(sizes) < 2:
            return [Stream(module, "pointwise", function, 0, 0, written)]
        return [Stream(module, "elementwise", function, sum(sizes[:-1]), 0, written)]
    if name in streams.POINTWISE:
        return [Stream(module, "pointwise", streams.POINTWISE[name], 0, 0, written)]
    if name in streams.BATCH_NORMS:
        return [Stream(module, "pointwise", "batch_norm", 0, 0, written)]
    if name in streams.NORMS:
        return [Stream(module, "norm", streams.NORMS[name], read, written, read, _rows(name, args))]
    if name in streams.SOFTMAX:
        return [Stream(module, "softmax", "softmax", read, written, read, _rows(name, args))]
    if name in streams.REDUCTIONS:
        return [Stream(module, "reduction", streams.REDUCTIONS[name], read, sum(map(_count, results)), read, _rows(name, args))]
    if name in streams.MOVES:
        return [Stream(module, "move", "move", written, written, written)]
    if name in streams.INTERPOLATIONS:
        return [Stream(module, "move", "interpolate", read, written, written)]
    return None


def _rows(name: str, args: tuple) -> int:
    """How many rows a norm, softmax or reduction works on if it runs along the last dimension alone; 0 if it does not."""
    x = args[0]
    if name in streams.NORMS:
        along = range(x.dim() - len(args[1]), x.dim()) if streams.NORMS[name] != "group_norm" else ()
    elif streams.REDUCTIONS.get(name) == "pool":
        along = ()
    elif name in ("topk", "sort"):
        given = args[2:3] if name == "topk" else args[1:2]
        along = given or (-1,)
    else:  # a list of dimensions wherever it stands, or one dimension beside the tensor
        along = next((a for a in args[1:] if isinstance(a, (list, tuple))), args[1:2])
    if not all(isinstance(d, int) and not isinstance(d, bool) for d in along) or {d % max(x.dim(), 1) for d in along} != {x.dim() - 1}:
        return 0
    return _count(x) // int(x.shape[-1])


def _linear(module: str, leaf: bool, args: tuple, _out: Tensor) -> list[Operation]:
    x, weight = args[0], args[1]
    return [Nest(module, "linear", "mult", 1, _count(x) // x.shape[-1], x.shape[-1], weight.shape[0], leaf=leaf)]


def _matrix(first: int):
    """A matrix product whose operands are at `first`: a linear layer if its right side is a weight."""

    def classify(module: str, leaf: bool, args: tuple, _out: Tensor) -> list[Operation]:
        a, b = args[first], args[first + 1]
        weights = not (isinstance(a, ShapeTensor) and isinstance(b, ShapeTensor))
        if weights and not isinstance(a, ShapeTensor):
            a, b = b.t(), a.t()  # W x: the same work as xᵀ Wᵀ
        kind = "linear" if weights else "product"
        return [Nest(module, kind, "mult", 1, a.shape[0], a.shape[1], b.shape[1], leaf=leaf and weights)]

    return classify


def _batched(first: int):
    def classify(module: str, _leaf: bool, args: tuple, _out: Tensor) -> list[Operation]:
        (groups, rows, inner), columns = args[first].shape, args[first + 1].shape[2]
        return [Nest(module, "product", "mult", groups, rows, inner, columns, leaf=False)]

    return classify


def _attention(module: str, args: tuple) -> list[Operation]:
    """Scaled dot-product attention in one operator: q kᵀ, softmax, and its product with v."""
    q, k, v = args[:3]
    groups, rows, width, tokens, out = prod(q.shape[:-2]), q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    scores = groups * rows * tokens
    return [
        Nest(module, "product", "mult", groups, rows, width, tokens, leaf=False),
        Stream(module, "softmax", "softmax", scores, scores, scores, groups * rows),
        Nest(module, "product", "mult", groups, rows, tokens, out, leaf=False),
    ]


def _convolution(module: str, leaf: bool, args: tuple, out: Tensor) -> list[Operation]:
    x, weight, _, stride, _, _, transposed, _, groups = args[:9]
    if not isinstance(weight, Tensor) or x.dim() < 3:
        return []
    batch, channels, outputs = x.shape[0], x.shape[1], out.shape[1]
    c, m, kernel = channels // groups, outputs // groups, tuple(weight.shape[2:])
    if transposed:  # each input spreads over a window: a product with as many columns as the window has places
        return [Nest(module, "linear", "mult", groups, batch * prod(x.shape[2:]), c, m * prod(kernel), leaf=leaf)]
    if x.dim() > 4:
        return [Nest(module, "linear", "mult", groups, batch * prod(out.shape[2:]), c * prod(kernel), m, leaf=leaf)]
    (r, s), (h, w), (e, f) = (_plane(size) for size in (kernel, x.shape[2:], out.shape[2:]))
    return [Nest(module, "conv", "mult", groups, batch, c, m, r, s, h, w, e, f, _plane(stride), leaf=leaf)]


_NESTS = {
    "linear": _linear, "mm": _matrix(0), "addmm": _matrix(1), "bmm": _batched(0), "baddbmm": _batched(1), "convolution": _convolution,
}  # fmt: skip


def _plane(size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns; a line is one row."""
    return (1, int(size[0])) if len(size) == 1 else (int(size[0]), int(size[1]))


def _count(x: Tensor) -> int:
    return prod(int(size) for size in x.shape)


def _flat(values: Sequence) -> list:
    """Arguments, lists of tensors opened."""
    return [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
