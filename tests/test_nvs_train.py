"""Training of view models survives: kills, NaN, too little memory."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nvs_synthetic
import pytest
import torch
from cli_runs import run
from nvs_models import SHORT, TINY, tiny
from ops_checks import Capturable

from shiftaddvit.errors import UserError
from shiftaddvit.layers.router import record_routing
from shiftaddvit.nvs import quickstart
from shiftaddvit.nvs.batch import TrainingScene, draw_batch
from shiftaddvit.nvs.memory import Chunk
from shiftaddvit.nvs.nerf import NeRF, NeRFConfig
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.state import load_model
from shiftaddvit.nvs.step import Balance, add_gradients
from shiftaddvit.nvs.train import NvsTrainConfig, _Training, train
from shiftaddvit.reparam import reparameterize
from shiftaddvit.train import Interrupted
from shiftaddvit.train.guard import NotFinite
from shiftaddvit.train.latency import expert_costs
from shiftaddvit.train.run_folder import RunFolder


@pytest.fixture(scope="module")
def scene():
    return normalise(nvs_synthetic.make_scene(views=6, width=36, height=32))


@pytest.fixture(scope="module")
def whole(scene, tmp_path_factory):
    """Trained without a stop."""
    model = tiny()
    train(model, [scene], tmp_path_factory.mktemp("whole"), SHORT, show=False)
    return model.state_dict()


def assert_same(model, state):
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_resumed_run_equals_one_that_never_stopped(scene, whole, tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    config = replace(SHORT, checkpoint_minutes=1e-9)
    stop_in_step(monkeypatch, 4, stop)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), [scene], tmp_path, config, show=False)
    again = tiny(seed=5)
    result = train(again, [scene], tmp_path, config, resume=True, show=False)
    assert result.steps == 6
    assert train(tiny(), [scene], tmp_path, config, resume=True, show=False).steps == 6, "done"
    assert_same(again, whole)


@pytest.mark.parametrize(("step", "number"), [(0, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGTERM)])
def test_ctrl_c_and_sigterm_wait_for_the_step_and_leave_a_checkpoint(scene, whole, tmp_path, monkeypatch, step, number):
    before = signal.getsignal(number)
    stop_in_step(monkeypatch, step, lambda: signal.raise_signal(number))
    with pytest.raises(Interrupted):
        train(tiny(), [scene], tmp_path, SHORT, show=False)
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == step + 1
    assert (tmp_path / "result.json").exists() == (step == 5), "only a run that is done has a result"
    again = tiny(seed=5)
    assert train(again, [scene], tmp_path, SHORT, resume=True, show=False).finished
    assert_same(again, whole)


def test_a_second_ctrl_c_stops_at_once(scene, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    stop_in_step(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(tiny(), [scene], tmp_path, SHORT, show=False)
    assert not isinstance(stopped.value, Interrupted) and not (tmp_path / "checkpoint.pt").exists()


def test_the_command_says_how_to_resume_and_does(tmp_path, monkeypatch):
    arguments = ["nvs", "train", quickstart._folder(), "-o", tmp_path / "run", "--width", 48, "--steps", 4, "--rays", 8, "--samples", 4]
    arguments += ["--sources", 3, "--model-width", 16, "--depth", 1, "--device", "cpu"]
    stop_in_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = run(*arguments, code=130)
    assert stopped.stderr.endswith(f"interrupted\nto resume: shiftaddvit {' '.join(map(str, arguments))} --resume\n")
    assert "4 steps in" in run(*arguments, "--resume").stdout


def stop_in_step(monkeypatch, step, stop):
    """Call `stop` in a run's step of that number, counted from 0; once."""
    calls = itertools.count()

    def add_and_stop(*arguments):
        if next(calls) == step:
            stop()
        return add_gradients(*arguments)

    monkeypatch.setattr("shiftaddvit.nvs.train.add_gradients", add_and_stop)


_KILLED = """
import sys
sys.path.insert(0, {tests!r})
import nvs_synthetic, torch
from nvs_models import SHORT, tiny
from dataclasses import replace
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.train import train
torch.set_num_threads(1)
scene = normalise(nvs_synthetic.make_scene(views=6, width=36, height=32))
train(tiny(), [scene], {folder!r}, replace(SHORT, steps=10_000, checkpoint_minutes=1e-9), show=False)
"""


