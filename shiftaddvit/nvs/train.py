"""Training a view model: on one scene, across scenes, or on after conversion. A kill at any moment costs minutes at most."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from shiftaddvit.conditions import conditions
from shiftaddvit.errors import UserError
from shiftaddvit.layers.router import record_routing
from shiftaddvit.schema import stamped
from shiftaddvit.train.guard import NotFinite
from shiftaddvit.train.interrupt import Interrupted, deferred_interrupt
from shiftaddvit.train.latency import expert_costs
from shiftaddvit.train.optim import parameter_groups
from shiftaddvit.train.progress import TrainingProgress
from shiftaddvit.train.run_folder import CHECKPOINT, MODEL, RunFolder, told_when_full
from shiftaddvit.train.step_graph import StepGraph, recording

from .batch import Batch, TrainingScene, draw_batch, step_seed
from .card import ViewFacts
from .check import HeldOut
from .gnt import GNT
from .memory import Chunk, first_chunk, out_of_memory
from .pace import Pace
from .scene import Scene, check_sources
from .state import kind_of, save_model
from .step import Balance, add_gradients, measure_costs
from .train_config import NvsTrainConfig


MOST_GRAPHS = 24
"""Recorded steps: one for every scene and number of source views, each with its inputs; batches beyond them run as they are."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended."""

    steps: int
    """Steps done."""
    seconds: float
    """Time spent in steps, over all resumptions."""
    train_psnr: float | None
    """On the training batches since the last look, dB; None when a finished run was resumed."""
    held_out_psnr: float | None
    """On fixed pixels of held-out views, dB; None without held-out views."""
    finished: bool = True
    """False when the run stopped at the time it was told to, with a checkpoint to resume from."""


def train(
    model: nn.Module,
    scenes: Sequence[Scene],
    folder: str | Path,
    config: NvsTrainConfig = NvsTrainConfig(),
    device: torch.device | str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
    until: float | None = None,
) -> TrainResult:
    """Train `model` (GNT, converted or not, or NeRF) on the training views of `scenes`; writes `model.safetensors`, `log.jsonl` and
    `result.json` into `folder`.

    `until` is a time of `time.monotonic()` at which the run saves a checkpoint and returns unfinished, to be resumed: for machines that
    are lent by the hour. UserError before anything is written for scenes with too few views, or a folder that holds another run; `NotFinite` when the loss is
    no longer a number, after which `model.safetensors` is the last good state; `Interrupted` for Ctrl-C or SIGTERM, after a checkpoint.
    """
    for scene in scenes:
        check_sources(scene, max(1, model.sources))
    if model.sources == 0 and len(scenes) != 1:
        raise UserError(f"NeRF knows one scene; {len(scenes)} were given")
    run = RunFolder(Path(folder))
    description = {"model": kind_of(model), "shape": asdict(model.config), "recipe": _recipe(model), "train": asdict(config)}
    description["scenes"] = [{"name": scene.name, "views": len(scene), "width": scene.width} for scene in scenes]
    going_on = run.open(description, resume, overwrite)
    training = _Training(model.to(device).train(), [TrainingScene.of(scene, device) for scene in scenes], run, config, device)
    return training.run(going_on, show, math.inf if until is None else until)


def _recipe(model: nn.Module) -> dict | None:
    recipe = getattr(model, "shiftaddvit_recipe", None)
    return None if recipe is None else recipe.to_dict()


