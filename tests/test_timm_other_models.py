"""Other models of timm and the users' own convert, or are refused by name."""

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention
from timm_models import PLAIN, attentions, built, images
from torch import nn

import shiftaddvit
from shiftaddvit.errors import UserError
from shiftaddvit.layers import Router, ShiftLinear
from shiftaddvit.reparam import Recipe, reparameterize

torch.set_num_threads(1)


SMALL = {
    "vit_small_patch14_reg4_dinov2": {"img_size": 42, "embed_dim": 32, "num_heads": 2, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2},
    "vit_small_patch16_18x2_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2},
    "twins_pcpvt_small": {"img_size": 32, "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1)},
    "pit_ti_224": {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 2, 2)},
}


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_other_families_convert(name, tmp_path):
    torch.manual_seed(0)
    model = shiftaddvit.create_model(name, {**SMALL[name], "num_classes": 3}).eval()
    x = torch.randn(2, 3, *([SMALL[name].get("img_size", 64)] * 2))
    reparameterize(model, "ours-quant-shift")
    expected = model(x)
    assert attentions(model) and expected.isfinite().all()
    shiftaddvit.save(model, tmp_path / "m.safetensors", packed=True)
    assert torch.equal(shiftaddvit.load(tmp_path / "m.safetensors")(x), expected)


@torch.no_grad()
def test_prefix_tokens_of_other_families():
    for name, tokens in (("vit_small_patch14_reg4_dinov2", 5), ("deit3_small_patch16_224", 1), ("pit_ti_224", 1), ("twins_pcpvt_small", 0)):
        model = reparameterize(shiftaddvit.create_model(name, SMALL[name]), "ours-quant-add")
        assert {module.prefix_tokens for module in attentions(model).values()} == {tokens}, name


@pytest.mark.parametrize(
    ("name", "args", "recipe", "says"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1)}, "ours-quant-add", "WindowAttention.*relative position bias.*attention = 'keep'"),
        ("beit_base_patch16_224", {"depth": 1}, "ours-quant-add", "relative position bias.*attention = 'keep'"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "ours-quant-add", "EvaAttention.*rotary.*attention = 'keep'"),
        ("convit_tiny", {"depth": 2}, "ours-quant-shift", "no attention in a known layout.*attention = 'linear'.*attention = 'keep'"),
        ("mixer_s32_224", {}, "attn-shift-add", "MlpMixer has no attention in a known layout"),
        ("fastvit_sa12", {}, Recipe(mlp="shift"), "no MLP in a known layout.*mlp = 'shift'"),
        ("resnet10t", {}, "mlp-shift", "no attention or MLP found in ResNet.*reparam/sites.py"),
    ],
)
def test_what_cannot_convert_is_refused_by_name_and_stays_as_it_was(name, args, recipe, says):
    model = timm.create_model(name, num_classes=2, **args)
    keys = list(model.state_dict())
    with pytest.raises(UserError, match=says):
        reparameterize(model, recipe)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_their_linears_can_still_shift_and_the_report_names_those_that_do_not(name):
    small = {"swin_tiny_patch4_window7_224": {"depths": (1, 1), "embed_dim": 24}}.get(name, {"depth": 1, "embed_dim": 48, "num_heads": 2})
    model = reparameterize(timm.create_model(name, num_classes=2, **small), Recipe(attn_linear="shift", mlp="shift"))
    shifts = {key for key, module in model.named_modules() if isinstance(module, ShiftLinear)}
    left = dict(model.shiftaddvit_report.left)
    linears = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert shifts and set(left) == {key for key in linears if not key.startswith("head")}
    assert {"swin": "layers.1.downsample.reduction", "beit": "blocks.0.attn.qkv", "eva0": "blocks.0.attn.qkv"}[name[:4]] in left
    assert f"left: {len(left)}" in str(model.shiftaddvit_report)


class OwnAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) + x


class OwnViT(timm.models.VisionTransformer):
    def forward_features(self, x):
        return 2 * super().forward_features(x)


@torch.no_grad()
def test_a_users_subclass_keeps_its_own_forward():
    torch.manual_seed(0)
    model = OwnViT(num_classes=5, **PLAIN).eval()
    plain = built("vit")
    reparameterize(model, "ours-quant-moe").load_state_dict(plain.state_dict())
    assert torch.equal(model.forward_features(images()), 2 * plain.forward_features(images()))


def test_a_users_own_attention_is_refused_and_its_linears_shift():
    model = timm.models.VisionTransformer(num_classes=5, attn_layer=OwnAttention, **PLAIN).eval()
    with pytest.raises(UserError, match=r"unknown form test_timm_other_models\.OwnAttention.*linears can still shift"):
        reparameterize(model, "ours-quant-add")
    reparameterize(model, Recipe(attn_linear="shift"))
    assert isinstance(model.blocks[0].attn, OwnAttention) and isinstance(model.blocks[0].attn.qkv, ShiftLinear)


class OfficialAttention(nn.Module):
    """The signature of the authors' PVT."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_heads, self.sr = 2, None
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, H, W):
        return self.proj(self.q(x))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_copy_of_the_authors_pyramid_and_a_linear_with_a_forward_of_its_own_are_not_misread():
    with pytest.raises(UserError, match="unknown form.*OfficialAttention"):
        reparameterize(nn.ModuleDict({"attn": OfficialAttention(8)}), Recipe(attention="linear"))
    model = built("vit", None)
    model.blocks[0].mlp.fc1 = Scaled(32, 128)
    reparameterize(model, Recipe(mlp="shift"))
    assert isinstance(model.blocks[0].mlp.fc1, Scaled) and isinstance(model.blocks[1].mlp.fc1, ShiftLinear)
    assert "blocks.0.mlp.fc1" in dict(model.shiftaddvit_report.left)


def test_routers_are_where_timm_expects_parameters():
    """num_params of timm's training script counts what trains; a packed model has no shift parameters left."""
    latent, packed = built("vit", "ours-quant-shift"), shiftaddvit.pack(built("vit", "ours-quant-shift"))
    dense = built("vit", None)
    shifted = sum(dense.get_submodule(name).weight.numel() for name, module in latent.named_modules() if isinstance(module, ShiftLinear))
    count = lambda model: sum(parameter.numel() for parameter in model.parameters())  # noqa: E731
    token_convs = sum(parameter.numel() for name, parameter in latent.named_parameters() if "token_conv" in name)
    assert count(latent) == count(dense) + shifted + token_convs and count(packed) == count(dense) - shifted + token_convs
    assert not any(isinstance(module, Router) for module in latent.modules())
