"""Converted pyramids as backbones of other networks, and models inside wrappers."""

import socket
from copy import deepcopy

import pytest
import timm
import torch
from timm.models import FeatureListNet
from timm.models._features import FeatureGetterNet
from timm.utils import ModelEmaV3
from timm_models import FAMILIES, PYRAMIDS, attentions, built, images, same
from torch import multiprocessing, nn

import shiftaddvit
from shiftaddvit.errors import UserError
from shiftaddvit.layers import PackedShiftLinear, ShiftLinear
from shiftaddvit.reparam import Recipe, recipes, reparameterize

torch.set_num_threads(1)


# ---- backbones


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (1, 2), (3,)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_only_before_conversion_equals_features_of_the_converted_model(family, wanted, tmp_path):
    """An extractor has other names for stages, may lack the last one, and hides the class tokens inside."""
    if family not in PYRAMIDS:
        wanted = (0, 1)
    name, args = FAMILIES[family]
    reference = built(family)
    torch.manual_seed(0)
    extractor = timm.create_model(name, features_only=True, out_indices=wanted, **args).eval()
    reparameterize(extractor, "ours-quant-moe")
    inner = {key.removeprefix("model.").replace("stages_", "stages."): key for key in extractor.state_dict()}
    weights = reference.state_dict()
    extractor.load_state_dict({inner[key]: weights[key] for key in inner})
    maps = extractor(images())
    expected = reference.forward_intermediates(images(), indices=list(wanted), intermediates_only=True)
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert [one.shape[1] for one in maps] == extractor.feature_info.channels()
    assert [32 // one.shape[-1] for one in maps] == [min(32, reduction) for reduction in extractor.feature_info.reduction()]
    ours = {key.rpartition(".")[0] for key in attentions(extractor)}
    assert not any("stages_3" in key or "block4" in key for key in ours)
    shiftaddvit.save(extractor, tmp_path / "backbone.safetensors")
    assert same(shiftaddvit.load(tmp_path / "backbone.safetensors")(images()), maps)


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("family", PYRAMIDS)
@torch.no_grad()
def test_a_converted_pyramid_becomes_a_backbone(family, packed, tmp_path):
    shiftaddvit.save(built(family), tmp_path / "m.safetensors", packed=packed)
    model = shiftaddvit.load(tmp_path / "m.safetensors")
    expected = model.forward_intermediates(images(), intermediates_only=True)
    wrap = {"pvt_v2": lambda m: FeatureListNet(m, out_indices=(0, 1, 2, 3), flatten_sequential=True), "pvt_v1": FeatureGetterNet}[family]
    backbone = wrap(deepcopy(model)) if family == "pvt_v2" else wrap(deepcopy(model), out_indices=(0, 1, 2, 3))
    assert same(backbone(images()), expected)
    assert backbone.feature_info.channels() == [16, 16, 32, 32] and backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert isinstance(
        next(m for m in backbone.modules() if isinstance(m, (ShiftLinear, PackedShiftLinear))), PackedShiftLinear if packed else ShiftLinear
    )


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.neck(self.backbone.forward_intermediates(x, indices=[-1], intermediates_only=True)[0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_backbone_inside_a_detector_converts_as_it_does_alone(family):
    alone = built(family)
    detector = reparameterize(Detector(built(family, None)).eval(), "ours-quant-moe")
    detector.backbone.load_state_dict(alone.state_dict())
    assert {f"backbone.{name}": module.prefix_tokens for name, module in attentions(alone).items()} == {
        name: module.prefix_tokens for name, module in attentions(detector).items()
    }
    assert torch.equal(detector(images()), detector.neck(alone.forward_intermediates(images(), indices=[-1], intermediates_only=True)[0]))


# ---- wrappers


def test_the_model_inside_a_wrapper_is_saved(tmp_path):
    model = built("vit")
    wrappers = (
        nn.DataParallel(model),
        ModelEmaV3(model),
        torch.compile(model, backend="eager"),
        torch.compile(nn.DataParallel(model), backend="eager"),
    )
    for wrapper in wrappers:
        shiftaddvit.save(wrapper, tmp_path / "m.safetensors")
        assert torch.equal(shiftaddvit.load(tmp_path / "m.safetensors")(images()), model(images()))
    with pytest.raises(UserError, match="Sequential was not built by timm"):
        shiftaddvit.save(nn.Sequential(model), tmp_path / "n.safetensors")


def _compare_gradients(rank: int, port: int) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    quiet = Recipe.from_dict({**recipes["ours-quant-moe"].to_dict(), "moe": {"noise": False}})
    for family in ("pvt_v2", "deit"):
        alone, shared = built(family, quiet).train(), nn.parallel.DistributedDataParallel(built(family, quiet).train())
        for image in images().split(1):
            (alone(image).square().sum() / 2).backward()
        shared(images()[rank : rank + 1]).square().sum().backward()
        for (name, expected), found in zip(alone.named_parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=name)
    torch.distributed.destroy_process_group()


def test_two_processes_average_every_gradient():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(_compare_gradients, (port,), nprocs=2, start_method="fork")
