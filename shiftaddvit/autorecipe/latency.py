"""The latency of every option on a device: the engine's own steps, timed one by one."""

import statistics
import time
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.conditions import conditions
from shiftaddvit.engine import deploy
from shiftaddvit.engine.embed import NormStep
from shiftaddvit.engine.program import Launch, Step
from shiftaddvit.errors import UserError
from shiftaddvit.evaluation.sensitivity import converted
from shiftaddvit.ops.timing import copies_for, time_call
from shiftaddvit.reparam import Recipe
from shiftaddvit.reparam.identity import identity
from shiftaddvit.search_terms import DENSE

from .costs import CostTable, by_site
from .options import Options, changes, recipe_of


def latency_table(
    model: nn.Module,
    options: Options,
    images: Float[Tensor, "B 3 H W"],
    settings: Recipe = Recipe(),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seconds: float = 0.05,
) -> CostTable:
    """µs of a batch of `images` on `device`, by site: for every option the model is deployed with it wherever it can be, and each step of
    the engine is timed for `seconds` (its median counts). A whole engine overlaps steps on a GPU, so sums are no forecast of its
    latency to the microsecond; docs/search.md says how far off they are.

    Routers are untrained, so tokens divide among the experts of a mixture about evenly, at random.

    Raises:
        UserError: a model or option that the engine cannot run, by name.
    """
    device = torch.device(device)
    found: dict[str, dict[str, float]] = {site: {} for site in options}
    rest, used = 0.0, None
    for option in (DENSE, *changes(options)):
        sites = [site for site, names in options.items() if option in names]
        choice = {site: option if site in sites else DENSE for site in options}
        network = model if option == DENSE else converted(model, recipe_of(choice, settings), images)
        engine = deploy(network, len(images), dtype, device, tuple(images.shape[2:]))
        times = _step_times(engine.program.steps, images.to(device, engine.dtype), engine.launch, seconds)
        sums = by_site(zip(_owners(engine.program.steps), times, strict=True), options)
        for site in sites:
            found[site][option] = sums[site]
        if option == DENSE:
            rest, used = sums[""], engine.dtype
    described = conditions(
        device, batch=len(images), image_size=list(images.shape[2:]), dtype=str(used).removeprefix("torch."),
        timed="each step of the engine by itself, median", seconds_a_step=seconds, routing="untrained routers",
    )  # fmt: skip
    return CostTable("latency", identity(model), settings, found, rest, described)


def _owners(steps: tuple[Step, ...]) -> list[str]:
    """The module that each step counts for: a norm that only some options take into the step before belongs to that step."""
    names: list[str] = []
    for step in steps:
        names.append(names[-1] if names and isinstance(step, NormStep) else step.name)
    return names


@torch.no_grad()
def _step_times(steps: tuple[Step, ...], x: Tensor, launch: Launch, seconds: float) -> list[float]:
    times = []
    for step in steps:
        run = partial(step.run, launch=launch)
        times.append(_gpu_us(run, x, seconds) if x.is_cuda else _cpu_us(run, x, seconds))
        x = run(x)
        if not x.isfinite().all():
            raise UserError(f"{step.name} gives values that are not finite in {x.dtype}: choose another dtype")
    return times


def _gpu_us(run: partial, x: Tensor, seconds: float) -> float:
    inputs = [(x,), *((x.clone(),) for _ in range(min(8, copies_for([x])) - 1))]
    return time_call(run, inputs, seconds, least_calls=8).median_us


def _cpu_us(run: partial, x: Tensor, seconds: float) -> float:
    run(x)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run(x)
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)
