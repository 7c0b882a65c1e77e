"""How a command ends when something goes wrong on the way: its exit code, its last line, and what is kept."""

import errno
from pathlib import Path

import pytest
import torch
from cli_runs import SHORT, refused, run

import shiftaddvit.serialization
from shiftaddvit.cli.failures import resume_command, told_when_disk_is_full, told_when_memory_ends
from shiftaddvit.errors import UserError
from shiftaddvit.serialization import load, save
from shiftaddvit.train import Interrupted, NotFinite


def test_nan_loss_ends_with_2_and_its_message(tmp_path, dense, data, monkeypatch):
    _finetune_raises(monkeypatch, NotFinite("the loss is nan at step 3 of epoch 0, stage 1: first at blocks.0; the last good checkpoint is kept"))
    refused("finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT, says="step 3")


def test_weights_that_are_not_numbers_stop_the_run(tmp_path, dense, data):
    model = load(dense)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    save(model, tmp_path / "nan.safetensors")
    line = refused("finetune", tmp_path / "nan.safetensors", data, "--recipe", "dense", "-o", tmp_path / "run", *SHORT, says="is nan at step 0")
    assert "last good checkpoint is kept" in line and not (tmp_path / "run" / "model.safetensors").exists()


def test_ctrl_c_ends_with_130_and_the_command_that_resumes(tmp_path, dense, data, monkeypatch):
    _finetune_raises(monkeypatch, Interrupted())
    nothing = run("finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT, code=130)
    assert "to resume" not in nothing.stderr, "there is no run yet"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    arguments = ["finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT, "--overwrite"]
    outcome = run(*arguments, code=130)
    kept = " ".join(str(argument) for argument in arguments[:-1])
    assert f"to resume: shiftaddvit {kept} --resume\n" in outcome.stderr


def test_resume_command_of_several_processes_starts_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command(["finetune", "a b", "--resume"]) == "torchrun --nproc-per-node 2 -m shiftaddvit finetune 'a b' --resume"


def test_full_disk_is_told_and_keeps_the_old_file(tmp_path, dense, monkeypatch):
    output = tmp_path / "a.safetensors"
    output.write_bytes(b"mine")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(output))

    monkeypatch.setattr(shiftaddvit.serialization, "save_file", full)
    refused("convert", dense, "--recipe", "mlp-shift", "-o", output, "--overwrite", says="out of disk")
    assert output.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [output]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
def test_torchs_own_full_disk_error_is_told_and_other_errors_stay():
    with pytest.raises(UserError, match="out of disk at run"), told_when_disk_is_full(Path("run")):
        torch.save({"a": torch.zeros(100_000)}, "/dev/full")
    with pytest.raises(RuntimeError, match="a bug"), told_when_disk_is_full(Path("run")):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(("size", "tried"), [(64, 32), (6, 2), (2, 1)])
def test_out_of_gpu_memory_names_the_batch_size_to_try(size, tried):
    with pytest.raises(UserError, match=rf"try --batch-size {tried}$"), told_when_memory_ends(size):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_bugs_keep_their_traceback(tmp_path, dense, data, monkeypatch):
    _finetune_raises(monkeypatch, IndexError("a bug"))
    with pytest.raises(IndexError, match="a bug"):
        run("finetune", dense, data, "--recipe", "mlp-shift", "-o", tmp_path / "run", *SHORT)


def _finetune_raises(monkeypatch, error: BaseException) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(shiftaddvit.train, "finetune", broken)
