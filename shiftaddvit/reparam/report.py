"""What became of a model's parts in a conversion."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What became of every part that the recipe touched. Parts not listed are unchanged."""

    used: list[tuple[str, str]] = field(default_factory=list)
    """(pre-trained key or module, where its values are now)."""
    made: list[tuple[str, str]] = field(default_factory=list)
    """(new parameter or module, how it starts)."""
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(pre-trained key or module, why it is gone)."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """(layer that goes on multiplying, why): no column reaches it, or it is one of the rest and cannot take the primitive."""

    def __str__(self) -> str:
        parts = []
        for title, rows, arrow in (("used", self.used, "→"), ("made", self.made, "·"), ("dropped", self.dropped, "·"), ("left", self.left, "·")):
            if rows or title != "left":
                parts.append(f"{title}: {len(rows)}")
            parts += [f"  {a} {arrow} {b}" for a, b in rows]
        return "\n".join(parts)
