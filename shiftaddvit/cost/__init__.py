"""Energy on an analytical model of the Eyeriss accelerator: mode `eyeriss`, ours, and mode `paper`, as published."""

from .estimate import cost_operations, energy, expert_energies
from .eyeriss import BitWidths
from .operations import Nest, Stream
from .paper import NoMapping
from .result import Energy, LayerEnergy
from .settings import Settings
from .units import Units, load_units
from .whatif import Comparison, Sweep, compare, sweep

__all__ = [
    "BitWidths", "Comparison", "Energy", "LayerEnergy", "Nest", "NoMapping", "Settings", "Stream", "Sweep", "Units", "compare",
    "cost_operations", "energy", "expert_energies", "load_units", "sweep",
]  # fmt: skip
