"""A whole program: every step that has one in its fast form, the batch in parts that stay in the cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..attention import LinearAttentionStep, SoftmaxAttentionStep
from ..embed import EmbedStep
from ..mlp import ConvMlpStep, MlpStep, RoutedMlpStep
from ..program import Launch, Program, Step
from .attention import LinearAttention, SoftmaxAttention
from .embed import Embed
from .memory import keep_freed_memory
from .mlp import PlainMlp, RoutedMlp, conv_mlp
from .onednn import onednn

CACHED = 4 * 2**20
"""Values of the widest activation of images that run together: a part of the last cache, and blocks that the heap keeps."""


class Runner(Protocol):
    """A step on a CPU."""

    how: str

    def run(self, x: Tensor) -> Tensor: ...


_FAST: dict[type, Callable[[Step, bool], Runner | None]] = {
    EmbedStep: Embed.of,
    LinearAttentionStep: LinearAttention.of,
    SoftmaxAttentionStep: SoftmaxAttention.of,
    ConvMlpStep: conv_mlp,
    MlpStep: PlainMlp.of,
    RoutedMlpStep: RoutedMlp.of,
}


@dataclass(frozen=True)
class AsItIs:
    """A step without a form of its own."""

    step: Step
    """Runs through the ops."""
    how: str = "torch"

    def run(self, x: Tensor) -> Tensor:
        return self.step.run(x, Launch())


@dataclass(frozen=True)
class CpuProgram:
    """What `prepare` makes of a program."""

    runners: tuple[Runner, ...]
    """One a step."""
    images: int | None
    """Taken together; None for the whole batch."""

    def run(self, images: Float[Tensor, "B I H W"]) -> Float[Tensor, "B K"]:
        """float32 logits."""
        parts = 1 if self.images is None else -(-len(images) // self.images)
        with torch.inference_mode():
            logits = [self._run(part) for part in images.tensor_split(parts)]
        # Joined outside, so that the result is an ordinary tensor.
        return torch.cat(logits).detach()

    def _run(self, x: Tensor) -> Tensor:
        for runner in self.runners:
            x = runner.run(x)
        return x


def has_cpu_program(dtype: torch.dtype) -> bool:
    """Whether this processor computes in `dtype` faster through `prepare` than through the ops."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and onednn().bfloat16)


@torch.no_grad()
def prepare(program: Program, int8: bool = False) -> CpuProgram:
    """The program on a CPU. It reads the program's weights where they lie and copies those that oneDNN wants in its own layout, so
    prepare it again when they change. With `int8`, products whose weights are exact in eight bits round their inputs to eight bits, at a
    scale of each picture's own: pictures then run one by one."""
    keep_freed_memory()
    runners = []
    for step in program.steps:
        make = _FAST.get(type(step))
        runners.append((make(step, int8) if make else None) or AsItIs(step))
    return CpuProgram(tuple(runners), None if program.mixes_images else 1 if int8 else _together(program))


def _together(program: Program) -> int:
    """Images whose widest activation fits the cache."""
    steps = [step for step in program.steps if isinstance(step, ConvMlpStep | MlpStep)]
    widest = max((_tokens(step) * step.fc1.weight.shape[1] for step in steps), default=1)
    return max(1, CACHED // widest)


def _tokens(step: ConvMlpStep | MlpStep) -> int:
    return step.grid[0] * step.grid[1] if isinstance(step, ConvMlpStep) else step.tokens
