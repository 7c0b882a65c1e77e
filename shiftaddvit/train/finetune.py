"""Two-stage fine-tuning of a converted model: attention first, then the linears (ShiftAddViT section 5)."""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from shiftaddvit.conditions import conditions
from shiftaddvit.cost import expert_energies
from shiftaddvit.errors import UserError
from shiftaddvit.evaluation import Evaluation, evaluate
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.packed import is_packed
from shiftaddvit.model_card import ModelFacts
from shiftaddvit.processes import this_process
from shiftaddvit.reparam.architecture import architecture_of
from shiftaddvit.reparam.calibrate import calibrate, needs_calibration
from shiftaddvit.reparam.stages import attention_only, converts_linears, to_attention_stage, to_linear_stage
from shiftaddvit.schema import stamped
from shiftaddvit.serialization import check_savable, save

from .config import FinetuneConfig, StageConfig
from .latency import profile_experts, profiles_to_json, set_expert_costs
from .plan import plan_stages
from .position import Position, step_seed
from .resume import place, reached
from .run_folder import IMAGES, MODEL, RunFolder, loading
from .stage import StageRun, train_stage


@dataclass(frozen=True)
class FinetuneResult:
    """What a run reached."""

    evaluation: Evaluation | None
    """The last evaluation; None without a validation loader."""
    history: list[dict[str, Any]]
    """One entry an evaluation: stage, epoch, top1, loss."""
    stages: tuple[StageConfig, ...]
    """The stages that ran."""
    ended_before: bool = False
    """Whether a run was resumed that had ended: nothing was trained, evaluated or written."""


def finetune(
    model: nn.Module,
    train_loader: Iterable[tuple[Tensor, Tensor]],
    val_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    config: FinetuneConfig = FinetuneConfig(),
    *,
    output: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    teacher: nn.Module | None = None,
    show: bool = True,
    data: Mapping[str, Any] | None = None,
) -> FinetuneResult:
    """Train `model` in place, in the stages of `config`; a dense model trains as it is.

    The first stage trains the converted attention with multiplying linears, the second converts the linears from the weights that
    stage reached. Hash functions are calibrated on the first batch (with several processes rank 0's are broadcast), and both experts
    of every mixture are timed on this device for the balance loss. Works under `torchrun`, one process a device.

    Args:
        train_loader: yields images (B, 3, H, W) and targets (B,) or (B, classes). `set_epoch(e)` and `start_at(step)` let it resume inside
            an epoch at once; any other is read up to there, and resumes exactly as long as it draws from torch's random numbers only.
        output: folder for the log, checkpoints and result; without one nothing is written.
        resume: go on from the folder's last complete checkpoint. A run that had ended changes nothing in its folder.
        overwrite: replace the run that the folder holds.
        teacher: the dense model, for `config.distill_weight`.
        data: what the images are (`ImageData.identity()` of each split, say), as plain JSON values: on resume they must be the same.

    Raises:
        UserError: a folder that holds another run, a full disk, a packed model, or, with `output`, a model that cannot be saved.
        NotFinite: the loss is no number; names the step and layer, and the last good checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint.
    """
    if is_packed(model):
        raise UserError("the model is packed and no longer trains: give the one it was packed from")
    this_process()
    # accelerate remembers the precision of the first run in this process, and refuses another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=config.precision)
    stages = plan_stages(model, config)
    if config.distill_weight and teacher is None:
        raise UserError(f"distill_weight={config.distill_weight} needs a teacher: the dense model before conversion")
    folder = RunFolder(Path(output), accelerator.is_main_process) if output is not None else None
    resuming = False
    if folder is not None:
        if not resume:  # a model that was stopped in the first stage has that stage's form still
            check_savable(model)
        recipe = getattr(model, "shiftaddvit_recipe", None)
        described = {"config": asdict(config), "recipe": recipe and recipe.to_dict(), "model": asdict(architecture_of(model))}
        described["number of batches an epoch"] = len(train_loader)
        described[IMAGES] = data
        resuming = _open(folder, described, resume, overwrite, accelerator)
    session = _Session(model, val_loader, config, stages, accelerator, folder, teacher, show)
    session.loading = loading(train_loader, accelerator.num_processes)
    session.run(train_loader, folder.load_checkpoint() if resuming else None)
    return FinetuneResult(session.last, session.history, stages, session.ended_before)


