"""Training: stages, groups of parameters, loud failures, costs of experts, several processes."""

import json
import math
import os
import subprocess
import sys
import textwrap
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from train_runs import STEPS, TWO_STAGES, Stopping, loader, model, same

import shiftaddvit
from shiftaddvit.errors import UserError
from shiftaddvit.layers import AngularAttention, KernelHash, ShiftLinear
from shiftaddvit.reparam import Recipe, recipes
from shiftaddvit.train import FinetuneConfig, NotFinite, StageConfig, finetune, pretraining
from shiftaddvit.train.config import config_from_dict
from shiftaddvit.train.optim import make_optimizer, parameter_groups
from shiftaddvit.train.plan import plan_stages
from shiftaddvit.train.position import Position, step_seed
from shiftaddvit.train.run_folder import RunFolder, read_log

pytestmark = pytest.mark.usefixtures("own_cache")


def planned(recipe: Recipe | str | None, config: FinetuneConfig = FinetuneConfig()) -> list[tuple[str, int]]:
    return [(stage.primitives, stage.epochs) for stage in plan_stages(model(recipe), config)]


def test_stages_follow_the_recipe_and_every_row_trains_equally_long():
    assert planned("ours-quant-moe") == [("attention", 10), ("all", 10)]
    assert planned("ours-quant-linear") == [("attention", 20)]
    assert planned("pvt-moe") == [("all", 20)]
    assert planned("pvt") == [("all", 20)]
    assert planned(None) == [("dense", 20)]
    assert planned(None, pretraining(7)) == [("dense", 7)]
    assert planned(Recipe(overrides=(("blocks.0.mlp", {"mlp": "shift"}),))) == [("all", 20)]
    assert planned(Recipe(overrides=(("blocks.0.attn", {"attention": "linear"}),))) == [("attention", 20)]


def test_the_attention_stage_multiplies_and_the_linear_stage_starts_from_what_it_reached(tmp_path):
    built, seen = model("ours-quant-shift"), []

    def look(images: torch.Tensor) -> torch.Tensor:
        seen.append((type(built.blocks[0].mlp.fc1), deepcopy(built.blocks[0].mlp.fc1.state_dict())))
        return images

    class Looking(Stopping):
        def __iter__(self):
            for batch in self.inner:
                look(batch[0])
                yield batch

    finetune(built, Looking(-1, look), None, replace(TWO_STAGES, ema_decay=None, shift_lr_scale=1.0), show=False)
    assert [kind for kind, _ in seen] == [nn.Linear] * 6 + [ShiftLinear] * 6
    assert isinstance(built.blocks[0].attn, AngularAttention)
    last, first = seen[5][1]["weight"], ShiftLinear.from_linear(nn.Linear(16, 64))
    first.load_state_dict(seen[6][1])
    assert torch.nn.functional.cosine_similarity(first.dense_weight().flatten(), last.flatten(), dim=0) > 0.999


def test_training_only_the_attention_stage_gives_a_model_that_saves(tmp_path):
    built = model("ours-quant-moe")
    finetune(built, loader(), None, replace(TWO_STAGES, stages=(StageConfig("attention", 1),)), output=tmp_path / "run", show=False)
    assert built.shiftaddvit_recipe.mlp == "mult" and built.shiftaddvit_recipe.add == "quant"
    assert same(shiftaddvit.load(tmp_path / "run" / "model.safetensors"), built)


@pytest.mark.parametrize("name", ["ours-ksh-moe", "ours-quant-shift"])
def test_no_decay_on_shifts_signs_routers_norms_and_biases(name):
    built = model(name)
    groups = parameter_groups(built, 0.05, 1e-3, 10.0)
    names = {id(p): key for key, p in built.named_parameters()}
    decayed, plain, shifts = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0, 0.0]
    assert groups[2]["lr"] == pytest.approx(1e-2)
    assert decayed | plain | shifts == set(names.values()) and not decayed & plain
    assert shifts == {key for key in names.values() if key.endswith((".shift", ".sign"))} and shifts
    assert not {key for key in decayed if "router" in key or "token_conv" in key or "norm" in key or key.endswith("bias")}
    assert {"cls_token", "pos_embed"} <= plain and "head.weight" in decayed


