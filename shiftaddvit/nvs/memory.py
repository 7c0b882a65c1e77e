"""How many rays fit on the device at once, and what to do when they do not."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from shiftaddvit.errors import UserError
from shiftaddvit.train.step_graph import recording

# What one call may take of a CPU's memory: small enough to stay near its caches.
CPU_BUDGET = 128 << 20
LARGEST = 1 << 16

T = TypeVar("T")


def first_chunk(bytes_per_ray: int, device: torch.device | str) -> int:
    """A power of two of rays that should take at most half of the memory that is free on the device."""
    device = torch.device(device)
    budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_BUDGET
    rays = max(1, min(LARGEST, budget // max(1, bytes_per_ray)))
    return 1 << (rays.bit_length() - 1)


@dataclass
class Chunk:
    """The number of rays worked on at once; halved for good when memory runs out."""

    rays: int
    """Rays at once."""

    def attempt(self, work: Callable[[int], T]) -> T:
        """`work(rays)`; when memory runs out, again with half as many. UserError when not even one ray fits. What is recorded as a CUDA graph
        gets one attempt."""
        while True:
            try:
                return work(self.rays)
            except RuntimeError as error:
                if not out_of_memory(error) or recording():
                    raise
            # Outside the handler, where the failed attempt's tensors are no longer referenced by its traceback.
            if self.rays == 1:
                raise UserError("not even one ray fits into the device's memory: use fewer samples, fewer sources or smaller pictures")
            self.rays //= 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this is a device's or the CPU allocator's word for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text
