"""Which stages a model trains in."""

from dataclasses import replace

from torch import nn

from shiftaddvit.reparam.stages import converts_attention, converts_linears

from .config import FinetuneConfig, StageConfig


def plan_stages(model: nn.Module, config: FinetuneConfig) -> tuple[StageConfig, ...]:
    """The stages that change something for this model; a skipped stage's epochs go to the next one (or the one before)."""
    if not hasattr(model, "shiftaddvit_recipe"):
        return (_merged(config.stages, "dense"),)
    useful = []
    carried = 0
    for stage in config.stages:
        applies = {"attention": converts_attention(model), "all": converts_linears(model), "dense": True}[stage.primitives]
        if applies:
            useful.append(replace(stage, epochs=stage.epochs + carried))
            carried = 0
        else:
            carried += stage.epochs
    if not useful:
        return (_merged(config.stages, "all"),)
    if carried:
        useful[-1] = replace(useful[-1], epochs=useful[-1].epochs + carried)
    return tuple(useful)


def _merged(stages: tuple[StageConfig, ...], primitives: str) -> StageConfig:
    """One stage as long as all of them, so that a control gets the same training as a converted model."""
    return replace(stages[0], primitives=primitives, epochs=sum(stage.epochs for stage in stages))
