"""What a choice does to the whole network, measured, beside what the sum over sites says."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shiftaddvit.evaluation import compare
from shiftaddvit.evaluation.sensitivity import Sensitivity, classes_of, converted, divergence
from shiftaddvit.search_terms import DAMAGES, DENSE

from .menu import Menu
from .options import recipe_of


@dataclass(frozen=True)
class Joint:
    """All sites of a choice converted together, before any fine-tuning."""

    top1: float
    """Accuracy, in %."""
    drop: float
    """Fall of the accuracy, in points; negative if it rose."""
    interval95: tuple[float, float]
    """95 % paired interval of `drop`."""
    loss: float
    """Rise of the cross-entropy, in nats."""
    kl: float
    """Mean KL divergence from the dense model's classes, in nats."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"interval95": list(self.interval95)}


def measure_together(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    choices: Iterable[Mapping[str, str]],
    sensitivity: Sensitivity,
    *,
    calibration_images: Tensor | None = None,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
) -> list[Joint]:
    """Convert the dense `model` by each choice as a whole and evaluate it on the images that `sensitivity` was measured on.

    Raises:
        UserError: `loader` has other images.
    """
    dense, expected = classes_of(model, loader, device, amp_dtype)
    # The dense model may round otherwise on another device, but these must be the same images.
    compare(dense, sensitivity.dense)
    found = []
    for choice in choices:
        network = model
        if set(choice.values()) != {DENSE}:
            network = converted(model, recipe_of(choice, sensitivity.settings), calibration_images)
        evaluation, classes = classes_of(network, loader, device, amp_dtype)
        paired = compare(evaluation, dense)
        low, high = paired.interval95
        found.append(Joint(evaluation.top1, -paired.difference, (-high, -low), evaluation.loss - dense.loss, divergence(expected, classes)))
    return found


@dataclass(frozen=True)
class Additivity:
    """Whether sums over sites order whole networks."""

    predicted: dict[str, list[float]]
    """Sums, by quantity."""
    measured: dict[str, list[float]]
    """The same networks as a whole."""
    rank_correlation: dict[str, float | None]
    """Spearman's, by quantity; None where all values are equal."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def additivity(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], menu: Menu, sensitivity: Sensitivity, *, count: int = 30, seed: int = 0, **more: Any
) -> Additivity:
    """Compare sums with measurements over `count` random choices, from few sites changed to all. `more` goes to `measure_together`."""
    rng = np.random.default_rng(seed)
    picks = []
    for _ in range(count):
        changed = rng.random(len(menu.sites)) < rng.uniform(0.1, 1.0)
        picks.append(tuple(int(rng.integers(len(names))) if change else 0 for names, change in zip(menu.options.values(), changed, strict=True)))
    joints = measure_together(model, loader, [menu.choice(p) for p in picks], sensitivity, **more)
    predicted = {quantity: [menu.total(quantity, p) for p in picks] for quantity in DAMAGES}
    measured = {quantity: [getattr(joint, quantity) for joint in joints] for quantity in DAMAGES}
    return Additivity(predicted, measured, {q: _rank_correlation(predicted[q], measured[q]) for q in DAMAGES})


def _rank_correlation(first: list[float], second: list[float]) -> float | None:
    from scipy.stats import spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
