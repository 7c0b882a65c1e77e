"""Measured cost of each expert of each mixture, for the balance loss; cached in a file that names the device."""

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from shiftaddvit.files import write_json
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.packed import pack


def measure_expert_latency(model: nn.Module, images: Tensor, cache: Path | None = None) -> dict[str, list[float]]:
    """Seconds that each expert of each mixture takes on all tokens of `images`, in the form it has at inference (packed shift layers).
    Measured once a shape and device: the result is kept in `cache` (default: the user's cache folder)."""
    cache = cache or default_cache()
    known = _read(cache)
    device = _device_name(images.device)
    latencies = {}
    for name, (mixture, example) in _inputs_of_mixtures(model, images).items():
        tokens = example.numel() // example.shape[-1]
        key = f"{device} | {_shape(mixture)} | tokens {tokens} | {example.dtype}"
        if key not in known:
            known[key] = [_seconds(_inference_form(expert), example) for expert in mixture.experts]
            _keep(cache, known)
        latencies[name] = known[key]
    return latencies


def set_expert_costs(model: nn.Module, costs: dict[str, list[float]]) -> None:
    """Store relative costs (latency, or energy) in each mixture's `latency` buffer; they sum to one."""
    for name, values in costs.items():
        mixture = model.get_submodule(name)
        cost = torch.tensor(values, dtype=torch.float32)
        mixture.latency.copy_(cost / cost.sum())


def expert_costs(model: nn.Module) -> dict[str, Tensor]:
    """Every mixture's stored costs, by module name."""
    return {name: m.latency for name, m in model.named_modules() if isinstance(m, (MoELinear, MoEMlp))}


def default_cache() -> Path:
    """latency.json in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "shiftaddvit" / "latency.json"


def _read(cache: Path) -> dict[str, list[float]]:
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _keep(cache: Path, known: dict[str, list[float]]) -> None:
    try:
        write_json(cache, known)
    except OSError as error:
        warnings.warn(f"measured latencies are not kept: {cache}: {error}; XDG_CACHE_HOME chooses another folder", stacklevel=3)


@torch.no_grad()
def _inputs_of_mixtures(model: nn.Module, images: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (MoELinear, MoEMlp)):
            handles.append(module.register_forward_pre_hook(_keeper(found, name)))
    training = model.training
    try:
        model.eval()
        if handles:
            model(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def _keeper(found: dict[str, tuple[nn.Module, Tensor]], name: str):
    def keep(module: nn.Module, inputs: tuple) -> None:
        found[name] = (module, inputs[0].detach())

    return keep


def _inference_form(expert: nn.Module) -> nn.Module:
    holder = nn.ModuleList([deepcopy(expert)])
    return pack(holder)[0].eval()


def _shape(mixture: nn.Module) -> str:
    if isinstance(mixture, MoELinear):
        return f"linear {mixture.in_features}->{mixture.out_features} {'/'.join(mixture.config.experts)}"
    mlp = mixture.experts[0]
    return f"mlp {mlp.fc1.in_features}->{mlp.fc1.out_features}->{mlp.fc2.out_features} {'/'.join(mixture.config.experts)}"


@torch.no_grad()
def _seconds(expert: nn.Module, example: Tensor, repeats: int = 20) -> float:
    for _ in range(3):
        expert(example)
    timer = _cuda_timer if example.is_cuda else _cpu_timer
    return statistics.median(timer(expert, example) for _ in range(repeats))


def _cpu_timer(expert: Callable[[Tensor], Tensor], example: Tensor) -> float:
    start = time.perf_counter()
    expert(example)
    return time.perf_counter() - start


def _cuda_timer(expert: Callable[[Tensor], Tensor], example: Tensor) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        expert(example)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e4


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x{torch.get_num_threads()}"
