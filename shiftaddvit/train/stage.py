"""Training one stage: the loop itself. Every step's randomness depends on (seed, stage, epoch, step, rank) alone, so that a run which
continues from a checkpoint equals one that was never stopped."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from shiftaddvit.layers.router import record_routing

from .compiling import compiled
from .config import FinetuneConfig, StageConfig
from .guard import NotFinite, first_broken_layer
from .interrupt import Interrupted, deferred_interrupt
from .optim import make_optimizer
from .position import Position, batches_from, step_seed
from .progress import TrainingProgress
from .step_graph import StepGraph
from .update import Update, unwrapped


@dataclass(frozen=True)
class StageRun:
    """All that one stage's loop needs, and the hooks through which it reports."""

    model: nn.Module
    """The model itself, unwrapped."""
    teacher: nn.Module | None
    """The dense model to distil from."""
    train_loader: Any
    """Yields (images, targets); has `set_epoch` and `start_at` to resume inside an epoch."""
    config: FinetuneConfig
    """The run."""
    stage: StageConfig
    """This stage."""
    accelerator: Accelerator
    """Devices, precision, processes."""
    log: Callable[[dict], None]
    """Takes one event."""
    checkpoint: Callable[[Position, dict], None]
    """Writes a checkpoint of (position, optimiser and EMA state)."""
    evaluate: Callable[[nn.Module, Position], str]
    """Evaluates at an epoch's end; returns a note for the progress line."""
    show: bool
    """Whether to show progress."""


