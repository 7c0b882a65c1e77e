"""The attentions the method is compared with: equal to their formulas, and finite where the published ones are not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from baseline_models import close, images, pvt_v1, pvt_v2, vit
from torch import nn

import shiftaddvit
from shiftaddvit.baselines import adder_attention, performer
from shiftaddvit.baselines.adder_attention import AdderAttention, AdderAttentionConfig
from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.baselines.performer import PerformerAttention, PerformerConfig, orthogonal_features
from shiftaddvit.errors import UserError
from shiftaddvit.layers import HashConfig
from shiftaddvit.reparam import recipes, reparameterize

torch.set_num_threads(1)


# Adder attention


def heads(*shape: int, seed: int = 0, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=generator) * scale).requires_grad_() for _ in range(3)]


def adders(identity: bool = True) -> AdderAttention:
    return AdderAttention(nn.Identity(), nn.Identity(), 2, 8, AdderAttentionConfig(identity))


@pytest.mark.parametrize("identity", [True, False])
def test_adder_attention_equals_its_formula(identity):
    q, k, v = heads(2, 2, 11, 8)
    distances = (q.unsqueeze(3) - k.unsqueeze(2)).abs().sum(-1)
    expected = (-distances / 8**0.5).softmax(-1) @ v + (v if identity else 0)
    close(adders(identity).attend(q, k, v), expected)


def test_adder_attention_is_the_same_in_slices_of_queries(monkeypatch):
    results = []
    for limit in (1 << 27, 2 * 2 * 11 * 4):
        monkeypatch.setattr(adder_attention, "SCORES", limit)
        parts = heads(2, 2, 11, 8)
        y = adders().attend(*parts)
        y.square().sum().backward()
        results.append([y, *(part.grad for part in parts)])
    for whole, sliced in zip(*results, strict=True):
        close(sliced, whole)


def test_adder_attention_over_an_images_first_stage_holds_no_differences(monkeypatch):
    """3136 tokens of 32 channels: the differences would be 315 million numbers, the scores are 10 million, less in slices."""
    monkeypatch.setattr(adder_attention, "SCORES", 1 << 21)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    q, k, v = (part.detach() for part in heads(1, 1, 3136, 32))
    layer = AdderAttention(nn.Identity(), nn.Identity(), 1, 32)
    with torch.no_grad(), Largest() as largest:
        y = layer.attend(q, k, v)
    assert y.isfinite().all() and 0 < largest.elements <= 1 << 21


def test_identity_mapping_keeps_the_rank_that_averaging_loses():
    """Distances of far tokens average everything alike; the identity keeps every token apart."""
    q, k, v = heads(1, 2, 30, 8, scale=1e-3)
    rank = {identity: torch.linalg.matrix_rank(adders(identity).attend(q, k, v)[0, 0] / v.abs().max(), tol=1e-2).item() for identity in (True, False)}
    assert rank[True] == 8 and rank[False] <= 1


# Performer


def test_performer_approaches_softmax_attention_as_features_grow():
    q, k, v = heads(1, 1, 30, 16, scale=0.5)
    expected = F.scaled_dot_product_attention(q, k, v)
    errors = []
    for count in (100, 2000, 40000):
        layer = PerformerAttention(nn.Identity(), nn.Identity(), 1, 16, PerformerConfig(count, epsilon=0.0))
        errors.append(((layer.attend(q, k, v) - expected).norm() / expected.norm()).item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.03, errors


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_performer_stays_finite_for_large_and_for_zero_queries(epsilon):
    layer = PerformerAttention(nn.Identity(), nn.Identity(), 1, 16, PerformerConfig(epsilon=epsilon))
    for scale in (0.0, 1e3, 1e6):
        parts = heads(1, 1, 9, 16, scale=scale)
        y = layer.attend(*parts)
        y.sum().backward()
        assert y.isfinite().all() and all(part.grad.isfinite().all() for part in parts), scale


def test_published_constant_is_added_to_features_and_batch_mates_do_not_matter():
    layer = PerformerAttention(nn.Identity(), nn.Identity(), 1, 16)
    q, k, v = heads(2, 1, 9, 16)
    x, y = q[:1].detach() * 0.5, k[:1].detach() * 0.5
    seen, other = x @ layer.directions.t(), y @ layer.directions.t()
    phi = torch.exp(seen - x.square().sum(-1, keepdim=True) / 2 - seen.amax(-1, keepdim=True)) + 1e-4
    psi = torch.exp(other - y.square().sum(-1, keepdim=True) / 2 - other.amax()) + 1e-4
    expected = phi @ (psi.transpose(-2, -1) @ v[:1]) / (phi @ psi.sum(-2).unsqueeze(-1))
    close(layer.attend(q, k, v)[:1], expected)


def test_random_features_are_orthogonal_seeded_by_layer_and_saved(tmp_path):
    drawn = orthogonal_features(10, 8, torch.Generator().manual_seed(3))
    unit = drawn / drawn.norm(dim=1, keepdim=True)
    close(unit[:8] @ unit[:8].t(), torch.eye(8))
    model = reparameterize(vit(), "performer")
    first, second = (block.attn.directions for block in model.blocks)
    assert not torch.equal(first, second) and torch.equal(first, reparameterize(vit(), "performer").blocks[0].attn.directions)
    other = reparameterize(vit(), replace(recipes["performer"], performer=PerformerConfig(seed=1)))
    assert not torch.equal(first, other.blocks[0].attn.directions)
    first.mul_(2)  # as if an older version had drawn differently
    shiftaddvit.save(model, tmp_path / "m.safetensors")
    assert torch.equal(shiftaddvit.load(tmp_path / "m.safetensors").blocks[0].attn.directions, first)
    assert performer.PerformerAttention(nn.Identity(), nn.Identity(), 1, 16).directions.shape == (44, 16)  # ⌊16 ln 16⌋


# Linear spatial reduction


def test_linear_reduction_is_timms_and_starts_from_the_summed_window():
    model = reparameterize(pvt_v2(), "sra-linear")
    before, after = pvt_v2().stages[0].blocks[0].attn, model.stages[0].blocks[0].attn
    close(after.sr.weight[:, :, 0, 0], before.sr.weight.sum((2, 3)))
    flat = torch.randn(1, 16, 1, 1).expand(1, 16, 56, 56)  # of a constant picture both convolutions see the same
    close(after.sr(after.pool(flat)), before.sr(flat)[:, :, :7, :7])
    timms = pvt_v2("pvt_v2_b2_li").stages[0].blocks[0].attn.state_dict()
    assert {key: value.shape for key, value in after.state_dict().items()} == {key: value.shape for key, value in timms.items()}
    assert model.stages[3].blocks[0].attn.pool is None  # the last stage keeps its attention
    already = reparameterize(pvt_v2("pvt_v2_b2_li"), "sra-linear")
    assert not already.shiftaddvit_report.used


def test_linear_reduction_needs_a_picture():
    with pytest.raises(UserError, match="blocks.0.attn .*'sra-linear': it is no attention with spatial reduction"):
        reparameterize(vit(), "sra-linear")
    with pytest.raises(UserError, match="block4.0.attn .*class token"):
        reparameterize(pvt_v1(), replace(recipes["sra-linear"], last_stage_softmax=False))


# Ecoformer: PVTv1 is NaN in the published table


def published_mix(h: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Ecoformer's attention under mixed precision as published: all of it in float32 but Σ_j h_jᵀ v_j, which is a product in half."""
    tokens, bits = h.shape[-2:]
    context = (h.half().transpose(-2, -1) @ v.half()).float()
    return (h @ context + (bits + 1) * v) / ((h * h.sum(-2, keepdim=True)).sum(-1, keepdim=True) + tokens * (bits + 1))


