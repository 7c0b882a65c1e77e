"""Hash functions of an attention layer: state that an explicit calibration fills and the checkpoint keeps."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.numerics.hashing import hash_codes, kernel_features, similarity_targets, train_hash


@dataclass(frozen=True)
class HashConfig:
    """Kernel-supervised hashing (KSH)."""

    bits: int = 16
    """Length r of a code."""
    anchors: int = 25
    """Number m of anchor tokens a head."""
    top: int = 10
    """How many of each token's most and least similar tokens supervise the hash."""
    codes: str = "zero-one"
    """{0, 1} (ShiftAddViT) or `plus-minus` (Ecoformer)."""
    steps: int = 100
    """Training steps a bit."""
    learning_rate: float = 5e-4
    """Of that training (SGD, Nesterov momentum 0.9)."""

    def __post_init__(self) -> None:
        if self.codes not in ("zero-one", "plus-minus"):
            raise ValueError(f"HashConfig.codes must be 'zero-one' or 'plus-minus', got {self.codes!r}")
        if min(self.bits, self.anchors, self.top, self.steps) < 1:
            raise ValueError("HashConfig: bits, anchors, top and steps must be at least 1")


class KernelHash(nn.Module):
    """codes = 1[κ(x) Aᵀ > 0]. `anchors`, `mean` and `directions` come from `calibrate`; nothing is learned inside a forward."""

    def __init__(self, heads: int, head_dim: int, config: HashConfig):
        super().__init__()
        self.config = config
        self.register_buffer("anchors", torch.zeros(1, heads, config.anchors, head_dim))
        self.register_buffer("mean", torch.zeros(1, heads, 1, config.anchors))
        self.register_buffer("directions", torch.zeros(heads, config.bits, config.anchors))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        # A host-side copy of the flag: reading the buffer would wait for the device in every forward.
        self._ready = False
        self.register_load_state_dict_post_hook(_refresh_flag)

    def _refresh(self) -> None:
        self._ready = bool(self.calibrated) if not self.calibrated.is_meta else False

    def forward(self, x: Float[Tensor, "B h N d"]) -> Float[Tensor, "B h N r"]:
        """Codes of unit-length tokens."""
        if not self._ready and not x.is_meta:
            raise UserError("the hash functions are not trained yet: call shiftaddvit.calibrate(model, images) first")
        with torch.autocast(x.device.type, enabled=False):
            features = kernel_features(x.float(), self.anchors) - self.mean
            return hash_codes(features, self.directions.float(), self.config.codes == "plus-minus")

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "B h N d"], generator: torch.Generator) -> None:
        """Choose anchors among the tokens of one image (of more, where it has too few) and train the directions. `generator` is a CPU
        generator, so that every device and rank draws the same."""
        x = x.detach().float()
        batch, heads, tokens, _ = x.shape
        config = self.config
        images = min(batch, -(-config.anchors // tokens))
        first = int(torch.randint(batch - images + 1, (), generator=generator))
        pool = x[first : first + images].transpose(0, 1).flatten(1, 2)  # (h, images·N, d)
        chosen = torch.stack([_draw(pool.shape[1], config.anchors, generator) for _ in range(heads)]).to(x.device)
        self.anchors.copy_(pool.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1])).unsqueeze(0))
        features = kernel_features(x, self.anchors)
        self.mean.copy_(features.mean(dim=(0, 2), keepdim=True))
        start = torch.randn(heads, config.bits, config.anchors, generator=generator).to(x.device)
        targets = similarity_targets(x, x, config.top)
        self.directions.copy_(train_hash(features - self.mean, targets, start, config.steps, config.learning_rate))
        self.calibrated.fill_(True)
        self._ready = True


def _refresh_flag(module: KernelHash, _incompatible_keys: object) -> None:
    module._refresh()


def _draw(population: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices, without repetition as long as there are enough."""
    rounds = -(-count // population)
    return torch.cat([torch.randperm(population, generator=generator) for _ in range(rounds)])[:count]
