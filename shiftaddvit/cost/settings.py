"""How operations are costed."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shiftaddvit.errors import UserError

from . import paper
from .eyeriss import BitWidths
from .units import Units, load_units

Mode = Literal["paper", "eyeriss"]
Coverage = Literal["released", "full"]
Fusion = Literal["rows", "none"]


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
    fusion: Fusion = "rows"
    """Mode `eyeriss`, `rows`: what takes a row (a token) at a time – norms, softmax, sums along channels, routers – happens as the row
    passes through the buffer, attention's scores stay there, and experts fetch their tokens by index, as the kernels of `ops` do · `none`:
    each is a layer of its own, which reads from DRAM and writes to it, and tokens are copied for their experts."""
    exclude: tuple[str, ...] = ()
    """Globs on module names; what they match, and what lies inside, is left out and listed."""

    def __post_init__(self) -> None:
        if self.mode not in ("paper", "eyeriss"):
            raise UserError(f"mode must be 'paper' or 'eyeriss', got {self.mode!r}")
        if self.coverage not in ("released", "full"):
            raise UserError(f"coverage must be 'released' or 'full', got {self.coverage!r}")
        if self.fusion not in ("rows", "none"):
            raise UserError(f"fusion must be 'rows' or 'none', got {self.fusion!r}")
        if self.word_bits not in paper.COMPUTE:
            raise UserError(f"word bits of mode 'paper' must be 32 or 8, got {self.word_bits}")
        if self.mode == "eyeriss" and self.word_bits != 32:
            raise UserError(f"word bits {self.word_bits} belong to mode 'paper'; mode 'eyeriss' has activation and weight bits")
        if self.mode == "paper" and self.bits != BitWidths():
            raise UserError("mode 'paper' has one width for all operands, word bits 32 or 8; widths of activations and weights belong to mode 'eyeriss'")
        if self.mode == "paper" and self.units != load_units("45nm"):
            raise UserError(f"mode 'paper' has its published unit energies: unit table {self.units.name!r} belongs to mode 'eyeriss'")
        if self.mode == "paper" and self.fusion != "rows":
            raise UserError("mode 'paper' counts nothing that could be fused: fusion belongs to mode 'eyeriss'")

    def describe(self) -> dict[str, Any]:
        """Plain JSON values, of the mode's own settings only."""
        common = {"mode": self.mode, "coverage": self.coverage, "stage4_matmuls": self._stage4(), "exclude": list(self.exclude)}
        if self.mode == "paper":
            return common | {
                "word_bits": self.word_bits, "shift_word_bits": paper.SHIFT_WORD_BITS, "add_index_bug": self.add_index_bug,
                "free_add_memory": True, "joint_select": True, "tiles": "exact divisors",
            }  # fmt: skip
        return common | {"bits": asdict(self.bits), "units": self.units.name, "units_source": self.units.source, "tiles": "padded", "fusion": self.fusion}

    def _stage4(self) -> bool:
        return self.coverage == "full" if self.stage4_matmuls is None else self.stage4_matmuls
