"""What the balance loss weighs experts by."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import shiftaddvit as sav
from shiftaddvit.data.resident import ResidentLoader
from shiftaddvit.errors import UserError
from shiftaddvit.train import FinetuneConfig, StageConfig, finetune

ONE_EPOCH = FinetuneConfig(stages=(StageConfig("attention", 1), StageConfig("all", 1)), cost="energy")


def converted() -> torch.nn.Module:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    return sav.reparameterize(sav.create_model("vit_tiny_patch16_224", args), "ours-quant-moe")


def loader() -> ResidentLoader:
    rng = np.random.default_rng(0)
    return ResidentLoader(rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8), rng.integers(0, 5, 16), train=True, batch_size=8)


def test_energy_as_cost_makes_the_shift_expert_cheaper_than_the_multiplication_expert():
    model = converted()
    finetune(model, loader(), config=ONE_EPOCH, show=False)
    mult, shift = model.blocks[0].attn.qkv.latency.tolist()
    assert mult + shift == pytest.approx(1)
    assert shift < mult


def test_equal_costs_leave_the_experts_alike():
    model = converted()
    finetune(model, loader(), config=replace(ONE_EPOCH, cost="equal"), show=False)
    assert model.blocks[0].mlp.fc1.latency.tolist() == [0.5, 0.5]


def test_an_unknown_cost_is_refused():
    with pytest.raises(UserError, match="latency.*energy.*equal"):
        FinetuneConfig(cost="area")
