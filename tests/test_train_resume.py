"""A run that is stopped and resumed equals one that never was; a run that cannot be resumed is refused and left alone."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from train_runs import ARGS, STEPS, TWO_STAGES, Stopping, loader, model, same

import shiftaddvit
from shiftaddvit.errors import UserError
from shiftaddvit.reparam import reparameterize
from shiftaddvit.train import Interrupted, StageConfig, finetune
from shiftaddvit.train.run_folder import RunFolder, read_log

pytestmark = pytest.mark.usefixtures("own_cache")


def interrupt(images: torch.Tensor) -> torch.Tensor:
    signal.raise_signal(signal.SIGINT)
    return images


@pytest.fixture(scope="module")
def uninterrupted() -> nn.Module:
    reference = model()
    finetune(reference, loader(), loader(False), TWO_STAGES, show=False)
    return reference


# Each stage sees six batches.
@pytest.mark.parametrize(
    ("at", "fresh"), [(0, True), (STEPS - 1, True), (STEPS, True), (2 * STEPS, True), (4 * STEPS - 1, True), (1, False), (2 * STEPS + 1, False)]
)
def test_resuming_after_ctrl_c_equals_an_uninterrupted_run(at, fresh, tmp_path, uninterrupted):
    stopped = model()
    with pytest.raises(Interrupted):
        finetune(stopped, Stopping(at, interrupt), loader(False), TWO_STAGES, output=tmp_path / "run", show=False)
    resumed = model() if fresh else stopped
    result = finetune(resumed, loader(), loader(False), TWO_STAGES, output=tmp_path / "run", resume=True, show=False)
    assert same(resumed, uninterrupted)
    assert [(entry["stage"], entry["epoch"]) for entry in result.history] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert same(shiftaddvit.load(tmp_path / "run" / "model.safetensors"), uninterrupted)


def test_sigterm_stops_like_ctrl_c_but_ends_a_worker_process_at_once(tmp_path, uninterrupted):
    def terminate(images: torch.Tensor) -> torch.Tensor:
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        return images

    stopped = model()
    with pytest.raises(Interrupted):
        finetune(stopped, Stopping(1, terminate), loader(False), TWO_STAGES, output=tmp_path / "run", show=False)
    finetune(stopped, loader(), loader(False), TWO_STAGES, output=tmp_path / "run", resume=True, show=False)
    assert same(stopped, uninterrupted)


def test_ctrl_c_during_an_evaluation_stops_too(tmp_path, uninterrupted):
    evaluation = Stopping(7, interrupt)  # the last batch of the first stage's last evaluation
    evaluation.inner = loader(False)
    stopped = model()
    with pytest.raises(Interrupted):
        finetune(stopped, loader(), evaluation, TWO_STAGES, output=tmp_path / "run", show=False)
    assert evaluation.seen == 8
    finetune(stopped, loader(), loader(False), TWO_STAGES, output=tmp_path / "run", resume=True, show=False)
    assert same(stopped, uninterrupted)


def test_a_run_says_where_it_goes_on(tmp_path, capsys):
    with pytest.raises(Interrupted):
        finetune(model(), Stopping(STEPS + 1, interrupt), None, TWO_STAGES, output=tmp_path / "run", show=False)
    finetune(model(), loader(), None, TWO_STAGES, output=tmp_path / "run", resume=True)
    position = "stage 1 of 2 (attention), after 1 of 2 epochs and 2 of 3 steps"
    assert capsys.readouterr().err.splitlines()[0] == f"resuming in {position}"


def test_a_run_is_resumed_on_the_same_images_only(tmp_path):
    config = replace(TWO_STAGES, stages=(StageConfig("all", 1),))
    images = lambda **changed: {"data": {"number": 13, "classes": ["a", "b", "c"]} | changed, "output": tmp_path / "run", "show": False}  # noqa: E731
    with pytest.raises(Interrupted):
        finetune(model("mlp-shift"), Stopping(1, interrupt), None, config, **images())
    with pytest.raises(UserError, match=r"another set of images \(classes › 1 was 'b', is 'x'\)"):
        finetune(model("mlp-shift"), loader(), None, config, resume=True, **images(classes=["a", "x", "c"]))
    with pytest.raises(UserError, match=r"number was 13, is 12, and 1 more"):
        finetune(model("mlp-shift"), loader(), None, config, resume=True, **images(number=12, classes=["a", "b"]))
    assert not finetune(model("mlp-shift"), loader(), None, config, resume=True, **images()).ended_before
    assert finetune(model("mlp-shift"), loader(), None, config, resume=True, output=tmp_path / "run", show=False).ended_before


def test_a_finished_run_resumes_to_itself(tmp_path, uninterrupted):
    for _ in range(2):
        again = model()
        result = finetune(again, loader(), loader(False), TWO_STAGES, output=tmp_path / "run", resume=True, show=False)
        assert same(again, uninterrupted) and len(result.history) == 4
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["history"] == result.history and stored["conditions"]["seed"] == 3
    assert stored["evaluation"]["top1"] == result.evaluation.top1
    assert stored["loading"]["batch_size"] == loader().batch_size and stored["loading"]["batches"] == len(loader())


KILLS = """
# Imports once and forks a run for every kill: starting Python would take longer than the run itself.
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {folder!r})
from train_runs import TWO_STAGES, loader, model
from shiftaddvit.train import finetune

