"""Losses: the balance loss against a plain loop, its optimum, its gradient; distillation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftaddvit.layers import MoEConfig, MoELinear, Router, Routing, record_routing
from shiftaddvit.losses import (
    balance_loss, classification_loss, distillation_loss, squared_coefficient_of_variation, win_probability,
)  # fmt: skip
from shiftaddvit.train.latency import expert_costs, set_expert_costs

torch.set_num_threads(1)


def routing_of(probs: torch.Tensor) -> Routing:
    logits = probs.log()
    return Routing(probs.argmax(-1), torch.ones(probs.shape[:-1]), logits, logits)


def scv(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


@pytest.mark.parametrize("experts", [2, 3])
def test_balance_loss_equals_the_loop_over_tokens(experts):
    torch.manual_seed(0)
    router = Router(6, experts).train()
    records = {"a": router(torch.randn(2, 7, 6)), "b": router(torch.randn(3, 6))}
    costs = {"a": torch.rand(experts) + 0.1, "b": torch.rand(experts) + 0.1}
    terms = []
    for name, routing in records.items():
        alpha = [float(c) / float(costs[name].sum()) for c in costs[name]]
        importance, load = [0.0] * experts, [0.0] * experts
        for p, noisy, clean in zip(*(t.detach().reshape(-1, experts).tolist() for t in (routing.probs, routing.logits, routing.clean_logits))):
            for i in range(experts):
                threshold = max(noisy[j] for j in range(experts) if j != i)
                importance[i] += p[i]
                load[i] += 0.5 * (1 + math.erf((clean[i] - threshold) * experts / math.sqrt(2)))
        terms.append(scv([a * n for a, n in zip(alpha, importance)]) + scv([a * n for a, n in zip(alpha, load)]))
    assert balance_loss(records, costs).item() == pytest.approx(sum(terms) / 2, rel=1e-4)


def test_importance_is_least_where_tokens_go_inversely_to_cost():
    cost = torch.tensor([3.0, 1.0])
    share = cost / cost.sum()
    values = {p: squared_coefficient_of_variation(share * torch.tensor([p, 1 - p])).item() for p in (0.1, 0.2, 0.25, 0.3, 0.5, 0.9)}
    assert min(values, key=values.get) == 0.25 and values[0.25] == pytest.approx(0, abs=1e-9)


def test_training_routers_on_the_balance_loss_alone_sends_tokens_inversely_to_cost():
    torch.manual_seed(0)
    x = torch.randn(400, 16)
    x[:, 0] = 1  # something for a bias, as the norm before a router leaves
    router = Router(16).train()
    optimizer = torch.optim.Adam(router.parameters(), 0.05)
    for _ in range(150):
        loss = balance_loss({"r": router(x)}, {"r": torch.tensor([3.0, 1.0])})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    routing = router(x.repeat(20, 1))
    assert (routing.index == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert routing.probs[:, 0].mean().item() == pytest.approx(0.25, abs=0.03)


def test_win_probability_is_the_chance_under_new_noise():
    clean = torch.tensor([[0.3, 0.1]])
    noisy = torch.tensor([[0.5, -0.2]])
    routing = Routing(noisy.argmax(-1), torch.ones(1), noisy, clean)
    draws = clean + 0.5 * torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([(draws[:, 0] > -0.2).float().mean(), (draws[:, 1] > 0.5).float().mean()])
    torch.testing.assert_close(win_probability(routing)[0], expected, atol=5e-3, rtol=0)


def test_equal_costs_want_equal_shares():
    probs = torch.full((10, 2), 0.5)
    assert balance_loss({"a": routing_of(probs)}, {"a": torch.ones(2)}).item() == pytest.approx(0, abs=1e-9)
    uneven = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    assert balance_loss({"a": routing_of(uneven)}, {"a": torch.ones(2)}).item() > 0.5


def test_gradient_reaches_every_router():
    model = nn.Sequential(MoELinear.from_linear(nn.Linear(8, 8)), MoELinear.from_linear(nn.Linear(8, 8), MoEConfig(gate="paper")))
    set_expert_costs(model, {"0": [3.0, 1.0], "1": [1.0, 5.0]})
    assert model[0].latency.tolist() == [0.75, 0.25]
    with record_routing(model) as records:
        model(torch.randn(4, 5, 8))
        balance_loss(records, expert_costs(model)).backward()
    for layer in model:
        assert layer.router.weight.grad.abs().max() > 1e-5


def test_a_model_without_mixtures_has_no_balance_loss():
    assert balance_loss({}, {}).item() == 0


def test_all_tokens_to_one_expert_is_finite():
    logits = torch.tensor([[500.0, -500.0]]).repeat(4, 1).requires_grad_()
    routing = Routing(logits.argmax(-1), torch.ones(4), logits, logits)
    loss = balance_loss({"a": routing}, {"a": torch.tensor([1.0, 2.0])})
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_scaled_kl_and_zero_for_a_perfect_student(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = (p * (p / q).log()).sum() / 4 * temperature**2
    loss = distillation_loss(student, teacher, temperature)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def test_classification_takes_classes_or_soft_targets():
    logits = torch.randn(4, 3)
    classes = torch.tensor([0, 2, 1, 1])
    soft = F.one_hot(classes, 3).float()
    torch.testing.assert_close(classification_loss(logits, classes), classification_loss(logits, soft))
    smooth = classification_loss(logits, classes, label_smoothing=0.1)
    torch.testing.assert_close(smooth, classification_loss(logits, soft * 0.9 + 0.1 / 3))
    assert classification_loss(logits.half() * 100, classes).dtype == torch.float32