class _Training:
    """The state of a run: parameters, optimiser, step, seconds."""

    def __init__(
        self, model: nn.Module, scenes: list[TrainingScene], run: RunFolder, config: NvsTrainConfig, device: torch.device | str
    ):
        self.model, self.scenes, self.folder, self.config, self.device = model, scenes, run, config, device
        self.optimizer = torch.optim.Adam(_groups(model, config), lr=config.lr, fused=torch.device(device).type == "cuda")
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.chunk = Chunk(min(config.rays, first_chunk(model.bytes_per_ray(True), device)))
        self.held_out = HeldOut.of(scenes[0].scene, device)
        self.step, self.seconds = 0, 0.0
        self.looked = TrainResult(0, 0.0, None, None)
        note = lambda text: run.log({"event": "note", "note": text})  # noqa: E731
        forms = min(MOST_GRAPHS, len(scenes) * (1 + 2 * config.source_jitter))
        self.graph = StepGraph(self._update, self.optimizer, note, forms=forms) if config.cuda_graph else None
        self.balance: Balance | None = None
        self.pace = Pace(config.rays)
        if config.compile and not expert_costs(model):
            for part in (model.net_coarse, model.feature_net) if isinstance(model, GNT) else (model.coarse, model.fine):
                part.compile()

    def run(self, going_on: bool, show: bool, until: float) -> TrainResult:
        if going_on:
            self._restore()
        total = self.config.steps if self.config.minutes is None else math.ceil(60 * self.config.minutes)
        mixtures = bool(expert_costs(self.model)) and self.config.balance_weight > 0
        bar = TrainingProgress("train", total, self._done(), show)
        bar.say(f"steps of {self.config.rays} rays with {self.model.samples} points each on {self.device}")
        if mixtures and self.config.measure_latency and not going_on:
            measure_costs(self.model, self._batch())
        self.pace = Pace(self.config.rays, self.config.minutes, bar.say)
        with bar as progress, record_routing(self.model) as records, deferred_interrupt() as asked:
            if mixtures:
                self.balance = Balance(records, expert_costs(self.model), self.config.balance_weight)
            result = self._loop(progress, until, asked)
            if result.finished:
                self._write(result)
            if asked():
                raise Interrupted
        return result

    def _write(self, result: TrainResult) -> None:
        described = {
            "model": kind_of(self.model), "recipe": getattr(getattr(self.model, "shiftaddvit_recipe", None), "name", None),
            "scenes": [one.scene.name for one in self.scenes], "conditions": conditions(self.device, seed=self.config.seed),
        }  # fmt: skip
        self.folder.write_result(stamped("nvs-train", described | asdict(result)))

    def _loop(self, progress: TrainingProgress, until: float, asked: Callable[[], bool]) -> TrainResult:
        saved, since, errors = time.monotonic(), 0, torch.zeros((), device=self.device)
        result = TrainResult(self.step, self.seconds, None, None)
        while not self._finished():
            start = time.monotonic()
            if start >= until or asked():
                self._save(errors)
                return replace(result, steps=self.step, seconds=self.seconds, finished=False)
            errors += self._one_step()
            since += 1
            self.seconds += time.monotonic() - start
            if self.pace.cut is not None and self.held_out:  # a look at all its pixels would take longer than the training
                self.held_out = HeldOut.of(self.scenes[0].scene, self.device, self.pace.cut)
            due = self.step % self.config.check_every == 0 or self._finished()
            if due:
                start = time.monotonic()
                result = self._look(errors.item() / since)
                errors, since = torch.zeros((), device=self.device), 0
                self.seconds += time.monotonic() - start
            while progress.done < min(self._done(), progress.total):
                progress.step()
            if due:
                progress.epoch(f"step {self.step}, train {_db(result.train_psnr)}, held out {_db(result.held_out_psnr)}")
            if self._finished() or time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                self._save(errors)
                saved = time.monotonic()
        return result

    def _one_step(self) -> torch.Tensor:
        config = self.config
        factor = config.lr_factor(self.step, self._progress())
        for group, lr in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = lr * factor
        batch = self._batch()
        self.pace.start(self.seconds)
        torch.manual_seed(step_seed(config.seed, self.step))
        if self.graph is not None and self.graph.takes(batch):
            try:
                error = self.graph.run(batch)
            except RuntimeError as failure:
                if not out_of_memory(failure):
                    raise
                self.graph = None  # recorded steps keep their memory; without them there may be enough
                return self._one_step()
        else:
            error = self._update(batch)
        self.step += 1
        return error

    def _update(self, batch: Batch) -> torch.Tensor:
        """Gradients, clipping, optimiser; the squared error."""

        def work(rays: int) -> torch.Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            if not recording():
                torch.manual_seed(step_seed(self.config.seed, self.step))
            return add_gradients(self.model, batch, self.config.precision, self.balance, rays, None if recording() else self.pace.seen)

        error = self.chunk.attempt(work)
        if self.config.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return error

    def _batch(self) -> Batch:
        config = self.config
        return draw_batch(self.scenes, self.step, config.seed, config.rays, self.model.sources, config.source_jitter)

    def _look(self, error: float) -> TrainResult:
        if not math.isfinite(error):
            self._stop(f"the loss is {error}")
        held_out = self.held_out.psnr(self.model, self.scenes[0].bank, self.config.precision) if self.held_out else None
        result = TrainResult(self.step, self.seconds, -10 * math.log10(max(error, 1e-12)), held_out)
        self.folder.log(asdict(result) | {"rays_at_once": self.chunk.rays})
        self.looked = result
        return result

    def _stop(self, why: str) -> None:
        good = self.folder.path / MODEL
        kept = f"the last good state is {good}" if good.exists() else "no checkpoint had been written yet"
        raise NotFinite(f"training stopped at step {self.step}: {why}; {kept}. Resume with a lower learning rate or precision fp32")

    def _save(self, errors: torch.Tensor) -> None:
        """Never over a good checkpoint with a bad one."""
        if not torch.isfinite(errors):
            self._stop("the loss is not a number")
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                self._stop(f"parameter {name} is not finite")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds}
        with told_when_full(self.folder.path):
            save_model(self.model, self.folder.path / MODEL, self._facts())
        self.folder.save_checkpoint(state)  # last: a run with a checkpoint has a model

    def _facts(self) -> ViewFacts:
        scene = self.scenes[0].scene
        facts = ViewFacts(
            tuple(one.scene.name for one in self.scenes), scene.width, scene.height, sum(len(one.scene.train) for one in self.scenes),
            self.step, self.seconds, self.config.rays,
        )  # fmt: skip
        if self.held_out is None or self.looked.steps != self.step:
            return facts
        measured = conditions(self.device, precision=self.config.precision)
        return replace(
            facts, psnr=self.looked.held_out_psnr, held_out_views=len(self.held_out.views), held_out_pixels=self.held_out.pixels,
            conditions={key: measured[key] for key in ("device", "precision", "torch", "time")},
        )  # fmt: skip

    def _restore(self) -> None:
        state = self.folder.load_checkpoint()
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder.path / CHECKPOINT} does not fit this model: {str(error).splitlines()[0]}") from None
        self.step, self.seconds = state["step"], state["seconds"]

    def _progress(self) -> float:
        by_clock = 0.0 if self.config.minutes is None else self.seconds / (60 * self.config.minutes)
        return max(self.step / self.config.steps, by_clock)

    def _finished(self) -> bool:
        return self._progress() >= 1

    def _done(self) -> int:
        return self.step if self.config.minutes is None else int(self.seconds)


def _groups(model: nn.Module, config: NvsTrainConfig) -> list[dict]:
    if not isinstance(model, GNT):
        return parameter_groups(model, 0.0, config.lr, config.shift_lr_scale)
    body = parameter_groups(model.net_coarse, 0.0, config.lr, config.shift_lr_scale)
    return body + parameter_groups(model.feature_net, 0.0, config.lr_features, config.shift_lr_scale)


def _db(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} dB"
