"""The words of sensitivities and searches, which their files hold and reports read: primitives of a site, and quantities."""

from collections.abc import Mapping

from shiftaddvit.errors import UserError, unknown

DENSE = "dense"
"""The option of leaving an attention or MLP as it is."""
PRIMITIVES: Mapping[str, Mapping[str, str]] = {
    "msa": {"attention": "msa"},
    "linear": {"attention": "linear"},
    "add": {"attention": "linear", "add": "quant"},
    "hash": {"attention": "linear", "add": "ksh"},
    "attn-shift": {"attn_linear": "shift"},
    "attn-moe": {"attn_linear": "moe"},
    "mlp-shift": {"mlp": "shift"},
    "mlp-moe": {"mlp": "moe"},
}
"""The columns of a recipe that each primitive sets at one site. Two of one attention go together with a plus: `add+attn-shift`."""
UNITS = {"energy": "mJ", "latency": "µs", "kl": "nats", "loss": "nats", "drop": "points"}
"""Of every quantity."""
COSTS = ("energy", "latency")
"""What a network takes; the other quantities say how far it is from the dense one."""
DAMAGES = ("kl", "loss", "drop")
"""KL divergence from the dense model, rise of the cross-entropy, fall of the accuracy; before any fine-tuning."""


def change_of(name: str) -> dict[str, str]:
    """The recipe columns that a primitive, or several joined by `+`, set at one site. UserError for an unknown one, for two that set
    the same column, and for an attention's with an MLP's."""
    change: dict[str, str] = {}
    for part in name.split("+"):
        if part not in PRIMITIVES:
            raise unknown("primitive", part, PRIMITIVES)
        added = PRIMITIVES[part]
        if set(added) & set(change) or (change and ("mlp" in change) != ("mlp" in added)):
            raise UserError(f"the primitives of {name!r} exclude one another: join one form of attention and one of its linears")
        change |= added
    return change
