"""A training step recorded once as a CUDA graph, then replayed: the same kernels on the same numbers, without the host's work for each.

A step of a converted model launches thousands of small kernels, and launching them takes longer than running them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .update import Update, unwrapped

WARM_UP = 3
"""Steps that run as they are before one is recorded; the second also shows whether a step waits for the device, which cannot be recorded."""


class StepGraph:
    """Runs an `Update`, from the fourth step on as one recorded graph.

    Batches of another shape than the recorded one run as they are. Random numbers, learning rates and the optimiser's state are those
    that every step would have without a graph.

    Args:
        update: what a step does.
        note: gets one sentence: that steps are recorded, or why not.
    """

    def __init__(self, update: Update, note: Callable[[str], None]):
        self.update, self.note = update, note
        self.reason = why_not(update)
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.reason is None:
            self.stream = torch.cuda.Stream()
        elif self.update.accelerator.device.type == "cuda":
            self.note(f"steps are not recorded as a CUDA graph: {self.reason}")

    def takes(self, images: Tensor, targets: Tensor) -> bool:
        """Whether `run` may have this batch."""
        return self.reason is None and (self.graph is None or _form(images, targets) == _form(self.images, self.targets))

    def run(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step; the loss, detached."""
        if self.graph is not None:
            self.images.copy_(images)
            self.targets.copy_(targets)
            return self._replay()
        with self._aside():
            if self.done < WARM_UP:
                loss = self._warm_up(images, targets)
            else:
                self._record(images, targets)
                loss = None
        self.done += 1
        return self._replay() if loss is None else loss

    def _warm_up(self, images: Tensor, targets: Tensor) -> Tensor:
        if self.done == 1:
            try:
                with _no_waiting():
                    return self._step(images, targets)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                self._give_up("a step waits for the device")
                self.update.optimizer.zero_grad(set_to_none=True)
        return self._step(images, targets)

    def _step(self, images: Tensor, targets: Tensor) -> Tensor:
        loss = self.update.loss(images, targets)
        self.update.learn(loss)
        return loss.detach()

    def _record(self, images: Tensor, targets: Tensor) -> None:
        groups = unwrapped(self.update.optimizer).param_groups
        self.images, self.targets = images.clone(), targets.clone()
        self.rates = [torch.tensor(group["lr"], dtype=torch.float32, device=images.device) for group in groups]
        graph = torch.cuda.CUDAGraph()
        with _recordable(groups, self.rates), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.loss = self._step(self.images, self.targets)
        self.graph = graph
        self.note("steps are recorded as a CUDA graph")

    def _replay(self) -> Tensor:
        for rate, group in zip(self.rates, unwrapped(self.update.optimizer).param_groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        return self.loss.clone()

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self.note(f"steps are not recorded as a CUDA graph: {reason}")

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream that records: gradients remember the stream that they were first computed on."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


def why_not(update: Update) -> str | None:
    """Why steps cannot be recorded, as far as one can tell before the first; None where they may be."""
    accelerator, optimizer = update.accelerator, unwrapped(update.optimizer)
    if accelerator.device.type != "cuda":
        return "there is no GPU"
    if accelerator.num_processes > 1:
        return "several processes share the work"
    if accelerator.scaler is not None:
        return "fp16 gradients are scaled by a factor that the host decides"
    if not optimizer.param_groups[0].get("fused"):
        return "the optimiser is not torch's fused AdamW"
    return None


def _form(images: Tensor, targets: Tensor) -> tuple:
    return images.shape, images.dtype, images.stride(), targets.shape, targets.dtype


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