def _open(folder: RunFolder, description: dict, resume: bool, overwrite: bool, accelerator: Accelerator) -> bool:
    """Only the main process looks, so that none takes what it writes for another run; all learn what it found."""
    found: list[Any] = [False, None]
    if accelerator.is_main_process:
        try:
            found[0] = folder.open(description, resume, overwrite)
        except UserError as error:
            found[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


class _Session:
    """One run over its stages."""

    def __init__(self, model, val_loader, config, stages, accelerator, folder, teacher, show):
        self.model, self.val_loader, self.config, self.stages = model, val_loader, config, stages
        self.accelerator, self.folder, self.teacher = accelerator, folder, teacher
        self.show = show and accelerator.is_main_process
        self.history: list[dict[str, Any]] = []
        self.last: Evaluation | None = None
        self.loading: dict[str, Any] = {}
        self.board = None
        self.ended_before = False

    def run(self, train_loader: Any, checkpoint: dict | None) -> None:
        position = Position()
        device = self.accelerator.device
        self.model.to(device)
        if self.config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.teacher is not None:
            self.teacher.to(device).eval().requires_grad_(False)
        if checkpoint is not None:
            position = Position(**checkpoint["position"])
            self.history = checkpoint["history"]
            if self.folder is not None:
                self.ended_before, self.last = reached(self.folder.path, position, self.stages, self.val_loader is not None)
            if not self.ended_before:
                self._log({"event": "resume", **checkpoint["position"]})
                self._say(f"resuming in {place(position, self.stages, len(train_loader))}")
        else:
            self._log({"event": "start", "conditions": conditions(device)})
        for number in range(len(self.stages)):
            if checkpoint is not None and number > position.stage:
                checkpoint = None
            if number < position.stage:
                self._prepare(number, train_loader, calibrated=True)
                continue
            if position.stage != number:
                position = Position(stage=number)
            self._prepare(number, train_loader, calibrated=checkpoint is not None)
            if checkpoint is not None:
                self.model.load_state_dict(checkpoint["model"])
            if position.epoch < self.stages[number].epochs:
                result = train_stage(self._stage_run(number, train_loader), position, checkpoint and checkpoint["state"])
            else:
                result = _with_weights(self.model, checkpoint["state"]["ema"])
            if result is not self.model:
                self.model.load_state_dict(result.state_dict())
            checkpoint = None
        self._finish()

    def _prepare(self, number: int, train_loader: Any, calibrated: bool) -> None:
        """Give the model the form of a stage."""
        stage = self.stages[number]
        # New routers draw from a seed of their own, whatever happened before.
        torch.manual_seed(step_seed(self.config.seed, Position(stage=number, step=-1)))
        if stage.primitives == "attention":
            to_attention_stage(self.model)
        elif number > 0 and self.stages[number - 1].primitives == "attention":
            to_linear_stage(self.model)
        self.model.to(self.accelerator.device)
        if calibrated:
            return
        mixtures = any(isinstance(module, (MoELinear, MoEMlp)) for module in self.model.modules())
        measure = mixtures and self.config.cost != "equal" and self.config.balance_weight > 0
        if needs_calibration(self.model) or measure:
            images = _first_images(train_loader).to(self.accelerator.device)
        if needs_calibration(self.model):
            trained = calibrate(self.model, images[:8], seed=self.config.seed)
            self._log({"event": "calibrate", "hash_functions": trained})
        if measure:
            costs = self._expert_costs(images)
            set_expert_costs(self.model, costs)
            self._log({"event": "expert costs", "cost": self.config.cost, "of": costs})
        if self.accelerator.num_processes > 1:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                torch.distributed.broadcast(tensor.data, src=0)

    def _expert_costs(self, images: Tensor) -> dict[str, list[float]]:
        """Seconds on this device, or modelled picojoules, of each expert of each mixture."""
        if self.config.cost != "latency":
            return expert_energies(self.model, tuple(images.shape))
        profiles = profile_experts(self.model, images)
        if self.folder is not None:
            self.folder.write_latency(profiles_to_json(profiles))
        if not all(profile["steady"] for profile in profiles.values()):
            self._log({"event": "note", "note": "expert times are unsteady: the machine was busy; they hold for this run and are not kept"})
        return {name: profile["seconds"] for name, profile in profiles.items()}

    def _stage_run(self, number: int, train_loader: Any) -> StageRun:
        return StageRun(
            self.model, self.teacher, train_loader, self.config, self.stages[number], self.accelerator,
            self._log, self._checkpoint, self._evaluate, self.show,
        )  # fmt: skip

    def _checkpoint(self, position: Position, state: dict) -> None:
        if self.folder is not None:
            model = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
            self.folder.save_checkpoint({"position": vars(position).copy(), "model": model, "state": state, "history": self.history})
        self.accelerator.wait_for_everyone()

    def _evaluate(self, model: nn.Module, position: Position) -> str:
        stage = self.stages[position.stage]
        every = self.config.evaluate_every
        due = position.epoch == stage.epochs or (every and position.epoch % every == 0)
        if self.val_loader is None or not due:
            return f"epoch {position.epoch}/{stage.epochs}"
        self.last = evaluate(model, self.val_loader, device=self.accelerator.device, amp_dtype=self._amp_dtype(), progress=False)
        entry = {"stage": position.stage, "epoch": position.epoch, "top1": self.last.top1, "loss": self.last.loss}
        self.history.append(entry)
        self._log({"event": "evaluate", **entry})
        return f"epoch {position.epoch}/{stage.epochs}, top-1 {self.last.top1:.2f} %"

    def _amp_dtype(self) -> torch.dtype | None:
        return {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[self.config.precision]

    def _finish(self) -> None:
        self.model.eval()
        if self.stages[-1].primitives == "attention" and converts_linears(self.model):
            # No stage converted the linears: what was trained is the attention part of the recipe.
            self.model.shiftaddvit_recipe = attention_only(self.model.shiftaddvit_recipe)
        if self.ended_before:
            return
        if self.last is None and self.val_loader is not None:
            self.last = evaluate(self.model, self.val_loader, device=self.accelerator.device, amp_dtype=self._amp_dtype(), progress=False)
        if self.folder is None or not self.accelerator.is_main_process:
            return
        outcome = self.last.to_json() if self.last is not None else None
        stages = ", then ".join(f"{stage.label} for {stage.epochs} epochs at {stage.lr:g}" for stage in self.stages)
        facts = ModelFacts.of_evaluation(outcome, training=f"{stages}; {self.config.optimizer}, seed {self.config.seed}")
        save(self.model, self.folder.path / MODEL, facts=facts)
        recipe = getattr(self.model, "shiftaddvit_recipe", None)
        result = stamped(
            "finetune",
            {
                "model": asdict(architecture_of(self.model)),
                "recipe": recipe.to_dict() if recipe is not None else None,
                "evaluation": outcome,
                "history": self.history,
                "stages": [asdict(stage) for stage in self.stages],
                "config": asdict(self.config),
                "loading": self.loading,
                "conditions": conditions(self.accelerator.device, seed=self.config.seed),
            },
        )
        self.folder.write_result(result)

    def _say(self, text: str) -> None:
        if self.show:
            print(text, file=sys.stderr, flush=True)

    def _log(self, event: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.log(event)
        if self.config.tensorboard and self.folder is not None and self.accelerator.is_main_process:
            self._to_board(event)

    def _to_board(self, event: dict[str, Any]) -> None:
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder.path / "tensorboard")
        if event.get("event") in ("step", "evaluate"):
            label = self.stages[event["stage"]].label
            for key in ("loss", "top1", "lr", "images_per_second"):
                if event.get(key) is not None:
                    self.board.add_scalar(f"{label}/{event['event']}/{key}", event[key], event["epoch"] * 100_000 + event.get("step", 0))


def _first_images(loader: Any) -> Tensor:
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    return next(iter(loader))[0]


def _with_weights(model: nn.Module, ema: dict | None) -> nn.Module:
    if ema is not None:
        model.load_state_dict(ema)
    return model
