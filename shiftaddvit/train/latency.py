"""Measured cost of each expert of each mixture, for the balance loss; steady measurements are cached in a file that names the device."""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiftaddvit.conditions import conditions
from shiftaddvit.files import write_json
from shiftaddvit.layers.moe import MoELinear, MoEMlp
from shiftaddvit.layers.packed import pack
from shiftaddvit.schema import STAMP, VERSIONS, stamped, was_changed

KIND = "expert-latency"
"""Of the files that hold profiles."""
SAME = ("device", "layer", "shape", "experts", "tokens", "dtype")
"""Fields of a profile that a measurement holds for: where all are equal it is not measured again."""
WARM_UP, REPEATS = 3, 20
"""Calls of each expert that are not timed, and that are before the times are looked at."""
ATTEMPTS, LONGEST = 4, 5.0
"""A mixture whose times are unsteady is measured so often at most, and not again after so many seconds."""
SPREAD = 1.25
"""Steady times: a quarter of the calls of each expert took at most so many times the fastest."""

Profile = Mapping[str, Any]
"""One mixture's shape with the seconds of its experts, as plain JSON values: the fields `SAME`, `seconds` (one an expert), `steady` and
`conditions`."""


def measure_expert_latency(model: nn.Module, images: Tensor, cache: Path | None = None) -> dict[str, list[float]]:
    """Seconds that each expert of each mixture takes, by module name; see `profile_experts`."""
    return {name: list(profile["seconds"]) for name, profile in profile_experts(model, images, cache).items()}


def profile_experts(model: nn.Module, images: Tensor, cache: Path | None = None) -> dict[str, Profile]:
    """The profile of each mixture, by module name: the seconds that each expert takes on all tokens of `images`, in the form it has at
    inference (packed shift layers). Measured once a shape and device: the result is kept in `cache` (default: the user's cache folder).
    A cache that is damaged, or was changed by hand, is measured again. Times that stay unsteady, on a busy machine, hold for this call
    only: they say `steady: false`, a warning names them, and they are not kept."""
    cache = cache or default_cache()
    known = {_key(profile): profile for profile in _read(cache) if profile.get("steady") is True}
    facts: dict[str, Any] | None = None
    found, unsteady = {}, 0
    for name, (mixture, example) in _inputs_of_mixtures(model, images).items():
        facts = facts or conditions(images.device, timed=f"fastest of {REPEATS} or more after {WARM_UP} calls, experts in turn, each on all tokens")
        profile = _described(mixture, example, facts)
        key = _key(profile)
        if key not in known:
            seconds, steady = _seconds([_inference_form(expert) for expert in mixture.experts], example)
            timed = facts if steady else facts | {"timed": f"{facts['timed']}; unsteady, the machine was busy"}
            known[key] = profile | {"seconds": seconds, "steady": steady, "conditions": timed}
            unsteady += not steady
            if steady:
                _keep(cache, [one for one in known.values() if one["steady"]])
        found[name] = known[key]
    if unsteady:
        shapes = f"{unsteady} layer shape{'s' * (unsteady > 1)}"
        warnings.warn(f"expert times of {shapes} are unsteady, the machine is busy: used here, not kept", stacklevel=2)
    return found


def profiles_to_json(profiles: Mapping[str, Profile]) -> dict[str, Any]:
    """One run's profiles, by module name, as a stamped result; mixtures of one shape share a row."""
    rows: dict[tuple, dict[str, Any]] = {}
    for name, profile in profiles.items():
        rows.setdefault(_key(profile), {**profile, "mixtures": []})["mixtures"].append(name)
    return stamped(KIND, {"rows": list(rows.values())})


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


def _read(cache: Path) -> list[Profile]:
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return []
    stamp = known.get(STAMP) if isinstance(known, dict) else None
    if not isinstance(stamp, dict) or (stamp.get("kind"), stamp.get("version")) != (KIND, VERSIONS[KIND]) or was_changed(known):
        return []
    return known["rows"]


def _keep(cache: Path, profiles: Iterable[Profile]) -> None:
    try:
        write_json(cache, stamped(KIND, {"rows": list(profiles)}))
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


def _described(mixture: nn.Module, example: Tensor, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a measurement holds for. On a CPU its name and the number of threads are the device: home folders are shared by machines."""
    device = str(facts["device"]) if example.is_cuda else f"{facts['device']}, {facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    if isinstance(mixture, MoELinear):
        layer, shape = "linear", [mixture.in_features, mixture.out_features]
    else:
        first, second = mixture.experts[0].fc1, mixture.experts[0].fc2
        layer, shape = "mlp", [first.in_features, first.out_features, second.out_features]
    dtype = str(example.dtype).removeprefix("torch.")
    tokens = example.numel() // example.shape[-1]
    return {"device": device, "layer": layer, "shape": shape, "experts": list(mixture.config.experts), "tokens": tokens, "dtype": dtype}


def _key(profile: Profile) -> tuple[str, ...]:
    return tuple(json.dumps(profile[name]) for name in SAME)


@torch.no_grad()
def _seconds(experts: list[nn.Module], example: Tensor) -> tuple[list[float], bool]:
    """The fastest call of each expert, as whatever else runs only adds to it, and whether calls agree. Experts take turns, so that a
    disturbance meets all of them."""
    for _ in range(WARM_UP):
        for expert in experts:
            expert(example)
    timer = _cuda_timer if example.is_cuda else _cpu_timer
    times: list[list[float]] = [[] for _ in experts]
    start = time.monotonic()
    for _ in range(ATTEMPTS):
        for _ in range(REPEATS):
            for expert, mine in zip(experts, times, strict=True):
                mine.append(timer(expert, example))
        if steady := all(sorted(mine)[len(mine) // 4] <= SPREAD * min(mine) for mine in times):
            break
        if time.monotonic() - start > LONGEST:
            break
    return [min(mine) for mine in times], steady


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
