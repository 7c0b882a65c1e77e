"""Layers: parity with the published attention, batch independence, the three lives of a shift layer, and honest routing."""

import math
import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import shiftaddvit
from shiftaddvit.baselines.ecoformer import EcoformerAttention
from shiftaddvit.errors import UserError
from shiftaddvit.layers import (
    AngularAttention, AngularConfig, BinaryConfig, HashConfig, KernelHash, MoEConfig, MoELinear, MoEMlp, PackedShiftLinear, Router,
    ShiftConfig, ShiftLinear, pack, record_routing,
)  # fmt: skip

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
ADDS = {"float": None, "quant": BinaryConfig(), "ksh": HashConfig(bits=6, anchors=5, steps=3)}


def attention(add=None, config=AngularConfig(), heads=2, dim=16, prefix=0, cls=AngularAttention, **calibration) -> AngularAttention:
    torch.manual_seed(0)
    parts = 2 if isinstance(add, HashConfig) or config.shared_qk else 3
    qkv, proj = nn.Linear(dim, parts * dim), nn.Linear(dim, dim)
    if cls is EcoformerAttention:
        layer = cls(qkv, proj, heads, dim // heads, add)
    else:
        layer = cls(qkv, proj, heads, dim // heads, add, config, prefix)
    if layer.token_conv is not None:
        nn.init.normal_(layer.token_conv.weight, std=0.2)
    if layer.hash is not None:
        layer.hash.calibrate(torch.randn(2, heads, 9, dim // heads), torch.Generator().manual_seed(0))
    return layer


def test_published_binary_attention_in_value_and_gradients():
    data = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "linangular_binary.npz").items()}
    heads = int(data["heads"])
    binary = BinaryConfig(threshold="tensor", published_window=True)
    layer = AngularAttention(nn.Linear(64, 192), nn.Linear(64, 64), heads, 64 // heads, binary, AngularConfig.published())
    ours = {"qkv": layer.qkv, "proj": layer.proj, "dconv": layer.token_conv}
    for key in (key for key in data if key.startswith("w.")):
        module, name = key[2:].split("/")
        getattr(ours[module], name).data.copy_(data[key])
    x = data["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(data["grad_y"])
    torch.testing.assert_close(y.detach(), data["y"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, data["grad_x"], rtol=1e-4, atol=1e-5)
    for key in (key for key in data if key.startswith("g.")):
        module, name = key[2:].split("/")
        torch.testing.assert_close(getattr(ours[module], name).grad, data[key], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("local", ["own", "mean", "none"])
@pytest.mark.parametrize("context", ["sum", "mean"])
def test_linear_attention_equals_the_double_loop(local, context):
    layer = attention(config=AngularConfig(local=local, context=context, output_norm="none", token_conv=0))
    x = torch.randn(2, 5, 16)
    q, k, v = layer.queries_keys_values(x)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    expected = torch.zeros_like(v)
    for i in range(5):
        for j in range(5):
            similarity = (q[:, :, i] * k[:, :, j]).sum(-1, keepdim=True) / math.pi / (5 if context == "mean" else 1)
            expected[:, :, i] += similarity * v[:, :, j] + (v[:, :, j] / 10 if local == "mean" else 0)
        expected[:, :, i] += v[:, :, i] / 2 if local == "own" else 0
    torch.testing.assert_close(layer.mix(*layer.encode(q, k), v), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("add", ADDS)
def test_an_image_alone_equals_the_image_in_a_batch(add):
    layer = attention(ADDS[add]).eval()
    x = torch.randn(4, 9, 16)
    x[0] *= 30
    torch.testing.assert_close(layer(x[2:3]), layer(x)[2:3], rtol=1e-5, atol=1e-6)


def test_the_published_threshold_lets_batch_mates_change_an_image():
    layer = attention(BinaryConfig(threshold="tensor")).eval()
    x = torch.randn(4, 9, 16)
    x[0] = x[0].abs() + 3
    assert (layer(x[2:3]) - layer(x)[2:3]).abs().max() > 1e-3


@pytest.mark.parametrize("add", ADDS)
def test_zero_tokens_give_finite_values_and_gradients(add):
    layer = attention(ADDS[add])
    for linear in (layer.qkv, layer.proj):
        nn.init.zeros_(linear.bias)
    x = torch.zeros(2, 9, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_prefix_tokens_stay_out_of_the_raster_window():
    layer = attention(prefix=2)
    v = torch.randn(1, 2, 8, 8)
    moved = v.clone()
    moved[:, :, :2] += 1.0
    difference = layer._convolve(moved) - layer._convolve(v)
    centre = layer.token_conv.weight[:, 0, 4, 0].view(1, 2, 1, 1)
    torch.testing.assert_close(difference[:, :, :2], centre.expand(1, 2, 2, 8))
    assert (difference[:, :, 2:] == 0).all()
    # the published form lets them in
    layer.config = AngularConfig(prefix_in_conv=True)
    assert ((layer._convolve(moved) - layer._convolve(v))[:, :, 2:] != 0).any()


def test_token_convolution_is_a_window_of_neighbours_per_head():
    layer = attention(heads=2)
    v = torch.randn(1, 2, 12, 8)
    weight = layer.token_conv.weight[:, 0, :, 0]
    expected = torch.zeros_like(v)
    for token in range(12):
        for tap in range(9):
            if 0 <= token + tap - 4 < 12:
                expected[:, :, token] += weight[:, tap].view(1, 2, 1) * v[:, :, token + tap - 4]
    torch.testing.assert_close(layer.token_conv(v), expected, rtol=1e-4, atol=1e-5)


def test_switched_off_attention_is_softmax_attention():
    layer = attention(BinaryConfig())
    layer.enabled = False
    x = torch.randn(2, 5, 16)
    q, k, v = layer.queries_keys_values(x)
    expected = ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.proj(expected.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-6)


def test_sparse_term_only_in_training():
    layer = attention(config=AngularConfig(sparse_threshold=0.02))
    x = torch.randn(1, 5, 16)
    assert (layer.train()(x) - layer.eval()(x)).abs().max() > 1e-3
    layer.config = AngularConfig()
    plain = layer(x)
    layer.config = AngularConfig(sparse_threshold=0.02)
    assert torch.equal(layer.eval()(x), plain)


def test_a_mask_is_refused():
    with pytest.raises(ValueError, match="no mask"):
        attention()(torch.randn(1, 5, 16), attn_mask=torch.ones(5, 5))


def test_ecoformer_equals_its_formula():
    layer = attention(HashConfig(bits=6, anchors=5, steps=3), cls=EcoformerAttention).eval()
    h = torch.where(torch.randn(1, 2, 7, 6) > 0, 1.0, -1.0)
    v = torch.randn(1, 2, 7, 8)
    expected = torch.empty_like(v)
    for i in range(7):
        numerator = sum((h[:, :, i] * h[:, :, j]).sum(-1, keepdim=True) * v[:, :, j] for j in range(7)) + 7 * v[:, :, i]
        expected[:, :, i] = numerator / ((h[:, :, i] * h.sum(2)).sum(-1, keepdim=True) + 7 * 7)
    torch.testing.assert_close(layer.mix(h, h, v), expected, rtol=1e-4, atol=1e-6)
    x = torch.randn(1, 7, 16)
    assert set(layer.encode(*layer.queries_keys_values(x)[:2])[0].unique().tolist()) <= {-1.0, 1.0}


def test_uncalibrated_hash_says_what_to_do():
    layer = KernelHash(2, 8, HashConfig())
    with pytest.raises(UserError, match="shiftaddvit.calibrate"):
        layer(torch.randn(1, 2, 5, 8))


def test_calibrated_hash_survives_its_state_and_a_copy():
    layer = attention(ADDS["ksh"]).hash
    fresh = KernelHash(2, 8, layer.config)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 5, 8)
    for other in (fresh, deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_hash_calibration_with_fewer_tokens_than_anchors_and_equal_by_seed():
    x = torch.randn(2, 2, 3, 8)
    layers = [KernelHash(2, 8, HashConfig(steps=2)) for _ in range(2)]
    for layer in layers:
        layer.calibrate(x, torch.Generator().manual_seed(7))
    assert torch.equal(layers[0].directions, layers[1].directions) and torch.equal(layers[0].anchors, layers[1].anchors)
    assert layers[0](x).isfinite().all()


SHIFTS = [
    ShiftConfig(variant=variant, bits=bits, rounding=rounding, channel_offset=offset)
    for variant in ("ps", "q") for bits in (4, 5) for rounding in ("log", "value") for offset in (True, False)
]  # fmt: skip


@pytest.mark.parametrize("config", SHIFTS, ids=lambda c: f"{c.variant}{c.bits}-{c.rounding}-{'offset' if c.channel_offset else 'plain'}")
@pytest.mark.parametrize("width", [1, 13, 24])
def test_packed_layer_equals_latent_layer(config, width):
    torch.manual_seed(width)
    linear = nn.Linear(width, 7)
    linear.weight.data *= torch.tensor([1e-40, 1e-3, 0.0, 1.0, 30.0, 1.0, 1.0]).view(7, 1)
    linear.weight.data[5, 0] = 0
    latent = ShiftLinear.from_linear(linear, config)
    with torch.no_grad():  # training leaves the integers, and flips some signs to zero
        for parameter in latent.latent_parameters():
            parameter += 0.6 * torch.randn_like(parameter)
    packed = PackedShiftLinear.from_shift(latent)
    x = torch.randn(3, 5, width)
    assert torch.equal(packed.weight, latent.weight)
    assert torch.equal(packed(x), latent(x))
    for copy in (deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copy(x), latent(x))
    fresh = PackedShiftLinear(width, 7, True, config)
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(x), latent(x))


def test_packed_fixed_point_layer_equals_latent_layer():
    layer = ShiftLinear.from_linear(nn.Linear(8, 4), ShiftConfig(fixed_point=True))
    x = torch.randn(3, 8)
    assert torch.equal(PackedShiftLinear.from_shift(layer)(x), layer(x))
    assert not torch.equal(ShiftLinear.from_linear(nn.Linear(8, 4))(x), layer(x))


@pytest.mark.parametrize("config", [ShiftConfig(bits=3), ShiftConfig(bits=6), ShiftConfig(variant="q", published_range=True)])
def test_what_cannot_be_packed_is_refused(config):
    with pytest.raises(UserError, match="cannot be packed"):
        PackedShiftLinear.from_shift(ShiftLinear(8, 4, config=config))


def test_pack_reaches_every_layer_and_the_layer_itself():
    layer = ShiftLinear(8, 8)
    assert isinstance(pack(deepcopy(layer)), PackedShiftLinear)
    model = nn.Sequential(layer, nn.Sequential(nn.GELU(), ShiftLinear(8, 2)))
    x = torch.randn(3, 8)
    expected = model(x)
    assert torch.equal(pack(model)(x), expected)
    assert not any(isinstance(module, ShiftLinear) for module in model.modules())


@pytest.mark.parametrize("config", SHIFTS[:2] + SHIFTS[8:10], ids=str)
def test_inherited_shift_layer_switched_off_is_the_linear_layer(config):
    linear = nn.Linear(12, 6)
    linear.weight.data[0] = 0
    layer = ShiftLinear.from_linear(linear, config)
    x = torch.randn(4, 12)
    assert (layer(x) - linear(x)).abs().max() > 1e-3
    layer.enabled = False
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-6)


def test_a_fresh_shift_layer_is_mostly_nonzero():
    assert (ShiftLinear(64, 64).weight != 0).float().mean() > 0.99


@pytest.mark.parametrize("changes", [{"variant": "r"}, {"rounding": "up"}, {"bits": 9}, {"published_range": True}])
def test_shift_config_names_the_wrong_field(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ShiftConfig(**changes)


@pytest.mark.parametrize("gate", ["value-preserving", "paper"])
def test_router_receives_gradient(gate):
    torch.manual_seed(0)
    layer = MoELinear.from_linear(nn.Linear(8, 6), MoEConfig(gate=gate))
    layer(torch.randn(2, 5, 8)).square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-4
    # the gate's derivative is the probability's: compare with autograd of the written formula
    assert layer.router.weight.grad.isfinite().all()


def test_value_preserving_gate_keeps_the_pretrained_function_and_the_paper_gate_shrinks_it():
    linear, x = nn.Linear(8, 6), torch.randn(2, 5, 8)
    for gate in ("value-preserving", "paper"):
        layer = MoELinear.from_linear(linear, MoEConfig(experts=("mult", "mult"), gate=gate)).eval()
        kept, no_grad = layer(x), None
        with torch.no_grad():
            no_grad = layer(x)
        torch.testing.assert_close(kept, no_grad)
        if gate == "value-preserving":
            assert torch.equal(kept, linear(x))
        else:
            assert (kept.abs() < linear(x).abs()).all()


@pytest.mark.parametrize("gate", ["value-preserving", "paper"])
@pytest.mark.parametrize("experts", [("mult", "shift"), ("shift", "mult", "shift")])
def test_mixture_equals_the_loop_over_tokens(gate, experts):
    torch.manual_seed(0)
    layer = MoELinear.from_linear(nn.Linear(8, 6), MoEConfig(experts=experts, gate=gate)).eval()
    for number, expert in enumerate(layer.experts):  # tell them apart
        expert.bias.data += number
    x = torch.randn(3, 7, 8)
    expected = torch.empty(3, 7, 6)
    seen = set()
    for b in range(3):
        for n in range(7):
            probabilities = (layer.router.weight @ x[b, n]).softmax(-1)
            best = int(probabilities.argmax())
            seen.add(best)
            expected[b, n] = layer.experts[best](x[b, n]) * (probabilities[best] if gate == "paper" else 1)
    assert seen == set(range(len(experts)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("winner", [0, 1])
def test_all_tokens_may_go_to_one_expert(winner):
    layer = MoELinear.from_linear(nn.Linear(8, 6))
    layer.router.weight.data.zero_()[winner] = 100.0
    layer.experts[1].bias.data += 1
    x = torch.rand(2, 5, 8) + 0.1
    torch.testing.assert_close(layer(x), layer.experts[winner](x))
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_noise_only_in_training_and_only_when_asked():
    x = torch.randn(500, 8)
    router = Router(8)
    evaluated = router.eval()(x)
    assert torch.equal(evaluated.logits, evaluated.clean_logits)
    trained = router.train()(x)
    noise = trained.logits - trained.clean_logits
    assert noise.std().item() == pytest.approx(0.5, rel=0.1) and abs(noise.mean().item()) < 0.06
    quiet = Router(8, noise=False).train()(x)
    assert torch.equal(quiet.logits, quiet.clean_logits)
    assert torch.equal(trained.index, trained.logits.argmax(-1))
    torch.testing.assert_close(trained.gate, torch.ones(500))


def test_records_name_the_owner_and_stop_with_the_context():
    model = nn.ModuleDict({"a": MoELinear.from_linear(nn.Linear(8, 8)), "b": nn.Sequential(MoELinear.from_linear(nn.Linear(8, 4)))})
    x = torch.randn(2, 3, 8)
    with record_routing(model) as records:
        model["b"](model["a"](x))
        assert set(records) == {"a", "b.0"}
        assert records["a"].probs.shape == (2, 3, 2) and records["b.0"].index.shape == (2, 3)
        first = records["a"]
        model["a"](2 * x)
        assert records["a"] is not first
    records.clear()
    model["a"](x)
    assert not records


def test_switched_off_mixture_is_its_first_expert():
    linear, x = nn.Linear(8, 6), torch.randn(2, 5, 8)
    layer = MoELinear.from_linear(linear)
    layer.enabled = False
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("changes", [{"experts": ("mult",)}, {"experts": ("mult", "add")}, {"gate": "soft"}, {"router": "global"}])
def test_moe_config_names_the_wrong_field(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        MoEConfig(**changes)


@pytest.mark.parametrize("layer", [attention(BinaryConfig()), attention(ADDS["ksh"]), MoELinear.from_linear(nn.Linear(16, 16))])
def test_layers_pickle_and_copy(layer):
    layer = layer.eval()
    x = torch.randn(2, 9, 16)
    for copy in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copy(x), layer(x))


@pytest.mark.parametrize("name", ["quant", "moe"])
def test_layers_compile_in_one_graph_with_equal_values_and_gradients(name):
    torch.compiler.reset()
    layer = attention(BinaryConfig()) if name == "quant" else MoELinear.from_linear(nn.Linear(16, 6), MoEConfig(noise=False))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 9, 16)
    expected = layer(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    actual = compiled(x)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual.square().sum(), list(layer.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*ADDS, "ecoformer", "moe", "shift"])
def test_autocast_is_finite_and_near_full_precision(name):
    torch.manual_seed(0)
    if name == "moe":
        layer: nn.Module = MoELinear.from_linear(nn.Linear(16, 16))
    elif name == "shift":
        layer = ShiftLinear(16, 16)
    elif name == "ecoformer":
        layer = attention(ADDS["ksh"], cls=EcoformerAttention)
    else:
        layer = attention(ADDS[name])
    layer.eval()
    x = torch.randn(2, 9, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and y.isfinite().all() and x.grad.isfinite().all()
    if name in ("float", "moe", "shift"):  # codes may flip
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cls", [AngularAttention, EcoformerAttention])
def test_sums_over_tokens_stay_in_float32_under_autocast(cls):
    """Above 256 bfloat16 knows no odd number, so a sum of 300 ones tells the two apart."""
    layer = attention(HashConfig(bits=2, anchors=5, steps=1), AngularConfig(token_conv=0, context="sum", output_norm="none"), cls=cls)
    codes, v = torch.ones(1, 2, 301, 2), torch.ones(1, 2, 301, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer.mix(codes, codes, v)
    torch.testing.assert_close(mixed, layer.mix(codes, codes, v), rtol=1e-6, atol=0)


def test_mlp_mixture_routes_whole_mlps():
    from timm.layers import Mlp

    def to_shift(mlp: nn.Module) -> nn.Module:
        mlp.fc1, mlp.fc2 = ShiftLinear.from_linear(mlp.fc1), ShiftLinear.from_linear(mlp.fc2)
        return mlp

    layer = MoEMlp.from_mlp(Mlp(8, 16, 8), to_shift, MoEConfig(router="mlp")).eval()
    x = torch.randn(2, 20, 8)
    index = layer.router(x).index
    assert set(index.unique().tolist()) == {0, 1}
    torch.testing.assert_close(layer(x), torch.where((index == 0).unsqueeze(-1), layer.experts[0](x), layer.experts[1](x)))


@pytest.mark.parametrize("recipe", ["ours-quant-moe", "ours-quant-shift", "ours-ksh-moe", "ecoformer", "ours-quant-linear", "msa"])
def test_logits_of_an_image_do_not_depend_on_its_batch(recipe):
    torch.manual_seed(1)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = shiftaddvit.reparameterize(shiftaddvit.create_model("vit_tiny_patch16_224", args), recipe)
    images = torch.randn(4, 3, 32, 32)
    images[0] *= 20
    shiftaddvit.calibrate(model, images)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images[2:3]), model(images)[2:3], rtol=1e-4, atol=1e-5)