def test_ecoformer_stays_finite_where_the_published_product_overflows_half_precision():
    """3136 tokens of one sign beyond 65504/3136 = 20.9 overflow; the rows of the context are then ±inf, whose sum is NaN."""
    torch.manual_seed(0)
    h = torch.where(torch.rand(1, 1, 3136, 16) < torch.rand(16), 1.0, -1.0)
    v = torch.randn(1, 1, 3136, 64) + 30
    assert not published_mix(h, v - 15).isnan().any() and published_mix(h, v).isnan().any()
    layer = EcoformerAttention(nn.Identity(), nn.Identity(), 1, 64)
    values = v.half().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = layer.mix(h, h, values)
        y.float().square().sum().backward()
    assert y.dtype == torch.float16 and y.isfinite().all() and values.grad.isfinite().all()


def zero_queries(model: nn.Module) -> None:
    """Every query and key has length zero; the published code divides by it."""
    for block in model.block1:
        block.attn.q.weight.data.zero_(), block.attn.q.bias.data.zero_()


def equal_tokens(model: nn.Module) -> None:
    """All tokens of an image alike: the anchors are the tokens, so the kernel's width, their mean distance, is zero."""
    model.patch_embed1.proj.weight.data.zero_(), model.pos_embed1.data.zero_()


def huge_values(model: nn.Module) -> None:
    for block in model.block1:
        block.attn.kv.bias.data[16:] = 2000.0


HAZARDS = {"zero queries": zero_queries, "equal tokens": equal_tokens, "huge values": huge_values, "more anchors than tokens": lambda model: None}


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("half", [False, True])
def test_ecoformer_on_pvt_v1_has_no_nan(hazard, half):
    model = pvt_v1()
    HAZARDS[hazard](model)
    anchors = 100 if hazard == "more anchors than tokens" else 20  # the first stage has 64 tokens, the third 4
    model = reparameterize(model, replace(recipes["ecoformer"], hash=HashConfig(anchors=anchors, steps=3, bits=8), last_stage_softmax=False))
    shiftaddvit.calibrate(model, images())
    with torch.autocast("cpu", torch.float16, enabled=half):
        loss = F.cross_entropy(model.train()(images()).float(), torch.tensor([0, 1, 4]))
    (loss * (1024 if half else 1)).backward()
    assert loss.isfinite()
    broken = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not broken
