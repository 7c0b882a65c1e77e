"""Where a model's mixtures sent which token, as dispatch files say it."""

from dataclasses import dataclass, field

from .sources import Source


@dataclass(frozen=True)
class Mixture:
    """One mixture of a dispatch file."""

    name: str
    """Module."""
    experts: tuple[str, ...]
    """`mult` or `shift`."""
    grid: tuple[int, int] | None
    """Rows and columns."""
    prefix: int
    """Tokens before the grid."""
    tokens: int
    """Of one image."""
    share: tuple[float, ...]
    """Of each expert."""

    @property
    def shift_share(self) -> float:
        """Share of the tokens on a shift expert."""
        return sum(share for share, kind in zip(self.share, self.experts, strict=True) if kind == "shift")


@dataclass(frozen=True)
class Picture:
    """An image with the experts of its tokens."""

    name: str
    """Of the image."""
    image: str
    """Data URI."""
    size: tuple[int, int]
    """Height and width in pixels."""
    label: str
    """Its class; empty where that is not known."""
    predicted: str
    """What the model says."""
    experts: dict[str, str] = field(hash=False)
    """By mixture, one digit a token."""


@dataclass(frozen=True)
class DispatchResult:
    """Where a model's mixtures send what."""

    title: str
    """Model and recipe."""
    data: str
    """Of the images."""
    images: int
    """That the shares are over."""
    mixtures: tuple[Mixture, ...]
    """In the order of execution."""
    pictures: tuple[Picture, ...]
    """With their maps."""
    source: Source
    """Where from."""
