"""Without a GPU, Triton kernels run in its interpreter; the switch must be set before anything imports triton. And fixtures of several files."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images for the command line: two classes, six a class and split."""
    from cli_runs import write_images

    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A dense model's file for the command line."""
    from cli_runs import write_dense

    return write_dense(tmp_path_factory.mktemp("dense") / "dense.safetensors")


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """Latencies measured by a test stay with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