def test_a_kill_leaves_a_run_that_resumes(scene, tmp_path):
    folder = tmp_path / "run"
    code = _KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code])
    # Generous: on a busy machine the imports alone can take minutes.
    deadline = time.monotonic() + 400
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "training ended before its first checkpoint"
        time.sleep(0.01)
    time.sleep(random.random() / 5)
    process.kill()
    process.wait()
    config = replace(SHORT, steps=10_000, checkpoint_minutes=1e-9)
    steps = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert steps >= 1
    described = json.loads((folder / "run.json").read_text())["description"]["train"]
    assert described["steps"] == 10_000
    with pytest.raises(UserError, match="already holds a run"):
        train(tiny(), [scene], folder, config, show=False)
    with pytest.raises(UserError, match="started with another train"):
        train(tiny(), [scene], folder, replace(config, lr=1.0), resume=True, show=False)
    load_model(folder / "model.safetensors")


def test_a_run_told_when_to_stop_saves_and_goes_on(scene, whole, tmp_path):
    stopped = train(tiny(), [scene], tmp_path, SHORT, show=False, until=time.monotonic() - 1)
    assert not stopped.finished and stopped.steps == 0 and not (tmp_path / "result.json").exists()
    result = train(tiny(seed=5), [scene], tmp_path, SHORT, resume=True, show=False)
    assert result.finished and result.steps == SHORT.steps
    assert_same(load_model(tmp_path / "model.safetensors"), whole)


def test_nan_stops_and_keeps_the_last_good_model(scene, tmp_path):
    config = replace(SHORT, steps=12, check_every=1, checkpoint_minutes=1e-9)
    model = tiny()
    poison = {"at": 5, "calls": 0}

    def after(_module, _inputs, output):
        poison["calls"] += model.training
        return (output[0] * float("nan"), output[1]) if poison["calls"] > poison["at"] else output

    model.net_coarse.register_forward_hook(after)
    with pytest.raises(NotFinite, match="stopped at step .*last good state is .*model.safetensors"):
        train(model, [scene], tmp_path, config, show=False)
    kept = load_model(tmp_path / "model.safetensors")
    assert all(torch.isfinite(parameter).all() for parameter in kept.parameters())
    assert kept.trained.steps >= 3


def test_training_lowers_the_error(scene, tmp_path):
    model = tiny(config=replace(TINY, dropout=0.0))
    config = NvsTrainConfig(steps=60, rays=64, check_every=20, warmup_steps=5, lr=3e-3, source_jitter=0)
    train(model, [scene], tmp_path, config, show=False)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["held_out_psnr"] > log[0]["held_out_psnr"] + 0.2
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 60


def test_cross_scene_training_draws_from_every_scene(scene):
    other = replace(scene, name="other")
    scenes = [TrainingScene.of(one, "cpu") for one in (scene, other)]
    batches = [draw_batch(scenes, step, 0, 4, 3, 0) for step in range(20)]
    assert len({batch.rays.near for batch in batches}) == 1
    repeated = draw_batch(scenes, 3, 0, 4, 3, 0)
    assert torch.equal(repeated.target, batches[3].target), "a step's batch follows from the seed and the step"
    assert not torch.equal(batches[4].rays.pixel, batches[3].rays.pixel)


def test_the_target_is_never_among_its_sources(scene):
    one = TrainingScene.of(scene, "cpu")
    for step in range(30):
        batch = draw_batch([one], step, 0, 4, 4, 1)
        distance = (batch.sources.poses[:, :3, 3] - batch.rays.origin[0]).norm(dim=-1)
        assert distance.min() > 1e-3


def test_chunks_of_a_step_change_no_gradient(scene):
    one = TrainingScene.of(scene, "cpu")
    gradients = []
    for chunk in (16, 5):
        model = tiny(config=replace(TINY, dropout=0.0)).eval()
        batch = draw_batch([one], 0, 0, 16, 3, 0)
        add_gradients(model, batch, "fp32", None, chunk)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


