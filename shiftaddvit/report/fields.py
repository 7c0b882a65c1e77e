"""Looking at values that nobody has checked: every look says what it expects, and names the field where that fails."""

import math
from collections.abc import Iterator, Mapping
from typing import Any


class Unusable(Exception):
    """A file that cannot be shown; the text says why."""


class Fields:
    """The fields of one JSON object of a result file."""

    def __init__(self, values: object, where: str = ""):
        if not isinstance(values, Mapping):
            raise Unusable(f"{where or 'the file'} must be an object, is {_kind(values)}")
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from `low` to `high`."""
        return self._number(self._get(key), self._name(key), low, high)

    def count(self, key: str, low: int = 0) -> int:
        """A whole number."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise Unusable(f"{self._name(key)} must be a whole number of at least {low}, is {_shown(value)}")
        return value

    def maybe(self, key: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """A number, or None."""
        return None if self.values.get(key) is None else self.number(key, low, high)

    def text(self, key: str) -> str:
        """A string."""
        value = self._get(key)
        if not isinstance(value, str):
            raise Unusable(f"{self._name(key)} must be a text, is {_kind(value)}")
        return value

    def word(self, key: str, default: str = "") -> str:
        """A string, or `default` where there is none."""
        return default if self.values.get(key) is None else self.text(key)

    def fields(self, key: str) -> "Fields":
        """An object."""
        return Fields(self._get(key), self._name(key))

    def list(self, key: str) -> list[Any]:
        """A list."""
        value = self._get(key)
        if not isinstance(value, list):
            raise Unusable(f"{self._name(key)} must be a list, is {_kind(value)}")
        return value

    def each(self, key: str) -> "Iterator[Fields]":
        """A list of objects, one by one."""
        for number, value in enumerate(self.list(key)):
            yield Fields(value, f"{self._name(key)}[{number}]")

    def numbers(self, key: str, low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
        """A list of numbers."""
        return tuple(self._number(value, f"{self._name(key)}[{number}]", low, high) for number, value in enumerate(self.list(key)))

    def pair(self, key: str, low: float = -math.inf, high: float = math.inf) -> tuple[float, float]:
        """A list of two numbers."""
        numbers = self.numbers(key, low, high)
        if len(numbers) != 2:
            self.fail(f"{key!r} must be two numbers")
        return numbers[0], numbers[1]

    def by_name(self, key: str, low: float = -math.inf, high: float = math.inf) -> dict[str, float]:
        """An object whose values are numbers."""
        inner = self.fields(key)
        return {name: inner.number(name, low, high) for name in inner.values}

    def agree(self, what: str, stated: float, found: float, tolerance: float = 1e-6) -> None:
        """Two numbers that must be one."""
        if not math.isclose(stated, found, rel_tol=tolerance, abs_tol=1e-9):
            raise Unusable(f"{self._name(what)} says {stated:.10g}, but the rest of the file gives {found:.10g}")

    def fail(self, what: str) -> None:
        """Give up on the file."""
        raise Unusable(f"{self.where + ': ' if self.where else ''}{what}")

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise Unusable(f"{self._name(key)} is missing")
        return self.values[key]

    def _name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    @staticmethod
    def _number(value: object, name: str, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Unusable(f"{name} must be a number, is {_shown(value)}")
        if not low <= value <= high:
            raise Unusable(f"{name} is {value:g}, must be from {low:g} to {high:g}")
        return float(value)


def _kind(value: object) -> str:
    return {type(None): "empty", list: "a list", dict: "an object", str: "a text", bool: "true or false"}.get(type(value), "a number")


def _shown(value: object) -> str:
    return repr(value)[:40] if isinstance(value, (int, float, str)) else _kind(value)
