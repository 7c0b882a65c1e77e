"""Integers for hardware: a model as shifts, additions and what is left, exact to the bit. docs/hardware.md is the specification.

`reference` and `network` need NumPy only; what starts from a model loads torch when it is first used.
"""

from importlib import import_module

_HOMES = {"HardwareReport": "handover", "Network": "network", "Widths": "widths", "hand_over": "handover", "to_integers": "convert"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'shiftaddvit.hardware' has no attribute {name!r}")
    return getattr(import_module(f"shiftaddvit.hardware.{_HOMES[name]}"), name)
