"""Tables of unit energies: what one access and one arithmetic step cost on an accelerator, and how large the accelerator is."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from shiftaddvit.errors import UserError, unknown

_MEMORY = ("dram", "buffer", "noc", "noc_partial_sum", "rf", "rf_weight")
_ACCELERATOR = ("pes", "buffer_words", "rf_input_words", "rf_weight_words", "rf_partial_sums")
_ARITHMETIC = ("mult", "add", "shift")


@dataclass(frozen=True)
class Units:
    """An accelerator: energies in pJ and sizes."""

    name: str
    """What results call it."""
    memory: tuple[tuple[str, float], ...]
    """pJ for 16 bits at each level; other widths in proportion."""
    arithmetic: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
    """For `mult`, `add` and `shift`: pJ at each known width."""
    accelerator: tuple[tuple[str, int], ...]
    """`pes`, and words of 16 bits: `buffer_words`, and of each PE `rf_input_words`, `rf_weight_words`, `rf_partial_sums`."""
    source: str = ""
    """Where the numbers come from."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Taken for every operation of a model when its mapping is looked up.
        return hash((self.name, self.memory, self.arithmetic, self.accelerator))

    @cached_property
    def _memory(self) -> dict[str, float]:
        return dict(self.memory)

    @cached_property
    def _accelerator(self) -> dict[str, int]:
        return dict(self.accelerator)

    def access(self, level: str) -> float:
        """pJ to move 16 bits at `level`."""
        return self._memory[level]

    def size(self, what: str) -> int:
        """A size of the accelerator."""
        return self._accelerator[what]

    def step(self, primitive: str, bits: float) -> float:
        """pJ of one `mult`, `add` or `shift` at a width; between and beyond known widths, a power law through the nearest two (a straight
        line, not below zero, where one of them is free)."""
        known = dict(self.arithmetic)[primitive]
        for width, energy in known:
            if width == bits:
                return energy
        if len(known) == 1:
            return known[0][1] * bits / known[0][0]
        high = next((i for i, (width, _) in enumerate(known) if width > bits), len(known) - 1)
        (w0, e0), (w1, e1) = known[max(high - 1, 0)], known[max(high, 1)]
        if e0 == 0 or e1 == 0:
            return max(e0 + (e1 - e0) * (bits - w0) / (w1 - w0), 0.0)
        return e0 * (bits / w0) ** (math.log(e1 / e0) / math.log(w1 / w0))

    def mac(self, primitive: str, bits: float, weight_bits: float, sum_bits: float) -> float:
        """pJ of one step of a loop nest, its accumulation charged. A product of unequal widths counts as one of their geometric mean."""
        accumulate = self.step("add", sum_bits)
        if primitive == "mult":
            return self.step("mult", math.sqrt(bits * weight_bits)) + accumulate
        if primitive == "shift":
            return self.step("shift", bits) + accumulate
        if primitive == "adder":
            return self.step("add", max(bits, weight_bits)) + accumulate
        return accumulate


def table_names() -> list[str]:
    """The tables that ship with the package."""
    folder = resources.files("shiftaddvit.cost") / "units"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_units(name: str) -> Units:
    """A shipped table by name, or a TOML file by path. UserError for an unknown name, and for a file naming every entry that is missing,
    unknown, negative or not a number."""
    if name in table_names():
        return _shipped(name)
    path = Path(name)
    if path.suffix != ".toml":
        raise unknown("unit table", name, [*table_names(), "a path that ends in .toml"])
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"unit table {name!r}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"unit table {name!r} is a folder") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"unit table {name!r} is not valid TOML: {error}") from None
    return units_from_dict(path.stem, values)


@lru_cache(maxsize=16)
def _shipped(name: str) -> Units:
    text = (resources.files("shiftaddvit.cost") / "units" / f"{name}.toml").read_text()
    return units_from_dict(name, tomllib.loads(text))


