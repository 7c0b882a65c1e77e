"""`energy`: from a model to picojoules."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.reparam import Recipe

from . import eyeriss, paper
from .experts import Shares, divide, forced, measured
from .eyeriss import BitWidths
from .operations import Nest, Operation, Stream, Trace, Uncosted
from .published import AttentionSites, published_operations
from .result import Energy, LayerEnergy
from .settings import Coverage, Fusion, Mode, Settings
from .subjects import Subject, check_sizes, model_subject, named_subject
from .units import Units, load_units


def energy(
    model: nn.Module | str,
    images: Float[Tensor, "B C H W"] | Iterable[Tensor | Sequence[Tensor]] | None = None,
    *,
    recipe: Recipe | str = "dense",
    mode: Mode = "eyeriss",
    coverage: Coverage = "full",
    shift_share: float | None = None,
    add_index_bug: bool = True,
    stage4_matmuls: bool | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch: int = 1,
    units: Units | str = "45nm",
    bits: BitWidths = BitWidths(),
    word_bits: int = 32,
    fusion: Fusion = "rows",
    exclude: Sequence[str] = (),
) -> Energy:
    """Energy of one forward on an analytical model of the Eyeriss accelerator (never a measurement).

    `model` is a network, or the name of one: any timm model, `nerf` or `gnt`, which `recipe` then converts, all on shapes alone. For
    mixtures of experts the tokens of each expert are measured over `images` ((B, 3, H, W), or batches), or `shift_share` of them go to
    the shift experts; with neither, half do, and the settings say that it was assumed. UserError for unknown names, a share outside 0–1,
    sizes that the network cannot run on, and in mode `paper` for an operation that has no mapping (`NoMapping`).
    """
    settings = Settings(mode, coverage, add_index_bug, stage4_matmuls, word_bits, bits,
                        load_units(units) if isinstance(units, str) else units, fusion, tuple(exclude))  # fmt: skip
    if isinstance(model, str):
        if images is not None:
            raise UserError("routing is measured on a network with weights: give the model itself, not its name")
        if isinstance(recipe, Recipe):
            raise UserError("a model given by name takes a recipe by name or TOML path; convert the model itself for a Recipe object")
        return named_energy(model, recipe, settings, shift_share, image_size, batch)
    if recipe != "dense":
        raise UserError("recipe goes with the name of a model; convert this one with shiftaddvit.reparameterize(model, recipe) first")
    if images is not None and shift_share is not None:
        raise UserError("give images, whose routing is measured, or shift_share, not both")
    return model_energy(model, images, settings, shift_share, image_size, batch)


def model_energy(
    model: nn.Module,
    images: Float[Tensor, "B C H W"] | Iterable[Tensor | Sequence[Tensor]] | None = None,
    settings: Settings = Settings(),
    shift_share: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch: int = 1,
) -> Energy:
    """`energy` of a network as it is."""
    size = check_sizes(image_size, batch)
    if isinstance(images, Tensor) and size is None:
        size = (int(images.shape[-2]), int(images.shape[-1]))
    applied = getattr(getattr(model, "shiftaddvit_recipe", None), "name", "") or "as it is"
    subject = model_subject(model, f"{type(model).__name__}, {applied}", size, batch)
    route = images is not None and subject.trace.mixtures
    return cost(subject, measured(model, images) if route else _shares(subject, shift_share), settings)


def named_energy(
    model: str,
    recipe: str = "dense",
    settings: Settings = Settings(),
    shift_share: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch: int = 1,
) -> Energy:
    """`energy` of a model and recipe by name."""
    subject = named_subject(model, recipe, check_sizes(image_size, batch), batch)
    return cost(subject, _shares(subject, shift_share), settings)


def cost(subject: Subject, shares: Shares, settings: Settings) -> Energy:
    """Energy of what was traced, with the tokens divided as `shares` says."""
    operations, uncosted = _counted(subject, settings)
    if settings.mode == "paper":
        layers = _paper(operations, shares, settings)
    else:
        layers = [_eyeriss(operation, shares, settings) for operation in operations]
    mixtures = subject.trace.mixtures
    described = settings.describe() | {
        "shift_share": _mean_shift_share(subject.trace, shares), "shift_share_source": shares.source if mixtures else "no mixtures",
        "batch": subject.images, "image_size": list(subject.image_size) if subject.image_size else None,
    }  # fmt: skip
    codes = sorted({o.weight_bits for o in operations if isinstance(o, Nest) and o.weight_bits})
    if settings.mode == "eyeriss" and codes and settings.bits.shift_weight is None:
        described["bits"]["shift_weight"] = codes[0] if len(codes) == 1 else codes
    found = Energy(
        subject.name, tuple(layers), (*uncosted, *subject.trace.uncosted), described,
        tuple(shares.tokens(mixture, subject.images) for mixture in mixtures), subject.trace.scale,
    )  # fmt: skip
    if settings.mode == "eyeriss" and mixtures:
        found = replace(found, sd_mj=_spread(operations, shares, settings, subject.trace.scale),
                        second_fetch_mj=_second_fetch(operations, shares, settings) * subject.trace.scale)  # fmt: skip
    return found


def cost_operations(operations: Sequence[Operation], settings: Settings = Settings(), name: str = "operations") -> Energy:
    """Energy of a list of operations of one's own."""
    subject = Subject(name, Trace(tuple(operations)), AttentionSites((), (), False), 1, None)
    return cost(subject, Shares({}, "no mixtures"), settings)


