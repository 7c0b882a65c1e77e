"""The file that a number comes from."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Source:
    """A file that was used."""

    path: str
    """As the reader found it."""
    kind: str
    """Of `schema.VERSIONS`."""
    digest: str
    """Of its values: the same file under two names counts once."""
    time: str = ""
    """When it was measured, ISO 8601; empty where it does not say."""
    conditions: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    """Hardware, versions and the like."""
    stamped: bool = True
    """Whether it says itself what it is; files from before there were stamps are known by their form."""
    texts: tuple[tuple[str, str], ...] = ()
    """What a person added: data, command, note."""