random.seed(0)
checkpoint = Path({output!r}) / "checkpoint.pt"
config = replace(TWO_STAGES, checkpoint_minutes=0.0)


def written():
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


def start():
    child = os.fork()
    if child == 0:
        finetune(model(), loader(), loader(False), config, output={output!r}, resume=True, show=False)
        os._exit(0)
    return child


kills = 0
while kills < 6:
    before, child, done = written(), start(), 0
    while written() == before and not done:  # killed only after it got further, so that the end comes
        time.sleep(0.001)
        done = os.waitpid(child, os.WNOHANG)[0]
    if done:
        break
    time.sleep(random.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
assert os.waitpid(start(), 0)[1] == 0
print(kills)
"""


def test_a_run_killed_at_random_moments_reaches_the_same_result(tmp_path, uninterrupted):
    run = tmp_path / "run"
    code = KILLS.format(folder=str(Path(__file__).parent), output=str(run))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 2
    assert same(shiftaddvit.load(run / "model.safetensors"), uninterrupted)
    assert not list(run.glob(".*.tmp"))
    assert all("event" in event for event in read_log(run / "log.jsonl"))


class Interrupting(torch.utils.data.TensorDataset):
    """Images of a plain data set; Ctrl-C comes when the `at`-th of them is read."""

    at = -1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.at -= 1
        if self.at == 0:
            signal.raise_signal(signal.SIGINT)
        image, label = super().__getitem__(index)
        return image + 0.1 * torch.randn(()), label  # augmentation that draws from torch's random numbers


def test_a_plain_data_loader_that_shuffles_resumes_inside_an_epoch(tmp_path):
    def plain(at: int = -1) -> torch.utils.data.DataLoader:
        rng = torch.Generator().manual_seed(0)
        data = Interrupting(torch.randn(12, 3, 32, 32, generator=rng), torch.arange(12) % 3)
        data.at = at
        return torch.utils.data.DataLoader(data, 4, shuffle=True)

    config = replace(TWO_STAGES, stages=(StageConfig("all", 2, warmup_epochs=0.5),), ema_decay=None)
    expected, resumed = model("mlp-shift"), model("mlp-shift")
    finetune(expected, plain(), None, config, show=False)
    with pytest.raises(Interrupted):
        finetune(model("mlp-shift"), plain(at=12 + 6), None, config, output=tmp_path / "run", show=False)
    assert RunFolder(tmp_path / "run", True).load_checkpoint()["position"]["step"] in (1, 2)
    finetune(resumed, plain(), None, config, output=tmp_path / "run", resume=True, show=False)
    assert same(resumed, expected)


def test_a_model_that_cannot_be_saved_is_refused_before_it_trains(tmp_path):
    built = model("mlp-shift")
    built.blocks[0].attn.num_heads = 4
    with pytest.raises(UserError, match="blocks.0.attn.num_heads"):
        finetune(built, loader(), None, TWO_STAGES, output=tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run.json", "checkpoint.pt"])
@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"[]"])
def test_a_damaged_run_is_named_and_left_alone(name, damage, tmp_path):
    run, config = tmp_path / "run", replace(TWO_STAGES, stages=(StageConfig("all", 1),))
    finetune(model("mlp-shift"), loader(), None, config, output=run, show=False)
    (run / name).write_bytes(damage((run / name).read_bytes()))
    whole = (run / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=f"{name} is damaged.*--overwrite"):
        finetune(model("mlp-shift"), loader(), None, config, output=run, resume=True, show=False)
    assert (run / "model.safetensors").read_bytes() == whole


def test_resuming_with_other_batches_or_another_model_is_refused(tmp_path):
    run, config = tmp_path / "run", replace(TWO_STAGES, stages=(StageConfig("all", 1),))
    finetune(model("mlp-shift"), loader(), None, config, output=run, show=False)
    other = loader()
    other.batch_size = 6
    with pytest.raises(UserError, match="another number of batches"):
        finetune(model("mlp-shift"), other, None, config, output=run, resume=True, show=False)
    deeper = reparameterize(shiftaddvit.create_model("vit_tiny_patch16_224", {**ARGS, "depth": 2}), "mlp-shift")
    with pytest.raises(UserError, match="another model"):
        finetune(deeper, loader(), None, config, output=run, resume=True, show=False)


def test_what_a_kill_left_is_tidied(tmp_path):
    run = tmp_path / "run"
    config = replace(TWO_STAGES, stages=(StageConfig("all", 1),))
    with pytest.raises(Interrupted):
        finetune(model("mlp-shift"), Stopping(1, interrupt), None, config, output=run, show=False)
    (run / ".checkpoint.pt.abc.tmp").write_bytes(b"half")
    with open(run / "log.jsonl", "a") as log:
        log.write('{"event": "st')
    finetune(model("mlp-shift"), loader(), None, config, output=run, resume=True, show=False)
    assert not (run / ".checkpoint.pt.abc.tmp").exists()
    assert "resume" in [event["event"] for event in read_log(run / "log.jsonl")]