def expert_energies(
    model: nn.Module, images: Float[Tensor, "B C H W"] | tuple[int, ...], *, units: Units | str = "45nm", bits: BitWidths = BitWidths()
) -> dict[str, list[float]]:
    """pJ that one token costs on each expert of each mixture, by module name: the cost in the balance loss (`cost="energy"`), in
    place of the measured latency. `images`, or their shape (B, 3, H, W), give the sizes. Mode `eyeriss`."""
    size = tuple(int(side) for side in (images.shape if isinstance(images, Tensor) else images))
    if len(size) != 4:
        raise UserError(f"expert_energies needs images of shape (B, C, H, W), got {size}")
    subject = model_subject(model, type(model).__name__, size[2:], size[0])
    settings = Settings(units=load_units(units) if isinstance(units, str) else units, bits=bits)
    found = {mixture.name: [0.0] * len(mixture.primitives) for mixture in subject.trace.mixtures}
    tokens = {mixture.name: mixture.tokens for mixture in subject.trace.mixtures}
    for operation in subject.trace.operations:
        if operation.experts:
            expert = operation.experts[-1]
            found[expert.mixture][expert.index] += sum(_cells(operation, settings).values()) / tokens[expert.mixture]
    return found


def _shares(subject: Subject, shift_share: float | None) -> Shares:
    if shift_share is None:
        return forced(subject.trace.mixtures, 0.5, "assumed")
    return forced(subject.trace.mixtures, shift_share)


def _counted(subject: Subject, settings: Settings) -> tuple[list[Operation], list[Uncosted]]:
    """The operations that the settings count, and a list of the others."""
    operations: list[Operation] = list(subject.trace.operations)
    if settings.mode == "paper":
        operations = published_operations(operations, subject.sites)
    kept, left = [], {}
    for operation in operations:
        reason = _reason_to_leave(operation, subject.sites, settings)
        if reason is None:
            kept.append(operation)
        else:
            what = operation.function if isinstance(operation, Stream) else operation.name
            left[what, reason] = left.get((what, reason), 0) + 1
    idle = [pattern for pattern in settings.exclude if not any(_matches(operation.name, pattern) for operation in operations)]
    return kept, [
        *(Uncosted(what, count, reason) for (what, reason), count in left.items()),
        *(Uncosted(pattern, 0, "this exclude matches no module") for pattern in idle),
    ]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def _reason_to_leave(operation: Operation, sites: AttentionSites, settings: Settings) -> str | None:
    for pattern in settings.exclude:
        if _matches(operation.name, pattern):
            return f"excluded by {pattern!r}"
    if isinstance(operation, Stream):
        if settings.mode == "paper":
            return "the published model counts no element-wise work, norms, softmax or dispatch"
        return None if settings.coverage == "full" else "hooks on leaf modules do not see it"
    if operation.kind == "product" and operation.primitive == "mult" and sites.in_last_stage(operation.name):
        if settings.stage4_matmuls is not None:
            return None if settings.stage4_matmuls else "a product of the last stage's attention (stage4_matmuls is off)"
    if settings.coverage == "released" and not operation.leaf:
        return "hooks on leaf modules do not see it"
    return None


