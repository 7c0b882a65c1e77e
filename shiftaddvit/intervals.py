"""What an accuracy and a difference of two are worth: 95 % intervals and an exact test, from counts of images alone."""

import math


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """95 % interval of a share in % (Wilson, 1927): never empty, never outside 0 to 100."""
    z = 1.959964
    share = right / images
    centre = share + z**2 / (2 * images)
    spread = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    scale = 100 / (1 + z**2 / images)
    return max(0.0, scale * (centre - spread)), min(100.0, scale * (centre + spread))


def paired_interval(only_first: int, only_second: int, images: int) -> tuple[float, float]:
    """95 % interval of the difference in points of two models on the same images, from the images that only one of them gets right
    (Agresti and Min, 2005): half an image in each of the four cells keeps it honest where few images differ."""
    total, shift = images + 2, only_first - only_second
    spread = 1.959964 * math.sqrt(only_first + only_second + 1 - shift**2 / total) / total
    low, high = shift / total - spread, shift / total + spread
    return 100 * max(-1.0, low), 100 * min(1.0, high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value: the discordant images fall to either side like fair coins."""
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    log_half, whole = discordant * math.log(0.5), math.lgamma(discordant + 1)
    terms = (math.exp(whole - math.lgamma(k + 1) - math.lgamma(discordant - k + 1) + log_half) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(terms))
