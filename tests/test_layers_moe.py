"""Mixtures: what a token gets is what its expert computes, and routing is recorded honestly."""

import pytest
import torch
from torch import nn

from shiftaddvit.layers import MoEConfig, MoELinear, MoEMlp, Router, ShiftLinear, record_routing

torch.set_num_threads(1)


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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_form_that_trains_on_a_gpu_is_the_same_function(monkeypatch, bias, training):
    torch.manual_seed(0)
    layer = MoELinear.from_linear(nn.Linear(8, 6, bias=bias)).train(training)
    if bias:
        layer.experts[1].bias.data += 1  # experts that differ
    x, upstream = torch.randn(3, 40, 8, requires_grad=True), torch.randn(3, 40, 6)

    def results():
        torch.manual_seed(1)  # of the noise
        with record_routing(layer) as records:
            y = layer(x)
        (routing,) = records.values()
        loss = (y * upstream).sum() + routing.probs.square().sum() + routing.clean_logits.square().sum()
        return y, routing, torch.autograd.grad(loss, (x, *layer.parameters()))

    expected_y, expected_routing, expected = results()
    monkeypatch.setattr(MoELinear, "trains_by_kernel", lambda self, x: True)
    y, routing, found = results()
    torch.testing.assert_close(y, expected_y)
    assert torch.equal(routing.index.long(), expected_routing.index) and torch.equal(routing.gate, torch.ones(3, 40))
    torch.testing.assert_close(routing.logits, expected_routing.logits)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
