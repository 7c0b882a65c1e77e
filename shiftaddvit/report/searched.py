"""What a search found, as its files say it."""

from dataclasses import dataclass, field

from shiftaddvit.search_terms import COSTS, DAMAGES, DENSE, PRIMITIVES

from .networks import ModelRef
from .sources import Source


@dataclass(frozen=True)
class SearchPoint:
    """One choice for the whole network."""

    choice: dict[str, str] = field(hash=False)
    """Option of every attention and MLP that changes."""
    totals: dict[str, float] = field(hash=False)
    """Every quantity, predicted: costs of the whole network, damages as sums over its layers before fine-tuning."""

    def option(self, site: str) -> str:
        """What an attention or MLP becomes."""
        return self.choice.get(site, DENSE)


@dataclass(frozen=True)
class SiteValues:
    """One attention or MLP of the network that was found."""

    here: dict[str, float] = field(hash=False)
    """Every quantity as it becomes."""
    dense: dict[str, float] = field(hash=False)
    """Costs as it was."""


@dataclass(frozen=True)
class Together:
    """The found network measured as a whole, before fine-tuning."""

    top1: float
    """In %."""
    drop: float
    """Fall of the accuracy, in points."""
    interval95: tuple[float, float]
    """Of `drop`."""
    kl: float
    """In nats."""
    loss: float
    """Rise of the cross-entropy, in nats."""


@dataclass(frozen=True)
class SearchResult:
    """One search."""

    model: ModelRef
    """The dense network."""
    sites: tuple[str, ...]
    """Every attention and MLP, in the order of execution."""
    budgets: tuple[str, ...]
    """As given, with units."""
    met: bool
    """Whether they can be met; otherwise `found` is the nearest point."""
    minimised: str
    """A key of `UNITS`."""
    damage: str
    """Of the front."""
    cost: str
    """Of the front."""
    found: SearchPoint
    """The answer."""
    dense: SearchPoint
    """The network as it was."""
    front: tuple[SearchPoint, ...]
    """By falling cost."""
    rows: dict[str, SearchPoint] = field(hash=False)
    """Shipped recipes, by name."""
    values: dict[str, SiteValues] = field(hash=False)
    """By attention and MLP; empty in files from before they were written."""
    together: Together | None
    """None without images."""
    images: int | None
    """That the damage was measured on."""
    where: str
    """Data and split of these images; empty where that is not known."""
    source: Source
    """Where from."""

    @property
    def quantities(self) -> tuple[str, ...]:
        """Those that the file has, costs first."""
        return tuple(q for q in (*COSTS, *DAMAGES) if q in self.dense.totals)


@dataclass(frozen=True)
class SearchLatency:
    """The measured time of every option, layer by layer."""

    costs: dict[str, dict[str, float]] = field(hash=False)
    """µs by attention or MLP and option, in the order of execution."""
    rest: float
    """µs of everything else."""
    source: Source
    """Where from; its conditions name the device, the batch and the image size."""


def parts(option: str) -> tuple[str, str] | None:
    """(form of the attention or `""`, `mult`, `shift` or `moe`) of an option; None for what is none."""
    names = option.split("+")
    if option == DENSE:
        return "", "mult"
    if not set(names) <= PRIMITIVES.keys():
        return None
    forms = [name for name in names if "attention" in PRIMITIVES[name]]
    linears = [name.partition("-")[2] for name in names if "attention" not in PRIMITIVES[name]]
    if len(forms) > 1 or len(linears) > 1 or (len(names) == 2 and (names[0] not in forms or not names[1].startswith("attn-"))):
        return None
    return (forms or [""])[0], (linears or ["mult"])[0]