def test_q_latents_are_not_decayed():
    built = model(Recipe.from_dict({"mlp": "shift", "shift": {"variant": "q"}}))
    groups = parameter_groups(built, 0.05, 1e-3, 10.0)
    plain = {id(p) for p in groups[1]["params"]}
    assert all(id(m.latent) in plain for m in built.modules() if isinstance(m, ShiftLinear))


def spoil(images: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[0, 0, 0, 0] = math.nan
    return images


def test_nan_loss_stops_naming_step_and_layer_and_keeps_the_checkpoint(tmp_path):
    config = replace(TWO_STAGES, checkpoint_minutes=0.0)
    built = model()
    with pytest.raises(NotFinite, match=r"loss is nan at step 1 of epoch 1, stage 1: first at the output of patch_embed\.proj;"):
        finetune(built, Stopping(STEPS + 1, spoil), None, config, output=tmp_path / "run", show=False)
    assert all(p.isfinite().all() for p in built.parameters())
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["position"] == {"stage": 0, "epoch": 1, "step": 1}
    assert all(v.isfinite().all() for v in checkpoint["model"].values() if v.is_floating_point())


def test_a_broken_layer_is_named():
    built = model()
    built.blocks[0].mlp.act.register_forward_hook(lambda module, inputs, output: output * math.inf)
    with pytest.raises(NotFinite, match=r"step 0 of epoch 0.*the output of blocks\.0\.mlp\.act"):
        finetune(built, loader(), None, TWO_STAGES, show=False)
    built = model(None)
    built.norm.weight.data[0] = math.nan
    with pytest.raises(NotFinite, match="parameter norm.weight;"):
        finetune(built, loader(), None, TWO_STAGES, show=False)


def test_a_fused_optimiser_leaves_weights_alone_when_a_gradient_is_broken():
    from types import SimpleNamespace

    from shiftaddvit.train.update import Update

    linear = nn.Linear(3, 3)
    optimizer = make_optimizer(linear, "adamw", 1e-1, 0.1, 1.0, fused=True)
    update = Update.__new__(Update)
    update.accelerator, update.optimizer = SimpleNamespace(scaler=None), optimizer
    for bad in (True, False):
        before = linear.weight.detach().clone()
        for parameter in linear.parameters():
            parameter.grad = torch.full_like(parameter, math.nan if bad else 1.0)
        update.skip_if_broken(torch.tensor(math.nan if bad else 1.0))
        optimizer.step()
        assert linear.weight.isfinite().all() and torch.equal(linear.weight, before) == bad


def test_a_folder_with_another_run_is_refused_resumed_or_replaced(tmp_path):
    config = replace(TWO_STAGES, stages=(StageConfig("all", 1),))
    run = tmp_path / "run"
    finetune(model("mlp-shift"), loader(), None, config, output=run, show=False)
    whole = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(UserError, match="already holds a run.*--resume.*--overwrite"):
        finetune(model("mlp-shift"), loader(), None, config, output=run, show=False)
    with pytest.raises(UserError, match="another config"):
        finetune(model("mlp-shift"), loader(), None, replace(config, seed=4), output=run, resume=True, show=False)
    with pytest.raises(UserError, match="another recipe"):
        finetune(model("mlp-moe"), loader(), None, config, output=run, resume=True, show=False)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == whole
    finetune(model("mlp-moe"), loader(), None, config, output=run, overwrite=True, show=False)
    assert shiftaddvit.load(run / "model.safetensors").shiftaddvit_recipe.mlp == "moe"


def test_the_average_of_the_weights_is_the_result(tmp_path):
    config = replace(TWO_STAGES, stages=(StageConfig("all", 3, lr=0.1, warmup_epochs=0, min_lr=0.1),), ema_decay=0.9)
    averaged = model("mlp-shift")
    finetune(averaged, loader(), None, config, output=tmp_path / "run", show=False)
    checkpoint = RunFolder(tmp_path / "run", True).load_checkpoint()
    trained, average, result = checkpoint["model"], checkpoint["state"]["ema"], averaged.state_dict()
    assert all(torch.equal(result[key], average[key]) for key in result)
    moved = [(weights["blocks.0.mlp.fc2.shift"] - model("mlp-shift").blocks[0].mlp.fc2.shift).norm() for weights in (average, trained)]
    assert 0 < moved[0] < 0.99 * moved[1], "an average of a growing path lies nearer to its start than the end does"


def test_distillation_pulls_towards_the_teacher():
    teacher = model(None)
    teacher.head.bias.data = torch.tensor([4.0, 0.0, -4.0])
    config = replace(TWO_STAGES, stages=(StageConfig("all", 10, lr=0.5, warmup_epochs=0),), ema_decay=None)
    distances = {}
    images = next(iter(loader(False)))[0]
    for weight in (0.0, 1.0):
        student = model("mlp-shift")
        finetune(student, loader(), None, replace(config, distill_weight=weight), teacher=teacher, show=False)
        with torch.no_grad():
            distances[weight] = (student(images).softmax(-1) - teacher(images).softmax(-1)).abs().mean().item()
    assert distances[1.0] < 0.7 * distances[0.0]
    with pytest.raises(UserError, match="needs a teacher"):
        finetune(model(), loader(), None, replace(config, distill_weight=0.5), show=False)


def test_mixed_precision_leaves_no_trace_on_the_model(tmp_path):
    config = replace(TWO_STAGES, stages=(StageConfig("attention", 1), StageConfig("all", 1)), precision="bf16")
    built = model()
    finetune(built, loader(), loader(False), config, output=tmp_path / "run", show=False)
    assert "forward" not in vars(built)
    images = next(iter(loader(False)))[0]
    with torch.no_grad():
        assert torch.equal(built(images), shiftaddvit.load(tmp_path / "run" / "model.safetensors")(images))
    finetune(model(), loader(), None, replace(config, precision="no"), show=False)  # another precision in the same process


def test_attention_alone_can_be_compiled(tmp_path, monkeypatch):
    """The first stage compiles nothing, the second attention alone, while it trains alone; the weights are those of a run without."""
    compile_, ran = torch.compile, []

    def watched(function, **options):
        fast = compile_(function, backend="aot_eager", **options)
        return lambda *args: (ran.append(torch.is_grad_enabled()), fast(*args))[1]

    monkeypatch.setattr(torch, "compile", watched)
    plain, fast = model("ours-quant-moe"), model("ours-quant-moe")
    first, second = TWO_STAGES.stages
    finetune(plain, loader(), loader(False), TWO_STAGES, output=tmp_path / "plain", show=False)
    assert not ran
    config = replace(TWO_STAGES, stages=(first, replace(second, compile="attention")))
    finetune(fast, loader(), loader(False), config, output=tmp_path / "fast", show=False)
    assert len(ran) == 2 * STEPS and all(ran)
    assert "attend" not in vars(fast.blocks[0].attn)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.state_dict().values(), fast.state_dict().values(), strict=True))


