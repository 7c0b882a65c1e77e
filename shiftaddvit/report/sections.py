"""The page's sections: what each is called and, where it is a single table, what it says of itself."""

from dataclasses import dataclass

from .contents import Content


@dataclass(frozen=True)
class Section:
    """A section that is one table."""

    stop: str
    """In the navigation."""
    heading: str
    """Above it."""
    lead: str
    """What its numbers are, for a reader who has not seen the paper."""


SECTIONS = {
    "sensitivity": Section(
        "Sensitivity", "Which layers are sensitive",
        "One layer at a time is changed, everything else stays as it was and nothing is trained: how many points of accuracy that alone costs. "
        "Fine-tuning comes after and repairs much of it, so this says where to be careful, not what the final accuracy is.",
    ),
    "view-synthesis": Section(
        "3D", "Novel view synthesis",
        "The same replacements in a transformer that draws a scene from a new viewpoint, compared with photographs that it has not seen. "
        "PSNR (dB) and SSIM (at most 1) say how alike the pictures are, more is better; LPIPS says how different they look to a "
        "network, less is better.",
    ),
    "speed": Section(
        "Speed", "Speed of whole models",
        "Time on a real device. Every contender first had to give the right result. “engine” rows are converted models in shiftaddvit's own "
        "engine, the others run the same network by other means. Numbers hold for the named device, batch and number format, and for no other.",
    ),
    "ops": Section(
        "Operations", "Speed of single operations",
        "One operation at one size: who computes it, how long that takes, and how near it is to the floor, the least time that "
        "the device's memory or "
        "arithmetic would allow (100 % cannot be beaten).",
    ),
    "experts": Section(
        "Expert times", "What each expert costs in time",
        "In a mixture every token goes to a multiplication expert or to a shift expert. While the model is fine-tuned, a loss "
        "keeps both equally busy, "
        "so that neither waits: it weighs the experts by the times below, measured on the device where the training ran.",
    ),
}  # fmt: skip


def stops(found: Content) -> list[tuple[str, str]]:
    """(anchor, words) of the sections that there are, for the navigation."""
    there = (
        ("regions", "Image regions", found.results.dispatches), ("ablation", "Comparison", True), ("tradeoffs", "Trade-offs", found.tradeoffs),
        ("search", "Search", found.searches or found.search_latencies), ("energy", "Energy", found.energy_totals),
        ("shares", "Shift share", found.shares), ("training", "Training", found.curves),
        *((table.id, SECTIONS[table.id].stop, True) for table in found.tables), ("files", "Files", True),
    )  # fmt: skip
    return [(anchor, words) for anchor, words, shown in there if shown]
