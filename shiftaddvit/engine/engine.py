"""A program deployed on one device: buffers, CUDA graphs, a lock."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError

from .cpu import CpuProgram, has_cpu_program, prepare
from .lower import lower
from .program import Launch, Program

_IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Captured:
    """One batch size recorded as a CUDA graph."""

    graph: torch.cuda.CUDAGraph
    """Replays the whole program."""
    images: Tensor
    """Where it reads: the first rows of the engine's buffer."""
    logits: Tensor
    """Where it writes, in the graph's own memory."""


class Engine:
    """`engine(images) -> logits`, made by `deploy`.

    On a GPU the batch sizes asked for are CUDA graphs; a smaller batch is padded to the next of them, a larger one runs uncaptured. On
    a CPU the steps run in their fast form (`engine.cpu`) in float32, and in bfloat16 where the processor multiplies that, otherwise as they
    are. The result is a copy, in float32, on the engine's device. Several threads may call one engine: a lock runs them one after the other.
    Engines share nothing.
    """

    def __init__(self, program: Program, batch_sizes: tuple[int, ...], launch: Launch = Launch(), int8: bool = False):
        self.program, self.launch, self.int8 = program, launch, int8
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        self.device, self.dtype = program.device, program.dtype
        self._lock = Lock()
        self._captured: dict[int, Captured] = {}
        self._buffer: Tensor | None = None
        self._done: torch.cuda.Event | None = None
        self.cpu_program: CpuProgram | None = prepare(program, int8) if self._suits_cpu_program else None
        if int8 and not any("int8" in runner.how for runner in self.cpu_program.runners):
            warnings.warn(
                "int8=True changes nothing here: no linear is wide enough with weights exact in eight bits (shift codes of 4 bits)", stacklevel=3
            )
        if self.device.type == "cuda":
            self._capture()

    def __call__(self, images: Float[Tensor, "B I H W"]) -> Float[Tensor, "B K"]:
        """float32 logits of images (float32, float16 or bfloat16; on the engine's device or on the CPU). UserError names what does not fit."""
        self._check(images)
        count = images.shape[0]
        if count == 0:
            return torch.empty(0, self.program.outputs, device=self.device)
        with self._lock, torch.no_grad(), self._on_device():
            self._wait()
            captured = self._captured.get(self._size_for(count))
            if self.cpu_program is not None:
                logits = self.cpu_program.run(images.to(self.dtype))
            elif captured is None:
                logits = self.program.run(images.to(self.device, self.dtype), self.launch)
            else:
                # Rows behind these still hold older images: images do not see each other.
                captured.images[:count].copy_(images, non_blocking=True)
                captured.graph.replay()
                logits = captured.logits[:count].clone()
            self._mark()
        return logits

    def reload(self, model: nn.Module) -> None:
        """Read weights anew, from a model of the same form, into the same buffers: captured graphs stay valid. UserError names the
        first step that differs; then nothing has changed."""
        program = lower(model, self.dtype, self.program.image_size)
        with self._lock, self._on_device():
            self._wait()
            self.program.fill_from(program)
            if self.cpu_program is not None:
                self.cpu_program = prepare(self.program, self.int8)
            self._mark()
            if self.device.type == "cuda":
                # Overlapped kernels read weights before they wait for the kernel in front of them.
                torch.cuda.synchronize(self.device)

    def replayer(self, batch: int) -> Callable[[], None]:
        """For timing alone: what replays the graph of a batch size on the images that its buffer holds, without lock or copies.
        UserError for a batch size without a graph."""
        if batch not in self._captured:
            raise UserError(f"batch {batch} is no CUDA graph of this engine: allowed: {self.captured_sizes}")
        return self._captured[batch].graph.replay

    def describe(self) -> str:
        """The steps, memory and conditions, as a table."""
        from .describe import describe

        return describe(self)

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """Batch sizes that are CUDA graphs."""
        return tuple(sorted(self._captured))

    @property
    def _suits_cpu_program(self) -> bool:
        """Whether the steps have a faster form than their ops: on a CPU in a dtype that it multiplies, with no other backend asked for."""
        return self.device.type == "cpu" and has_cpu_program(self.dtype) and self.launch.backend in ("auto", "cpu")

    def _size_for(self, count: int) -> int:
        """The batch size that `count` images are run as; `count` itself where none is large enough."""
        if self.program.mixes_images:
            return count
        return min((size for size in self.batch_sizes if size >= count), default=count)

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise UserError(f"images must be a tensor (B, channels, height, width), got {type(images).__name__}")
        wanted = (self.program.channels, *self.program.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            hint = ""
            if tuple(images.shape[1:]) == (*wanted[1:], wanted[0]):
                hint = "; it looks like channels last: permute(0, 3, 1, 2)"
            elif images.dim() == 4 and images.shape[1] == wanted[0]:
                hint = f"; an engine for these: deploy(model, image_size={tuple(images.shape[2:])})"
            raise UserError(f"images must be (B, {', '.join(map(str, wanted))}), got {tuple(images.shape)}{hint}")
        if images.dtype not in _IMAGE_DTYPES:
            raise UserError(f"images must be float32, float16 or bfloat16 (normalised), got {images.dtype}")
        if images.device not in (self.device, torch.device("cpu")):
            raise UserError(f"images are on {images.device}, the engine is on {self.device}: move them there or to the CPU")

    def _on_device(self):
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _wait(self) -> None:
        """The caller's stream waits for the last call, whichever stream that was on."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def _mark(self) -> None:
        if self._done is not None:
            self._done.record()

    @torch.no_grad()
    def _capture(self) -> None:
        largest = self.batch_sizes[-1]
        with torch.cuda.device(self.device):
            self._done = torch.cuda.Event()
            try:
                self._buffer = self._empty(largest)
                pool = torch.cuda.graph_pool_handle()
                # Largest first: the smaller graphs then fit into its memory. They never run at the same time.
                for size in reversed(self.batch_sizes):
                    self._captured[size] = self._record(self._buffer[:size], pool)
            except torch.cuda.OutOfMemoryError:
                self._captured.clear()
                self._buffer = None
                torch.cuda.empty_cache()
                fitting = largest_fitting(self._fits, largest)
                advice = f"the largest batch that fits is {fitting}" if fitting else "not even one image fits"
                raise UserError(
                    f"batch_size {largest} at {self.program.image_size} does not fit into the memory of {self.device}: {advice}"
                ) from None
            self._done.record()

    def _empty(self, size: int) -> Tensor:
        return torch.zeros(size, self.program.channels, *self.program.image_size, dtype=self.dtype, device=self.device)

    def _record(self, images: Tensor, pool: tuple[int, int]) -> Captured:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles kernels and fills library caches, which a capture may not do.
            for _ in range(2):
                self.program.run(images, self.launch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self.program.run(images, self.launch)
        return Captured(graph, images, logits)

    def _fits(self, size: int) -> bool:
        try:
            self.program.run(self._empty(size), self.launch)
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True


def largest_fitting(fits: Callable[[int], bool], too_large: int) -> int:
    """The largest size below `too_large` for which `fits` says yes, to within an eighth of itself; 0 for none."""
    good, bad = 0, too_large
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