@pytest.mark.parametrize("row", [None, "nerf", "gnt-add-shift-moe"])
def test_a_step_can_be_recorded(scene, tmp_path, row):
    model = NeRF(NeRFConfig(width=16, samples=6, fine_samples=6)).fit(scene) if row == "nerf" else tiny() if row is None else reparameterize(tiny(), row)
    training = _Training(model.train(), [TrainingScene.of(scene, "cpu")], RunFolder(tmp_path), SHORT, "cpu")
    training.optimizer = torch.optim.Adam(model.parameters(), fused=True)  # as on a GPU
    batch = training._batch()
    training._update(batch)
    with Capturable(), record_routing(model) as records:
        if expert_costs(model):
            training.balance = Balance(records, expert_costs(model), 0.01)
        training._update(batch)


def test_recorded_steps_that_do_not_fit_are_given_up(scene, tmp_path):
    """The step is done as it is, with the numbers that it would have had."""

    class Full:
        def takes(self, batch):
            return True

        def run(self, batch):
            raise torch.OutOfMemoryError("too much")

    errors, weights = [], []
    for graph in (Full(), None):
        training = _Training(tiny().train(), [TrainingScene.of(scene, "cpu")], RunFolder(tmp_path), SHORT, "cpu")
        training.graph = graph
        errors.append([training._one_step().item() for _ in range(2)])
        weights.append(training.model.state_dict())
        assert training.graph is None and training.step == 2
    assert errors[0] == errors[1] and all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_running_out_of_memory_halves_the_chunk():
    chunk, tried = Chunk(64), []

    def work(rays):
        tried.append(rays)
        if rays > 10:
            raise torch.OutOfMemoryError("too much")
        return rays

    assert chunk.attempt(work) == 8 and tried == [64, 32, 16, 8] and chunk.rays == 8
    with pytest.raises(UserError, match="not even one ray"):
        Chunk(2).attempt(lambda rays: (_ for _ in ()).throw(torch.OutOfMemoryError("never enough")))
    with pytest.raises(RuntimeError, match="other"):
        Chunk(2).attempt(lambda rays: (_ for _ in ()).throw(RuntimeError("other")))


@pytest.mark.parametrize("row", [None, "gnt-add-shift-moe"])
def test_bf16_training_runs(scene, tmp_path, row):
    model = tiny() if row is None else reparameterize(tiny(), row)
    result = train(model, [scene], tmp_path, replace(SHORT, steps=3, precision="bf16"), show=False)
    assert result.steps == 3 and result.train_psnr > 0


def test_nerf_trains_and_loads(scene, tmp_path):
    torch.manual_seed(0)
    model = NeRF(NeRFConfig(width=16, samples=4, fine_samples=4)).fit(scene)
    train(model, [scene], tmp_path, replace(SHORT, steps=3), show=False)
    again = load_model(tmp_path / "model.safetensors")
    assert torch.equal(again.frustum, model.frustum)


def test_the_balance_loss_reaches_the_routers_and_costs_are_measured(scene, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    results = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        model = reparameterize(tiny(), "gnt-add-shift-moe")
        config = replace(SHORT, steps=2, balance_weight=weight, measure_latency=True)
        train(model, [scene], tmp_path / str(weight), config, show=False)
        results.append(model.net_coarse.view_crosstrans[0].ff.fc1)
    assert not torch.equal(results[0].router.weight, results[1].router.weight)
    assert results[1].latency.sum().item() == pytest.approx(1) and results[1].latency[0] != results[1].latency[1]


def test_too_few_views_are_refused_before_anything_is_written(scene, tmp_path):
    with pytest.raises(UserError, match="5 training views but 9 sources"):
        train(tiny(config=replace(TINY, sources=9)), [scene], tmp_path / "run", SHORT, show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("lr", -1.0), ("precision", "fp8"), ("schedule", "linear"), ("minutes", 0)])
def test_wrong_training_settings_are_refused(field, value):
    with pytest.raises(UserError, match=f"{field} = "):
        NvsTrainConfig(**{field: value})
