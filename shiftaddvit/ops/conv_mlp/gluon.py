"""Whether Triton has Gluon, without importing either where it has not."""

from functools import cache

_OLDEST = (3, 6)
"""The first Triton with which the kernel has been compiled."""


@cache
def has_gluon() -> bool:
    """Whether this Triton can compile the kernel, as far as its version and names say."""
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
            return False
        from . import kernels  # noqa: F401
    except (ValueError, ImportError, AttributeError):
        return False
    return True
