"""Whether Triton has Gluon, without importing either where it has not."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

_OLDEST = (3, 6)
"""The first Triton with which the kernel has been compiled."""


@cache
def has_gluon() -> bool:
    """Whether this Triton can compile the kernel, as far as its version and names say."""
    try:
        if tuple(int(part) for part in version("triton").split(".")[:2]) < _OLDEST:
            return False
        from . import kernels  # noqa: F401
    except (PackageNotFoundError, ValueError, ImportError, AttributeError):
        return False
    return True
