"""Which operations one forward executes: read off the operators that PyTorch dispatches, on shapes alone.

Linear layers, convolutions and products are seen whoever calls them: a module, `F.linear`, `@`, einsum or attention. Modules that declare
a `primitive` other than "mult" are taken as a whole: what they compute is what the primitive means, not how the reference path gets there.
"""

from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.router import Router

from . import classify
from .operations import PRIMITIVES, Expert, Mixture, Nest, Operation, Stream, Trace, Uncosted
from .shape_tensor import ShapeTensor


def trace(model: nn.Module, *inputs: tuple[int, ...] | Tensor, scale: float = 1.0) -> Trace:
    """Run `model` in evaluation mode on inputs of the given shapes. Works on any device, `meta` included; nothing is computed but
    what depends on the weights alone. The model is left as it was. UserError if the model cannot run on these shapes."""
    tracer = _Tracer(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), tracer.attached():
            model(*(tracer.input(shape) for shape in inputs))
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError, NotImplementedError, TypeError, IndexError) as error:
        shapes = ", ".join(str(tuple(x)) for x in inputs)
        raise UserError(f"{type(model).__name__} cannot run on inputs of shape {shapes}: {str(error).splitlines()[0][:300]}") from error
    finally:
        for module, mode in training.items():
            module.training = mode
    return Trace(_with_scores(tracer.operations), tuple(tracer.mixtures.values()), tracer.uncosted(), scale)


def _with_scores(operations: list[Operation]) -> tuple[Operation, ...]:
    """The same, the two products around each softmax over rows of scores marked as such: q kᵀ before it, the product with v after."""
    marked = list(operations)
    nests = [place for place, operation in enumerate(operations) if isinstance(operation, Nest)]
    for place, operation in enumerate(operations):
        if operation.kind != "softmax" or not operation.rows:
            continue
        after = bisect(nests, place)
        if not 0 < after < len(nests):
            continue
        first, second = operations[nests[after - 1]], operations[nests[after]]
        rows = {(nest.kind, nest.groups * nest.N, width) for nest, width in ((first, first.M), (second, second.C))}
        if rows == {("product", operation.rows, operation.elements // operation.rows)}:
            marked[nests[after - 1]], marked[nests[after]] = replace(first, scores="written"), replace(second, scores="read")
    return tuple(marked)


class _Tracer:
    """Follows which module is executing and records what it executes."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.names = {module: name or type(module).__name__ for name, module in model.named_modules()}
        self.whole = {module for module in self.names if _is_whole(module)}
        self.mixed = {module for module in self.names if _is_mixture(module)}
        self.layers = {module for module in self.names if _is_layer(module)}
        self.experts = {
            expert: Expert(self.names[mixture], index) for mixture in self.mixed for index, expert in enumerate(mixture.experts)
        }
        self.stack: list[nn.Module] = []
        self.operations: list[Operation] = []
        self.mixtures: dict[str, Mixture] = {}
        self.unknown: dict[tuple[str, str], int] = {}
        self.muted = 0

    def input(self, shape: tuple[int, ...] | Tensor) -> ShapeTensor:
        return ShapeTensor(torch.empty(tuple(shape), device="meta"), self._operator)

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        replaced = []
        try:
            for module in self.names:
                if module in self.whole and (forward := classify.shape_only(module)) is not None:
                    module.forward = forward  # the instance's own, over the class's
                    replaced.append(module)
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in replaced:
                del module.forward

    def uncosted(self) -> tuple[Uncosted, ...]:
        return tuple(Uncosted(name, count, reason) for (name, reason), count in self.unknown.items())

    def _enter(self, module: nn.Module, _inputs: tuple) -> None:
        self.stack.append(module)
        if module in self.whole:
            self.muted += 1

    def _leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        name = self.names[module]
        if module in self.whole:
            self.muted -= 1
            if not self.muted:
                self._record(classify.whole_module(module, name, [x for x in inputs if isinstance(x, Tensor)], output))
        elif module in self.mixed:
            self._mixture(module, name, inputs[0], output)
        self.stack.pop()

    def _mixture(self, module: nn.Module, name: str, x: Tensor, output: Tensor) -> None:
        if not getattr(module, "enabled", True):
            return
        primitives = tuple(_primitive_of(expert) for expert in module.experts)
        width = x.shape[-1] + output.shape[-1]
        tokens = x.numel() // x.shape[-1]
        self.mixtures[name] = Mixture(name, tokens, primitives, width)
        # Gathering each expert's tokens and putting its results back: every token once in, once out.
        self._record(Stream(name, "dispatch", "dispatch", tokens * width, tokens * width, tokens * width, tokens))

    def _operator(self, operator: str, args: tuple, results: list[Tensor]) -> None:
        if self.muted or not results:
            return
        module = self.stack[-1] if self.stack else self.model
        if module in self.mixed and operator in ("where", "eq"):
            return  # how the reference path selects; `dispatch` stands for it
        found = classify.operator(operator, self.names[module], module in self.layers, args, results)
        if found is None:
            key = (operator, "the energy model does not know this operator")
            self.unknown[key] = self.unknown.get(key, 0) + 1
        else:
            self._record(*found)

    def _record(self, *operations: Operation) -> None:
        experts = tuple(self.experts[module] for module in self.stack if module in self.experts) if self.experts else ()
        self.operations.extend(replace(operation, experts=experts) if experts else operation for operation in operations)


def _is_whole(module: nn.Module) -> bool:
    primitive = getattr(module, "primitive", "mult")
    if primitive not in PRIMITIVES:
        raise UserError(f"{type(module).__name__}.primitive must be one of {', '.join(PRIMITIVES)}, got {primitive!r}")
    return primitive != "mult"


def _is_mixture(module: nn.Module) -> bool:
    return isinstance(getattr(module, "router", None), Router) and isinstance(getattr(module, "experts", None), nn.ModuleList)


def _is_layer(module: nn.Module) -> bool:
    """Whether hooks on leaf modules would see it: no children, and weights of its own."""
    return not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))


def _primitive_of(expert: nn.Module) -> str:
    declared = {getattr(module, "primitive", "mult") for module in expert.modules()}
    return "shift" if "shift" in declared else next(iter(declared - {"mult"}), "mult")

