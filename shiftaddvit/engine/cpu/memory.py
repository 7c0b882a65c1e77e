"""Freed memory stays with the process, so that activations are not fetched from the kernel anew at every call."""

import torch

_LARGEST_DYNAMIC = 31 * 2**20
"""Bytes just below the largest block (32 MiB) that moves the thresholds of the C library."""


def keep_freed_memory() -> None:
    """Free one block of 31 MiB. By its documented rule (mallopt(3), M_MMAP_THRESHOLD) glibc then serves blocks up to that size from
    its heap, and returns the end of the heap only when more than twice as much is free. An activation of a few megabytes is otherwise
    mapped, zeroed page by page and unmapped each time: half the time of a small model. Other C libraries are not affected."""
    torch.empty(_LARGEST_DYNAMIC, dtype=torch.uint8)
