"""Accuracy of a model on labelled images, with what is needed to compare two models on the same images."""

import hashlib
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sized
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from shiftaddvit.conditions import conditions
from shiftaddvit.errors import UserError
from shiftaddvit.intervals import mcnemar, paired_interval, wilson_interval


def evaluate(
    model: nn.Module,
    loader: Iterable,
    *,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> "Evaluation":
    """Top-1, top-5 and cross-entropy of `model` on every image of `loader`.

    Runs in evaluation mode, which is put back afterwards. In a process group every process calls it with its own loader and all get
    the same result; an image that several processes see, because a sampler pads or does not divide, counts once.

    Args:
        model: maps (B, 3, H, W) to logits (B, classes), or to a tuple that begins with them.
        loader: yields (images, labels); labels below 0 mark images that could not be read, which are left out and counted.
        device: where to run; None for where the model is. The model is moved there.
        amp_dtype: run under autocast to this type; None for the model's own type.
        progress: show a progress bar on the terminal (first process only).

    Raises:
        UserError: no images, a label without an output, logits that are not finite, or a loader that cannot be shared out.
    """
    parameter = next(model.parameters(), torch.empty(0))
    device = parameter.device if device is None else torch.device(device)
    parts: list[Tensor] = []
    size: list[int] = []
    modes = {module: module.training for module in model.modules()}
    model.eval().to(device)
    start = time.perf_counter()
    try:
        with torch.no_grad(), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            for images, labels in _tracked(loader, progress):
                images = images.to(device, parameter.dtype if amp_dtype is None else images.dtype, non_blocking=True)
                size = list(images.shape[-2:])
                parts.append(_judge(model(images), labels.to(device, non_blocking=True)))
        judged = torch.cat(parts).cpu() if parts else torch.empty(0, 4)  # one wait for the device, at the end
    finally:
        for module, training in modes.items():
            module.training = training
    seconds = time.perf_counter() - start
    judged = _gather(judged, loader).double()
    read = judged[judged[:, 3] >= 0]
    if len(read) == 0:
        raise UserError(f"the loader gave no image to evaluate ({len(judged)} could not be read)")
    if (read[:, 2] < 0).any():
        raise UserError(f"label {int(read[read[:, 2] < 0, 3].max())}: the model has no such output, it was made for fewer classes")
    broken = int((~read[:, 2].isfinite()).sum())
    if broken:
        raise UserError(f"the loss of {broken} of {len(read)} images is not finite: broken weights, or {amp_dtype or parameter.dtype} overflows")
    correct = read[:, 0].bool()
    return Evaluation(
        top1=100 * read[:, 0].mean().item(),
        top5=100 * read[:, 1].mean().item(),
        loss=read[:, 2].mean().item(),
        images=len(read),
        unreadable=len(judged) - len(read),
        images_per_second=len(judged) / seconds,
        interval95=wilson_interval(int(correct.sum()), len(correct)),
        labels_digest=hashlib.sha256(read[:, 3].long().numpy().tobytes()).hexdigest()[:16],
        conditions=conditions(
            device,
            batch=len(parts[0]) if parts else 0,
            dtype=str(amp_dtype or parameter.dtype).removeprefix("torch."),
            autocast=amp_dtype is not None,
            image_size=size,
            processes=dist.get_world_size() if _distributed() else 1,
            timed="the whole loop, with loading",
        ),
        correct=correct,
    )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well a model does on a set of images."""

    top1: float
    """Images whose label has the largest logit, in %."""
    top5: float
    """Images whose label is among the five largest logits, in %; 100 with five classes or fewer."""
    loss: float
    """Mean cross-entropy, in nats."""
    images: int
    """Images that count."""
    unreadable: int
    """Images left out because they could not be read."""
    images_per_second: float
    """Over all processes and the whole loop, loading included: a lower bound of what the model does."""
    interval95: tuple[float, float]
    """95 % Wilson interval of `top1`, in %."""
    labels_digest: str
    """Fingerprint of the labels in their order: two evaluations with the same one can be paired."""
    conditions: dict[str, object]
    """Hardware, versions, batch and types the numbers were measured with."""
    correct: Bool[Tensor, "images"] = field(repr=False)
    """Whether each image was right."""

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; `correct` as base64 of its bits, first image first."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {
            "interval95": list(self.interval95),
            "correct": b64encode(np.packbits(self.correct.numpy()).tobytes()).decode(),
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> "Evaluation":
        """The inverse of `to_json`. Raises `UserError` for values of another kind."""
        names = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise UserError(f"not an evaluation: needs exactly the entries {', '.join(sorted(names))}")
        bits = np.unpackbits(np.frombuffer(b64decode(values["correct"]), dtype=np.uint8), count=values["images"])
        return cls(**values | {"interval95": tuple(values["interval95"]), "correct": torch.from_numpy(bits).bool()})


@dataclass(frozen=True)
class Paired:
    """Two models on the same images."""

    difference: float
    """Top-1 of the first minus that of the second, in points."""
    interval95: tuple[float, float]
    """95 % interval of the difference, in points (see `intervals.paired_interval`): without zero exactly where `p_value` is below 0.05."""
    p_value: float
    """Two-sided exact McNemar test of no difference."""
    only_first: int
    """Images that only the first model gets right."""
    only_second: int
    """Images that only the second model gets right."""
    images: int
    """Images compared."""

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self) | {"interval95": list(self.interval95)}


def compare(first: Evaluation, second: Evaluation) -> Paired:
    """The difference first − second, image by image.

    Raises:
        UserError: the two were not evaluated on the same images in the same order.
    """
    if (first.images, first.labels_digest) != (second.images, second.labels_digest):
        raise UserError(
            f"cannot pair {first.images} images with {second.images}: both models must see the same images in the same order (no shuffling)"
        )
    only_first = int((first.correct & ~second.correct).sum())
    only_second = int((second.correct & ~first.correct).sum())
    images = first.images
    return Paired(
        difference=100 * (only_first - only_second) / images,
        interval95=paired_interval(only_first, only_second, images),
        p_value=mcnemar(only_first, only_second),
        only_first=only_first,
        only_second=only_second,
        images=images,
    )


def _judge(output: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """(B, 4) float32: right, among the first five, loss, label. Nothing here waits for the device."""
    logits = (output[0] if isinstance(output, (tuple, list)) else output).float()
    known = labels.clamp_min(0)
    outside = known >= logits.shape[1]
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hit = best == known[:, None]
    # A label without an output would be an error deep inside the device: it is marked and found at the end.
    loss = F.cross_entropy(logits, known.masked_fill(outside, 0), reduction="none").masked_fill(outside, -1.0)
    return torch.stack([hit[:, 0].float(), hit.any(1).float(), loss, labels.float()], dim=1)


def _gather(judged: Tensor, loader: Iterable) -> Tensor:
    """Rows of all processes in the order of the data, each image once."""
    if not _distributed():
        return judged
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (judged.numpy(), _indices(loader)))
    rows = np.concatenate([rows for rows, _ in everywhere])
    if any(index is None for _, index in everywhere):  # a stream: its processes read different shards
        return torch.from_numpy(rows)
    for rank, (part, index) in enumerate(everywhere):
        if len(part) != len(index):
            raise UserError(f"process {rank} saw {len(part)} images but its sampler lists {len(index)}: cannot count each image once")
    _, first = np.unique(np.concatenate([index for _, index in everywhere]), return_index=True)
    return torch.from_numpy(rows[first])


def _indices(loader: Iterable) -> np.ndarray | None:
    """Indices of the images in the order this process sees them; None for streams."""
    if hasattr(loader, "order"):
        return np.asarray(loader.order())
    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise UserError("the loader shuffles in every process its own way: evaluate with shuffle=False")
    batches = getattr(loader, "batch_sampler", None)
    return None if batches is None else np.array([index for batch in batches for index in batch])


def _tracked(loader: Iterable, progress: bool) -> Iterable:
    shown = progress and not (_distributed() and dist.get_rank() != 0)
    total = len(loader) if isinstance(loader, Sized) else None
    return track(loader, "evaluating", total=total, console=Console(stderr=True), disable=not shown, transient=True)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