def test_hashes_are_calibrated_before_the_first_step(tmp_path):
    recipe = Recipe.from_dict({"attention": "linear", "add": "ksh", "hash": {"steps": 2, "anchors": 5, "bits": 4}})
    built = model(recipe)
    finetune(built, loader(), None, replace(TWO_STAGES, stages=(StageConfig("attention", 1),)), output=tmp_path / "run", show=False)
    assert all(m.calibrated for m in built.modules() if isinstance(m, KernelHash))
    assert {"event": "calibrate", "hash_functions": 1}.items() <= read_log(tmp_path / "run" / "log.jsonl")[1].items()


def test_a_packed_model_is_refused():
    with pytest.raises(UserError, match="no longer trains"):
        finetune(shiftaddvit.pack(model("mlp-shift")), loader(), None, TWO_STAGES, show=False)


def test_every_step_has_a_seed_of_its_own():
    seeds = {
        step_seed(seed, Position(stage, epoch, step), rank)
        for seed in range(3) for stage in range(3) for epoch in range(4) for step in range(-1, 6) for rank in range(3)
    }  # fmt: skip
    assert len(seeds) == 3 * 3 * 4 * 7 * 3


@pytest.mark.parametrize("changes", [{"precision": "fp8"}, {"stages": ()}, {"distill_weight": 2.0}, {"compile": "all"}])
def test_wrong_settings_are_named(changes):
    with pytest.raises(UserError, match=next(iter(changes)).rstrip("s")):
        FinetuneConfig(**changes)


