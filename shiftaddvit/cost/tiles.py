"""Ways to cut a loop: exactly, as the published model does, or with a part-filled last tile."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int64]


@lru_cache(maxsize=4096)
def divisors(n: int) -> tuple[int, ...]:
    """The divisors of n, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return tuple(small + [n // d for d in reversed(small) if d * d != n])


@lru_cache(maxsize=1024)
def exact_splits(n: int, parts: int) -> Table:
    """All ordered factorisations of n into `parts` factors, in lexicographic order: (count, parts). Do not write to it."""
    if parts == 1:
        return np.array([[n]])
    rows = []
    for d in divisors(n):
        rest = exact_splits(n // d, parts - 1)
        rows.append(np.column_stack([np.full(len(rest), d), rest]))
    return np.concatenate(rows)


@lru_cache(maxsize=16384)
def tight_sizes(n: int, limit: int) -> Table:
    """Tile sizes up to `limit` worth trying for a loop of n, ascending: the smallest of each number of tiles ceil(n / size).

    Any other size needs as many tiles as a smaller one does. Empty for a limit of 0. Do not write to it.
    """
    sizes = []
    size = min(n, limit)
    while size >= 1:
        tiles = -(-n // size)
        size = -(-n // tiles)
        sizes.append(size)
        size -= 1
    return np.array(sizes[::-1], dtype=np.int64)
