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
    """95 % interval of the difference in points of two models on the same images, from the images that only one of them gets right.

    It leaves zero out exactly where `mcnemar` is below 0.05: the interval of Agresti and Min (2005; half an image added to each of the four
    cells), widened to the one that the exact test has, Clopper and Pearson's for the share of the discordant images."""
    total, shift = images + 2, only_first - only_second
    spread = 1.959964 * math.sqrt(only_first + only_second + 1 - shift**2 / total) / total
    low, high = shift / total - spread, shift / total + spread
    discordant = only_first + only_second
    if discordant:
        scale = discordant / images
        low = min(low, scale * (1 - 2 * _highest_share(only_second, discordant)))
        high = max(high, scale * (2 * _highest_share(only_first, discordant) - 1))
    return 100 * max(-1.0, low), 100 * min(1.0, high)


def _highest_share(count: int, of: int) -> float:
    """The share under which `count` or fewer have a probability of 2.5 %."""
    if count == of:
        return 1.0
    low, high = count / of, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(count, of, middle) > 0.025 else (low, middle)
    return (low + high) / 2


def _at_most(count: int, of: int, share: float) -> float:
    """Probability of `count` or fewer, for a share above `count / of`: terms fall from the last one on."""
    if share >= 1:
        return 0.0
    ways = math.lgamma(of + 1) - math.lgamma(count + 1) - math.lgamma(of - count + 1)
    term = math.exp(ways + count * math.log(share) + (of - count) * math.log1p(-share))
    total, k = term, count
    while k > 0 and term > 1e-17 * total:
        term *= k / (of - k + 1) * (1 - share) / share
        total, k = total + term, k - 1
    return total


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value: the discordant images fall to either side like fair coins."""
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    log_half, whole = discordant * math.log(0.5), math.lgamma(discordant + 1)
    terms = (math.exp(whole - math.lgamma(k + 1) - math.lgamma(discordant - k + 1) + log_half) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(terms))