def test_warm_up_is_at_most_a_quarter_of_a_stage():
    assert StageConfig("all", 1).warmup_steps(100) == 25 and StageConfig("all", 2).warmup_steps(100) == 50
    for epochs in (4, 10):
        assert StageConfig("all", epochs).warmup_steps(100) == 100
    assert [stage.warmup_steps(100) for stage in FinetuneConfig.published().stages] == [500, 500]
    assert StageConfig("all", 1, warmup_epochs=0).warmup_steps(100) == 0


def test_a_stage_of_one_epoch_reaches_its_peak_and_comes_down(tmp_path):
    config = replace(TWO_STAGES, stages=(StageConfig("all", 1, lr=0.1),), ema_decay=None, log_every=1)
    images = torch.randn(32, 3, 32, 32), torch.arange(32) % 3
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images), 4)
    finetune(model("mlp-shift"), batches, None, config, output=tmp_path / "run", show=False)
    rates = [event["lr"] for event in read_log(tmp_path / "run" / "log.jsonl") if event["event"] == "step"]
    peak = 0.1 * 4 / 512
    assert len(rates) == 8 and rates.index(max(rates)) == 2 and max(rates) > 0.8 * peak and rates[-1] < 0.1 * peak


def test_config_survives_json():
    from dataclasses import asdict

    for config in (FinetuneConfig(), FinetuneConfig.published(), TWO_STAGES):
        assert config_from_dict(json.loads(json.dumps(asdict(config)))) == config


TORCHRUN = """
import faulthandler, sys
faulthandler.dump_traceback_later(200, exit=True)  # a deadlock shows where
sys.path.insert(0, {folder!r})
import torch
from train_runs import TWO_STAGES, loader, model
from dataclasses import replace
from shiftaddvit.processes import this_process
from shiftaddvit.data.order import Shard
from shiftaddvit.train import StageConfig, finetune
state = this_process()
assert state.num_processes == 2 and state.device.type == "cpu", torch.distributed.get_backend()
shard = Shard(state.process_index, 2)
built = model("ours-ksh-moe")
config = replace(TWO_STAGES, stages=(StageConfig("attention", 1), StageConfig("all", 2)), cost="latency", checkpoint_minutes=0.0)
result = finetune(built, loader(shard=shard), loader(False, shard=shard), config, output={output!r}, show=False)
total = torch.cat([p.detach().double().flatten() for p in built.state_dict().values()]).sum().reshape(1)
other = [torch.zeros_like(total) for _ in range(2)]
torch.distributed.all_gather(other, total)
assert torch.equal(*other), other
assert result.evaluation.images == 13
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_one_model(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(TORCHRUN.format(folder=str(Path(__file__).parent), output=str(tmp_path / "run"))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert shiftaddvit.load(tmp_path / "run" / "model.safetensors")
    events = [event["event"] for event in read_log(tmp_path / "run" / "log.jsonl")]
    assert events.count("start") == 1 and events.count("evaluate") == 3


def test_recipes_of_the_table_are_plannable():
    for name in recipes:
        if not name.startswith("gnt") and name != "sra-linear":  # the model here is a plain transformer
            assert sum(epochs for _, epochs in planned(name)) == 20