def train_stage(run: StageRun, position: Position, state: dict | None) -> nn.Module:
    """Train from `position` to the stage's end; returns the weights that count (the EMA's, where there is one)."""
    config, stage, accelerator = run.config, run.stage, run.accelerator
    steps = len(run.train_loader)
    scale = _total_batch(run) / 512
    device = accelerator.device
    optimizer = make_optimizer(
        run.model, config.optimizer, stage.lr * scale, config.weight_decay, config.shift_lr_scale, device.type == "cuda", config.adder_lr_scale
    )
    schedule = CosineLRScheduler(
        optimizer, t_initial=stage.epochs * steps, lr_min=stage.min_lr * scale,
        warmup_t=stage.warmup_steps(steps), warmup_lr_init=stage.warmup_lr * scale, warmup_prefix=False, t_in_epochs=False,
    )  # fmt: skip
    ema = ModelEmaV3(run.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    if state:
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.module.load_state_dict(state["ema"])
    with record_routing(run.model) as routing, _own_forward(run.model):
        model, optimizer = accelerator.prepare(run.model, optimizer)
        if state and state.get("scaler") and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        how = config.compile if stage.compile is None else stage.compile
        with compiled(run.model, model, how) as fast:
            update = Update(fast, run.model, optimizer, routing, config, accelerator, run.teacher)
            loop = _Loop(run, fast, update, schedule, ema, steps)
            total, done = stage.epochs * steps, position.epoch * steps + position.step
            with TrainingProgress(f"stage {position.stage + 1} ({stage.label})", total, done, run.show) as progress, deferred_interrupt() as asked:
                loop.run(position, progress, asked)
    accelerator.free_memory()
    return ema.module if ema is not None else run.model


class _Loop:
    """The state that changes from step to step."""

    def __init__(self, run: StageRun, model: nn.Module, update: Update, schedule, ema, steps: int):
        self.run_, self.model, self.update, self.schedule, self.ema = run, model, update, schedule, ema
        self.optimizer, self.steps = update.optimizer, steps
        self.graph = self._graph() if run.config.cuda_graph else None
        self.losses: list[Tensor] = []
        self.first_loss_step = 0
        self.mean_loss = math.nan
        self.unlogged: list[float] = []
        self.check_every = 1 if run.accelerator.device.type == "cpu" else run.config.log_every
        self.images = 0
        self.since = time.monotonic()
        self.saved = time.monotonic()

    def _graph(self) -> StepGraph:
        accelerator, reason = self.run_.accelerator, None
        if accelerator.num_processes > 1:
            reason = "several processes share the work"
        elif accelerator.scaler is not None:
            reason = "fp16 gradients are scaled by a factor that the host decides"
        note = lambda text: self.run_.log({"event": "note", "note": text})  # noqa: E731
        return StepGraph(self.update.step, unwrapped(self.optimizer), note, reason)

    def run(self, position: Position, progress: TrainingProgress, asked: Callable[[], bool]) -> None:
        run, self.position = self.run_, position
        while position.epoch < run.stage.epochs:
            batches = batches_from(run.train_loader, position, run.config.seed, run.accelerator.process_index)
            self.model.train()
            if position.step == 0:
                self.log(position, event="epoch")
            for images, targets in batches:
                self.train_step(images, targets, position)
                position.step += 1
                progress.step()
                last = position.step == self.steps
                looked = position.step % self.check_every == 0 or last
                if looked:
                    self.check(images)
                    self.report(position, progress, position.step % run.config.log_every == 0 or last)
                stop, due = self.wanted(asked, looked)
                if stop or (due and not last):
                    self.check(images)
                    self.report(position, progress, True)
                    self.save(position)
                    if stop:
                        raise Interrupted
            position.epoch, position.step = position.epoch + 1, 0
            progress.epoch(run.evaluate(self.ema.module if self.ema is not None else run.model, position))
            stop, due = self.wanted(asked, True)
            if stop or due or position.epoch == run.stage.epochs:
                self.save(position)
            if stop:
                raise Interrupted
            self.since, self.images = time.monotonic(), 0

    def wanted(self, asked: Callable[[], bool], together: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether a checkpoint is due. Several processes must agree, so they ask each other where they are
        `together`, which on a GPU is every `log_every` steps."""
        accelerator = self.run_.accelerator
        if accelerator.num_processes == 1:
            return asked(), self.checkpoint_due()
        if not together:
            return False, False
        flags = torch.tensor([asked(), self.checkpoint_due()], dtype=torch.float32, device=accelerator.device)
        stop, due = (accelerator.reduce(flags, reduction="sum") > 0).tolist()
        return stop, due

    def train_step(self, images: Tensor, targets: Tensor, position: Position) -> None:
        run, config = self.run_, self.run_.config
        device = run.accelerator.device
        number = position.epoch * self.steps + position.step
        self.schedule.step_update(number)
        torch.manual_seed(step_seed(config.seed, position, run.accelerator.process_index))
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.graph is not None and self.graph.takes(images, targets):
            self.seen(self.graph.run(images, targets), position)
        else:
            loss = self.update.loss(images, targets)
            self.seen(loss.detach(), position)
            if device.type == "cpu":
                # Reading the loss costs nothing here, so a bad one stops the run before it reaches the weights.
                self.check(images)
            self.update.learn(loss)
        if self.ema is not None:
            self.ema.update(run.model, step=number)
        self.images += len(images) * run.accelerator.num_processes

    def seen(self, loss: Tensor, position: Position) -> None:
        if not self.losses:
            self.first_loss_step = position.step
        self.losses.append(loss)

    def check(self, images: Tensor) -> None:
        """Look at the losses since the last check; stop at the first that is not finite."""
        run = self.run_
        if not self.losses:
            return
        window = torch.stack(self.losses)
        if run.accelerator.num_processes > 1:
            window = run.accelerator.reduce(window, reduction="mean")
        values = window.tolist()
        self.losses.clear()
        for step, value in enumerate(values, start=self.first_loss_step):
            if not math.isfinite(value):
                where = first_broken_layer(run.model, images.to(run.accelerator.device))
                raise NotFinite(
                    f"the loss is {value} at step {step} of epoch {self.position.epoch}, stage {self.position.stage + 1}: "
                    f"first at {where}; the last good checkpoint is kept"
                )
        self.mean_loss = sum(values) / len(values)
        self.unlogged += values

    def report(self, position: Position, progress: TrainingProgress, write: bool) -> None:
        progress.note(f"loss {self.mean_loss:.3f}")
        if write and self.unlogged:
            self.log(position, event="step", loss=sum(self.unlogged) / len(self.unlogged))
            self.unlogged.clear()

    def log(self, position: Position, **event: Any) -> None:
        seconds = time.monotonic() - self.since
        rate = self.images / seconds if seconds > 0 and self.images else None
        place = {"stage": position.stage, "epoch": position.epoch, "step": position.step}
        self.run_.log({**event, **place, "lr": self.optimizer.param_groups[0]["lr"], "images_per_second": rate})

    def checkpoint_due(self) -> bool:
        return time.monotonic() - self.saved > 60 * self.run_.config.checkpoint_minutes

    def save(self, position: Position) -> None:
        """A checkpoint, unless a parameter is no longer finite."""
        largest = torch._foreach_norm([p.detach() for p in self.run_.model.parameters()], float("inf"))
        if not torch.isfinite(torch.stack(largest)).all():
            name = first_broken_layer(self.run_.model, torch.empty(0))
            raise NotFinite(f"{name} is not finite at epoch {position.epoch}, step {position.step}; the last good checkpoint is kept")
        scaler = self.run_.accelerator.scaler
        state = {
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        self.run_.checkpoint(position, state)
        self.saved = time.monotonic()


def _total_batch(run: StageRun) -> int:
    size = getattr(run.train_loader, "batch_size", None) or next(iter(run.train_loader))[0].shape[0]
    return size * run.accelerator.num_processes


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's forward is its own again: mixed precision wraps it, for good if nobody takes that back."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        if before is not None:
            model.forward = before
