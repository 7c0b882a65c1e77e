"""What a network does, as the energy model sees it: loop nests of multiply- or shift- or add-accumulates, and streams of elements."""

from dataclasses import dataclass, replace
from typing import Literal

Primitive = Literal["mult", "shift", "add", "adder"]
Shape = tuple[int, int, int, int, float, float, int, int, int, int, tuple[int, int]]

PRIMITIVES: tuple[Primitive, ...] = ("mult", "shift", "add", "adder")
"""Multiply-accumulate · shift-accumulate · masked accumulate (MatAdd) · subtract, absolute value and accumulate (AdderNet)."""


@dataclass(frozen=True)
class Expert:
    """Which expert of which mixture an operation belongs to."""

    mixture: str
    """Module name of the mixture."""
    index: int
    """Position in the mixture's `experts`."""


@dataclass(frozen=True)
class Nest:
    """A convolution, a linear layer (every spatial size 1) or a product of matrices, as Eyeriss names its loops.

    It holds for one group; the operation does it `groups` times, with weights of their own. For a product a @ b, a is the input
    and b the weight, and there is one group an image and head.
    """

    name: str
    """Module that executes it."""
    kind: Literal["linear", "conv", "product"]
    """What it is in the network."""
    primitive: Primitive
    """What each of its steps does."""
    groups: int
    """Groups of a convolution; images × heads of a product."""
    N: int
    """Images of a convolution, tokens of a linear layer, rows of a product."""
    C: int
    """Input channels, or the inner dimension."""
    M: int
    """Output channels, or columns."""
    R: float = 1
    """Kernel rows."""
    S: float = 1
    """Kernel columns."""
    H: int = 1
    """Input rows."""
    W: int = 1
    """Input columns."""
    E: int = 1
    """Output rows."""
    F: int = 1
    """Output columns."""
    stride: tuple[int, int] = (1, 1)
    """Rows and columns between outputs."""
    weight_bits: int | None = None
    """Bits of a weight where the layer says so (shift codes); None takes the setting."""
    leaf: bool = True
    """Whether a layer of the network executes it, rather than a function between layers: what hooks on leaf modules can see."""
    scores: Literal["", "written", "read"] = ""
    """Whether it is the product of softmax attention that writes the scores, or the one that reads them."""
    experts: tuple[Expert, ...] = ()
    """The experts it lies in; their share of the tokens scales it."""

    def shape(self) -> Shape:
        """What its energy depends on besides its bits."""
        return (self.groups, self.N, self.C, self.M, self.R, self.S, self.H, self.W, self.E, self.F, self.stride)

    @property
    def macs(self) -> float:
        """Steps, over all groups."""
        return self.groups * self.N * self.M * self.C * self.R * self.S * self.E * self.F

    def unfolded(self) -> "Nest":
        """The matrix product it equals once every window is written out: a linear layer over N·E·F windows of C·R·S numbers."""
        inner = round(self.C * self.R * self.S)
        return replace(self, N=self.N * self.E * self.F, C=inner, R=1, S=1, H=1, W=1, E=1, F=1, stride=(1, 1))


@dataclass(frozen=True)
class Stream:
    """Elements that pass by without being reused: activations, norms, softmax, sums, gathers and copies."""

    name: str
    """Module that executes it."""
    kind: Literal["pointwise", "elementwise", "norm", "softmax", "reduction", "move", "dispatch"]
    """`pointwise` happens where its producer's outputs are; `elementwise` reads its other operands; the rest read and write all."""
    function: str
    """What is computed, such as `gelu` or `add`."""
    reads: int
    """Elements read, of the operands that do not come straight from the producer."""
    writes: int
    """Elements written."""
    elements: int
    """Elements that are computed."""
    rows: int = 0
    """Rows (tokens, mostly) of which each is computed from itself alone; 0 where it takes more than a row."""
    experts: tuple[Expert, ...] = ()
    """The experts it lies in; their share of the tokens scales it."""

    primitive = "stream"


Operation = Nest | Stream


@dataclass(frozen=True)
class Uncosted:
    """Something that was executed and is not in the total."""

    name: str
    """What it is: an operator, or a module."""
    count: int
    """How often it was executed."""
    reason: str
    """Why it is not counted."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts as it was met."""

    name: str
    """Module name."""
    tokens: int
    """Tokens that its router sees."""
    primitives: tuple[str, ...]
    """What each expert computes with."""
    width: int = 0
    """Numbers of a token on its way in and out, together."""


@dataclass(frozen=True)
class Trace:
    """Everything that one forward executes."""

    operations: tuple[Operation, ...]
    """In the order of execution, as if every expert saw every token."""
    mixtures: tuple[Mixture, ...] = ()
    """Mixtures of experts, in the order of execution."""
    uncosted: tuple[Uncosted, ...] = ()
    """What the trace does not know how to count."""
    scale: float = 1.0
    """Times that the forward is executed: chunks of rays in an image."""