def _paper(operations: Sequence[Operation], shares: Shares, settings: Settings) -> list[LayerEnergy]:
    layers, first_add = [], None
    for nest in operations:
        share = shares.of(nest.experts)
        tokens = _tokens(nest, shares)
        if tokens == 0:
            continue
        mapped = paper.map_nest(replace(nest, N=tokens), settings.word_bits)
        if nest.primitive == "add" and settings.add_index_bug:
            first_add = first_add or mapped
            mapped = first_add
        layers.append(LayerEnergy(nest.name, nest.kind, nest.primitive, paper.describe(replace(nest, N=tokens)), nest.macs * tokens / nest.N,
                                  dict(mapped.cells), dict(mapped.tiling), share, mapped.latency_ms, _role(nest)))  # fmt: skip
    return layers


def _tokens(nest: Nest, shares: Shares) -> int:
    """Whole tokens that reach an operation."""
    tokens = nest.N
    for expert in nest.experts:
        tokens = divide(tokens, shares.by_mixture[expert.mixture])[expert.index]
    return tokens


def _eyeriss(operation: Operation, shares: Shares, settings: Settings) -> LayerEnergy:
    share = shares.of(operation.experts)
    # Each token costs what it costs where all of the layer's tokens go to one expert: weight fetches are shared out over tokens.
    cells = {key: share * pj for key, pj in _cells(operation, settings).items()}
    if isinstance(operation, Stream):
        name = f"{operation.name} ({operation.function})"
        return LayerEnergy(name, operation.kind, "stream", str(operation.elements), operation.elements * share, cells, {}, share,
                           None, _role(operation))  # fmt: skip
    tiling = eyeriss.map_nest(operation, settings.units, settings.bits).tiling
    return LayerEnergy(operation.name, operation.kind, operation.primitive, paper.describe(operation), operation.macs * share, cells,
                       tiling, share, None, _role(operation))  # fmt: skip


def _cells(operation: Operation, settings: Settings) -> Mapping[tuple[str, str], float]:
    """pJ by (level, operand) when it sees every token, in mode `eyeriss`."""
    fused = settings.fusion == "rows"
    if isinstance(operation, Stream):
        cells = eyeriss.stream_cells(operation, settings.units, settings.bits, fused)
    else:
        cells = eyeriss.map_nest(operation, settings.units, settings.bits).cells
    on_chip = _on_chip(operation) if fused else ()
    return {(level, operand): pj for (level, operand), pj in cells.items() if level != "dram" or operand not in on_chip} if on_chip else cells


def _on_chip(operation: Operation) -> tuple[str, ...]:
    """Operands that the buffer holds already, or keeps, where rows are worked on as they pass through it."""
    if _role(operation) == "router":
        return ("input", "output")  # the token, there for its expert, and the choice of the expert
    scores = operation.scores if isinstance(operation, Nest) else ""
    return {"": (), "written": ("output",), "read": ("input",)}[scores]


def _role(operation: Operation) -> str:
    return "router" if operation.name.rpartition(".")[2] == "router" else ""


def _spread(operations: Sequence[Operation], shares: Shares, settings: Settings, scale: float) -> float | None:
    """Standard deviation of the total over the measured images, in mJ."""
    if shares.per_image is None or len(next(iter(shares.per_image.values()))) < 2:
        return None
    totals = np.zeros(1)
    for operation in operations:
        if operation.experts:
            totals = totals + sum(_cells(operation, settings).values()) * shares.of_images(operation.experts)
    return float(totals.std(ddof=1)) * scale * 1e-9


def _second_fetch(operations: Sequence[Operation], shares: Shares, settings: Settings) -> float:
    """mJ of the weight fetches that sharing out leaves uncounted if a layer fetches every used expert's weights for this forward alone."""
    more = 0.0
    for operation in operations:
        if isinstance(operation, Nest) and operation.experts and (share := shares.of(operation.experts)) > 0:
            more += (1 - share) * eyeriss.map_nest(operation, settings.units, settings.bits).weight_fetch
    return more * 1e-9


def _mean_shift_share(trace: Trace, shares: Shares) -> float | None:
    """Over all tokens of all mixtures that have both kinds of experts."""
    shifted = tokens = 0.0
    for mixture in trace.mixtures:
        if len(set(mixture.primitives)) > 1:
            tokens += mixture.tokens
            shifted += mixture.tokens * sum(
                share for share, primitive in zip(shares.by_mixture[mixture.name], mixture.primitives, strict=True) if primitive == "shift"
            )
    return shifted / tokens if tokens else None
