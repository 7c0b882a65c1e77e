"""How operations are costed."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shiftaddvit.errors import UserError

from . import paper
from .eyeriss import BitWidths
from .units import Units, load_units

Mode = Literal["paper", "eyeriss"]
Coverage = Literal["released", "full"]


@dataclass(frozen=True)
class Settings:
    """How operations are costed."""

    mode: Mode = "eyeriss"
    """`eyeriss`: least energy, everything counted · `paper`: the published model with its quirks."""
    coverage: Coverage = "full"
    """`released`: what hooks on leaf modules see, as the released scripts have it · `full`: functions between layers too."""
    add_index_bug: bool = True
    """Mode `paper`: every Add costs what the first Add of the model costs."""
    stage4_matmuls: bool | None = None
    """Count both products of the softmax attention in a pyramid's last stage; None follows the coverage."""
    word_bits: int = 32
    """Mode `paper`: width of every operand but those of shifts, 32 or 8."""
    bits: BitWidths = field(default_factory=BitWidths)
    """Mode `eyeriss`: widths of the operands."""
    units: Units = field(default_factory=lambda: load_units("45nm"))
    """Mode `eyeriss`: the accelerator."""
    exclude: tuple[str, ...] = ()
    """Globs on module names; what they match, and what lies inside, is left out and listed."""

    def __post_init__(self) -> None:
        if self.mode not in ("paper", "eyeriss"):
            raise UserError(f"mode must be 'paper' or 'eyeriss', got {self.mode!r}")
        if self.coverage not in ("released", "full"):
            raise UserError(f"coverage must be 'released' or 'full', got {self.coverage!r}")
        if self.word_bits not in paper.COMPUTE:
            raise UserError(f"word bits of mode 'paper' must be 32 or 8, got {self.word_bits}")

    def describe(self) -> dict[str, Any]:
        """Plain JSON values, of the mode's own settings only."""
        common = {"mode": self.mode, "coverage": self.coverage, "stage4_matmuls": self._stage4(), "exclude": list(self.exclude)}
        if self.mode == "paper":
            return common | {
                "word_bits": self.word_bits, "shift_word_bits": paper.SHIFT_WORD_BITS, "add_index_bug": self.add_index_bug,
                "free_add_memory": True, "joint_select": True, "tiles": "exact divisors",
            }  # fmt: skip
        return common | {"bits": asdict(self.bits), "units": self.units.name, "units_source": self.units.source, "tiles": "padded"}

    def _stage4(self) -> bool:
        return self.coverage == "full" if self.stage4_matmuls is None else self.stage4_matmuls
