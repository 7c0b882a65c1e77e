"""The words of sensitivities and searches, which their files hold and reports read: primitives of a site, and quantities."""

from collections.abc import Mapping

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
