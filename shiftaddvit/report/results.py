"""What result files say, as data: one class for each thing the page shows."""

from dataclasses import dataclass, field

from .dispatched import DispatchResult
from .networks import ModelRef
from .searched import SearchLatency, SearchResult
from .sources import Source


@dataclass(frozen=True)
class Skipped:
    """A file, or a part of one, that is not shown."""

    path: str
    """As the reader found it."""
    reason: str
    """Why not."""


@dataclass(frozen=True)
class Accuracy:
    """One evaluation; the number of right images was counted again."""

    top1: float
    """In %."""
    top5: float
    """In %."""
    interval95: tuple[float, float]
    """Of top1, in %."""
    images: int
    """How many."""
    right: int
    """Images that are right, one bit each, first image highest."""
    labels_digest: str
    """Same images, same order."""


@dataclass(frozen=True)
class RunResult:
    """One model's accuracy, and what else its run says."""

    model: ModelRef
    """The network."""
    data: str
    """What it was evaluated on, for people."""
    recipe: str
    """Name, or `dense`."""
    variant: str
    """Canonical text of everything that makes it another run than one of the same recipe, but the seed."""
    label: str
    """What its file or folder calls it."""
    accuracy: Accuracy
    """On the data."""
    seed: int | None
    """Of the run."""
    source: Source
    """Where from."""
    shift_share: float | None = None
    """Share of tokens on a shift, 0 to 1."""
    removed: float | None = None
    """Share of the dense model's multiplications that are gone."""
    bytes: int | None = None
    """Of the model's file."""


@dataclass(frozen=True)
class LayerEnergy:
    """One operation."""

    name: str
    """Module."""
    kind: str
    """`linear`, `conv`, `product`, …"""
    primitive: str
    """`mult`, `shift`, `add`, `adder`, `stream`."""
    levels: dict[str, float] = field(hash=False)
    """mJ by level."""


@dataclass(frozen=True)
class EnergyResult:
    """One model's energy."""

    model: ModelRef
    """The network."""
    recipe: str
    """Name, or `dense`."""
    mode: str
    """`eyeriss` or `paper`."""
    setting: str
    """Canonical text of all settings but the shift share."""
    total_mj: float
    """Of one forward."""
    batch: int
    """Images in that forward."""
    layers: tuple[LayerEnergy, ...]
    """In the order of execution."""
    shares: tuple[tuple[str, float], ...]
    """(mixture, share of its tokens on shift), where measured."""
    shift_share: float | None
    """Over all mixtures."""
    share_source: str
    """How the shares are known."""
    source: Source
    """Where from."""

    @property
    def mj_per_image(self) -> float:
        """Millijoules."""
        return self.total_mj / self.batch


@dataclass(frozen=True)
class SpeedResult:
    """One contender of the engine's benchmark."""

    model: ModelRef
    """The network."""
    contender: str
    """As the benchmark calls it."""
    recipe: str | None
    """Of an engine's contender, else None."""
    batch: int
    """Images at once."""
    status: str
    """`measured`, or why there is no time."""
    median_us: float | None
    """Of one batch."""
    low_us: float | None
    """Tenth percentile."""
    high_us: float | None
    """Ninetieth percentile."""
    source: Source
    """Where from."""

    @property
    def images_per_s(self) -> float | None:
        """Throughput."""
        return None if self.median_us is None else self.batch / self.median_us * 1e6


@dataclass(frozen=True)
class OpResult:
    """One contender of the benchmark of single ops."""

    op: str
    """Which."""
    shape: str
    """Its sizes."""
    contender: str
    """Who computed it."""
    median_us: float | None
    """None where its result was wrong."""
    share_of_floor: float | None
    """Of what the hardware allows, 0 to 1."""
    source: Source
    """Where from."""


@dataclass(frozen=True)
class Curve:
    """How a run went."""

    label: str
    """Of the run."""
    loss: tuple[tuple[float, float], ...]
    """(epoch, loss); for view synthesis (step, PSNR on training pixels)."""
    score: tuple[tuple[float, float], ...]
    """(epoch, top-1 in %); for view synthesis (step, PSNR on held-out pixels)."""
    kind: str
    """`classification` or `view synthesis`."""
    finished: bool
    """Whether the run has a result."""
    path: str
    """Of its log."""


@dataclass(frozen=True)
class SensitivityResult:
    """One primitive at one place, before any fine-tuning."""

    model: str
    """The network."""
    where: str
    """Module, or `all`."""
    primitive: str
    """Which."""
    top1: float
    """In %."""
    difference: float
    """Against the dense model, in points."""
    interval95: tuple[float, float]
    """Of the difference."""
    source: Source
    """Where from."""


@dataclass(frozen=True)
class ViewResult:
    """One scene's quality or speed with one row of the view synthesis table."""

    row: str
    """`nerf`, `gnt`, a recipe, or a file."""
    scene: str
    """Its name and size."""
    psnr: float | None
    """dB."""
    ssim: float | None
    """Structural similarity."""
    lpips: float | None
    """None where it was not computed."""
    seconds: float | None
    """An image."""
    joules: float | None
    """An image, modelled."""
    source: Source
    """Where from."""


@dataclass(frozen=True)
class ExpertTimes:
    """How long each expert of a mixture takes on all its tokens: what the balance loss weighs experts by."""

    layer: str
    """`linear` or `mlp`."""
    shape: tuple[int, ...]
    """Features in, (hidden,) out."""
    experts: tuple[str, ...]
    """`mult` or `shift`."""
    tokens: int
    """At once."""
    dtype: str
    """Of the tokens."""
    seconds: tuple[float, ...]
    """One an expert."""
    device: str
    """As it was measured on."""
    mixtures: tuple[str, ...]
    """Modules of this shape, where a run recorded them."""
    time: str
    """When, ISO 8601; empty where it does not say."""
    timed: str
    """How; empty where it does not say."""
    source: Source
    """Where from."""

    @property
    def same(self) -> tuple:
        """What a measurement holds for."""
        return self.layer, self.shape, self.experts, self.tokens, self.dtype, self.device

    def microseconds(self, kind: str) -> tuple[float, ...]:
        """Of the experts of a kind."""
        return tuple(1e6 * seconds for seconds, expert in zip(self.seconds, self.experts, strict=True) if expert == kind)


@dataclass
class Results:
    """Everything that was read."""

    sources: list[Source] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    runs: list[RunResult] = field(default_factory=list)
    energies: list[EnergyResult] = field(default_factory=list)
    speeds: list[SpeedResult] = field(default_factory=list)
    ops: list[OpResult] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    sensitivities: list[SensitivityResult] = field(default_factory=list)
    views: list[ViewResult] = field(default_factory=list)
    dispatches: list[DispatchResult] = field(default_factory=list)
    expert_times: list[ExpertTimes] = field(default_factory=list)
    searches: list[SearchResult] = field(default_factory=list)
    search_latencies: list[SearchLatency] = field(default_factory=list)