def units_from_dict(name: str, values: Mapping[str, Any]) -> Units:
    """Check a table read from TOML: `source`, and the tables `memory`, `arithmetic`, `accelerator`."""
    wrong: list[str] = []
    for key in values:
        if key not in ("source", "memory", "arithmetic", "accelerator"):
            wrong.append(f"{key} is unknown")
    memory = _numbers(values, "memory", _MEMORY, wrong, whole=False)
    sizes = _numbers(values, "accelerator", _ACCELERATOR, wrong, whole=True)
    if not isinstance(values.get("source", ""), str):
        wrong.append(f"source must be text, got {values['source']!r}")
    arithmetic = _arithmetic(values.get("arithmetic"), wrong)
    if wrong:
        raise UserError(f"unit table {name!r}: {'; '.join(wrong)}")
    return Units(name, tuple(memory.items()), arithmetic, tuple((k, int(v)) for k, v in sizes.items()), values.get("source", ""))


def _numbers(values: Mapping[str, Any], table: str, keys: tuple[str, ...], wrong: list[str], whole: bool) -> dict[str, float]:
    found = values.get(table)
    if not isinstance(found, Mapping):
        wrong.append(f"the table [{table}] is missing (entries: {', '.join(keys)})")
        return {}
    wrong.extend(f"{table}.{key} is unknown" for key in found if key not in keys)
    result = {}
    for key in keys:
        if key not in found:
            wrong.append(f"{table}.{key} is missing")
        elif _energy(found[key], f"{table}.{key}", wrong) and whole and (found[key] != int(found[key]) or found[key] < 1):
            wrong.append(f"{table}.{key} must be a whole number of at least 1, got {found[key]!r}")
        else:
            result[key] = found[key]
    return result


def _arithmetic(found: Any, wrong: list[str]) -> tuple[tuple[str, tuple[tuple[int, float], ...]], ...]:
    if not isinstance(found, Mapping):
        wrong.append(f"the table [arithmetic] is missing (entries: {', '.join(_ARITHMETIC)}, each a table of pJ by bits)")
        return ()
    wrong.extend(f"arithmetic.{key} is unknown" for key in found if key not in (*_ARITHMETIC, "mac_16"))
    result = []
    for key in _ARITHMETIC:
        table = found.get(key)
        if not isinstance(table, Mapping) or not table:
            wrong.append(f"arithmetic.{key} is missing (a table of pJ by bits, such as {{ 8 = 0.2, 32 = 3.1 }})")
            continue
        points = []
        for bits, energy in table.items():
            if not (bits.isascii() and bits.isdigit()) or int(bits) < 1:
                wrong.append(f"arithmetic.{key}.{bits}: a width must be a whole number of bits")
            elif _energy(energy, f"arithmetic.{key}.{bits}", wrong):
                points.append((int(bits), float(energy)))
        result.append((key, tuple(sorted(points))))
    if wrong or "mac_16" not in found:
        return tuple(result)
    return _scaled(tuple(result), found["mac_16"], wrong)


def _scaled(arithmetic: tuple, mac: Any, wrong: list[str]) -> tuple:
    """The same ratios, with a 16-bit multiply plus a 16-bit add of `mac` pJ."""
    if not _energy(mac, "arithmetic.mac_16", wrong):
        return ()
    plain = Units("", (), arithmetic, ())
    both = plain.step("mult", 16) + plain.step("add", 16)
    if both == 0:
        wrong.append("arithmetic.mac_16 cannot scale a mult and an add that are both free at 16 bits")
        return ()
    factor = mac / both
    return tuple((key, tuple((bits, energy * factor) for bits, energy in points)) for key, points in arithmetic)


def _energy(value: Any, where: str, wrong: list[str]) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        wrong.append(f"{where} must be a number, got {value!r}")
    elif value < 0:
        wrong.append(f"{where} is negative: {value!r}")
    else:
        return True
    return False
