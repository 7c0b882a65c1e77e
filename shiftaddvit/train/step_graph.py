"""A training step recorded once as a CUDA graph, then replayed: the same kernels on the same numbers, without the host's work for each.

A step of a converted model launches thousands of small kernels, and launching them takes longer than running them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

WARM_UP = 3
"""Steps that run as they are before one is recorded; the second also shows whether a step waits for the device, which cannot be recorded."""


class _Recorded(NamedTuple):
    """One graph, where its inputs go, and where it leaves the loss."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    loss: Tensor


class StepGraph:
    """Runs a step, from the fourth on as a recorded graph.

    Random numbers, learning rates and the optimiser's state are those that every step would have without a graph. Batches of forms beyond
    the first `forms` run as they are; a form is the shapes and dtypes of a batch's tensors, and whatever else is in it.

    Args:
        step: from a batch to the loss, detached; updates the weights, and leaves no gradients. It must not seed anything.
        optimizer: the one that `step` uses, without wrappers.
        note: gets one sentence: that steps are recorded, or why not.
        reason: why steps cannot be recorded, if that is known already; `why_not` knows some.
        forms: how many forms of batches to record.
    """

    def __init__(
        self, step: Callable[..., Tensor], optimizer: torch.optim.Optimizer, note: Callable[[str], None], reason: str | None = None, forms: int = 1
    ):
        self.step, self.optimizer, self.note, self.forms = step, optimizer, note, forms
        found = why_not(optimizer)
        self.reason = found if found == NO_GPU else reason or found
        self.done = 0
        self.ran: set[tuple] = set()
        self.recorded: dict[tuple, _Recorded] = {}
        if self.reason is None:
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
        elif self.reason != NO_GPU:
            self.note(f"steps are not recorded as a CUDA graph: {self.reason}")

    def takes(self, *batch: Any) -> bool:
        """Whether `run` may have this batch."""
        return self.reason is None and (len(self.recorded) < self.forms or _form(batch) in self.recorded)

    def run(self, *batch: Any) -> Tensor:
        """One step; the loss, detached."""
        form = _form(batch)
        if form not in self.recorded:
            with self._aside():
                if self.done < WARM_UP or form not in self.ran:
                    self.done += 1
                    self.ran.add(form)
                    return self._warm_up(batch)
                self._record(form, batch)
        return self._replay(self.recorded[form], batch)

    def _warm_up(self, batch: tuple) -> Tensor:
        if self.done == 2:
            try:
                with _no_waiting():
                    return self.step(*batch)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                self.reason = "a step waits for the device"
                self.note(f"steps are not recorded as a CUDA graph: {self.reason}")
                self.optimizer.zero_grad(set_to_none=True)
        return self.step(*batch)

    def _record(self, form: tuple, batch: tuple) -> None:
        groups = self.optimizer.param_groups
        leaves, tree = tree_flatten(batch)
        if not self.recorded:
            self.rates = [torch.tensor(group["lr"], dtype=torch.float32, device=self.stream.device) for group in groups]
        held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        graph = torch.cuda.CUDAGraph()
        with _recordable(groups, self.rates), torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            loss = self.step(*tree_unflatten(held, tree))
        if not self.recorded:
            self.note("steps are recorded as a CUDA graph")
        self.recorded[form] = _Recorded(graph, [leaf for leaf in held if isinstance(leaf, Tensor)], loss)

    def _replay(self, recorded: _Recorded, batch: tuple) -> Tensor:
        for held, given in zip(recorded.inputs, (leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)), strict=True):
            held.copy_(given)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        recorded.graph.replay()
        return recorded.loss.clone()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream that records: gradients remember the stream that they were first computed on."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


NO_GPU = "there is no GPU"


def why_not(optimizer: torch.optim.Optimizer) -> str | None:
    """Why steps with this optimiser cannot be recorded, as far as one can tell before the first; None where they may be."""
    if optimizer.param_groups[0]["params"][0].device.type != "cuda":
        return NO_GPU
    if not optimizer.param_groups[0].get("fused"):
        return "the optimiser is not one of torch's fused ones"
    return None


def recording() -> bool:
    """Whether what runs now is being recorded: then nothing may be seeded, and memory that runs out is the end of it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _form(batch: tuple) -> tuple:
    leaves, _ = tree_flatten(batch)
    return tuple((leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _recordable(groups: list[dict], rates: list[Tensor]) -> Iterator[None]:
    """Learning rates are read from the device at every replay; afterwards they are numbers again, as the schedule and checkpoints know them."""
    before = [(group["lr"], group.get("capturable", False)) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"], group["capturable"] = rate, True
    try:
        yield
    finally:
        for group, (lr, capturable) in zip(groups, before, strict=True):
            group["lr"], group["capturable"] = lr, capturable
