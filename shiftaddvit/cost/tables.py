"""Energies as tables for people."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .primitives import ratio, sources, unit_costs
from .result import LEVELS, OPERANDS, Energy, kind_name
from .whatif import REFERENCES, Comparison, Sweep


def energy_view(energy: Energy, layers: bool = False) -> RenderableType:
    """By kind of layer and by level, what is not counted, and under which settings."""
    parts: list[RenderableType] = [Text(headline(energy), style="bold"), kind_table(energy), operand_table(energy)]
    if energy.tokens and (layers or energy.tokens[0].sd is not None):
        parts.append(token_table(energy))
    if layers:
        parts.append(layer_table(energy))
    parts.append(Text(uncosted_line(energy)))
    parts.append(Text(settings_line(energy)))
    return Group(*parts)


def headline(energy: Energy) -> str:
    """One line: what, how much."""
    spread = f" ± {mj(energy.sd_mj)}" if energy.sd_mj is not None else ""
    text = f"{energy.model}: {mj(energy.total_mj)}{spread} mJ (analytical Eyeriss model, mode {energy.settings['mode']})"
    if energy.second_fetch_mj:
        text += f"\n  plus up to {mj(energy.second_fetch_mj)} mJ if every expert fetched all its weights for this forward alone"
    return text


def kind_table(energy: Energy) -> Table:
    """mJ by kind of layer (rows) and memory level (columns)."""
    table = Table("layer", *LEVELS, "mJ", "%", title="by kind of layer, mJ")
    _right(table)
    rows = sorted(energy.by_kind().items(), key=lambda item: -sum(item[1].values()))
    for kind, levels in rows:
        total = sum(levels.values())
        table.add_row(kind, *(mj(levels[level]) for level in LEVELS), mj(total), _percent(total, energy.total_mj))
    table.add_section()
    levels = energy.by_level()
    table.add_row("total", *(mj(levels.get(level, 0.0)) for level in LEVELS), mj(energy.total_mj), "100")
    return table


def operand_table(energy: Energy) -> Table:
    """mJ by operand."""
    table = Table(*OPERANDS, title="by operand, mJ")
    _right(table, first=0)
    operands = energy.by_operand()
    table.add_row(*(mj(operands.get(operand, 0.0)) for operand in OPERANDS))
    return table


def token_table(energy: Energy) -> Table:
    """Tokens of an image for each expert."""
    table = Table("mixture", "experts", "tokens an image", "share", title=f"tokens of the experts ({energy.settings['shift_share_source']})")
    for entry in energy.tokens:
        sds = entry.sd or (None,) * len(entry.mean)
        tokens = " / ".join(f"{mean:.1f}" + (f" ± {sd:.1f}" if sd is not None else "") for mean, sd in zip(entry.mean, sds, strict=True))
        table.add_row(entry.mixture, "/".join(entry.primitives), tokens, " / ".join(f"{share:.2f}" for share in entry.shares))
    return table


def layer_table(energy: Energy) -> Table:
    """Every operation, with its tiling."""
    table = Table("layer", "kind", "shape", *LEVELS, "µJ", "tiling", title="by operation, µJ")
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for layer in energy.per_layer:
        levels = layer.by_level()
        tiling = " ".join(f"{name}={size}" for name, size in layer.tiling.items() if size != 1)
        cells = (f"{levels[level] * 1e-6:.3f}" for level in LEVELS)
        table.add_row(layer.name, kind_name(layer), layer.shape, *cells, f"{layer.pj * 1e-6:.3f}", tiling)
    return table


def comparison_view(comparison: Comparison) -> RenderableType:
    """Recipes side by side, and what each saves against the baselines."""
    against = [name for name in dict.fromkeys([comparison.baseline, *REFERENCES]) if name in comparison.energies]
    first = next(iter(comparison.energies.values()))
    model = first.model.rpartition(", ")[0]
    table = Table("recipe", *LEVELS, "mJ", *(f"saves vs {name}" for name in against), "shift share",
                  title=f"{model}: mJ, analytical Eyeriss model, mode {first.settings['mode']}, coverage {first.settings['coverage']}")  # fmt: skip
    _right(table)
    for name, energy in comparison.energies.items():
        levels = energy.by_level()
        share = energy.settings["shift_share"]
        told = "–" if share is None else f"{share:.2f} {energy.settings['shift_share_source']}"
        savings = (f"{100 * comparison.saving(name, other):+.1f} %" for other in against)
        table.add_row(name, *(mj(levels.get(level, 0.0)) for level in LEVELS), mj(energy.total_mj), *savings, told)
    lines = [Text(settings_line(first, "shift_share", "shift_share_source"))]
    if {"pvt", "ecoformer"} <= set(comparison.energies) and comparison.saving("ecoformer", "pvt") < 0:
        lines.insert(0, Text("Ecoformer's hashing makes it dearer than PVT's spatial reduction here; savings against it flatter."))
    return Group(table, *lines)


def sweep_view(sweep: Sweep) -> RenderableType:
    """One row for each value."""
    first = sweep.energies[0]
    table = Table(sweep.over, *LEVELS, "mJ", title=f"{first.model}: mJ over {sweep.over}")
    _right(table, first=0)
    for value, energy in zip(sweep.values, sweep.energies, strict=True):
        levels = energy.by_level()
        table.add_row(f"{value:g}", *(mj(levels.get(level, 0.0)) for level in LEVELS), mj(energy.total_mj))
    varied = {"shift-share": "shift_share", "shift-bits": "shift_weight_bits"}.get(sweep.over, sweep.over.replace("-", "_"))
    return Group(table, Text(settings_line(first, varied)))


def primitive_view() -> RenderableType:
    """Energy and area of one arithmetic step, each cell with its source."""
    table = Table("primitive", "format", "pJ", "source", "µm²", "source", title="one arithmetic step in 45 nm")
    for cost in unit_costs():
        area = "–" if cost.area_um2 is None else f"{cost.area_um2:g}"
        table.add_row(cost.name, cost.format, f"{cost.energy_pj:g}", cost.energy_source, area, cost.area_source or "–")
    to_add, area = ratio(("mult", "int32"), ("add", "int32"))
    to_shift, _ = ratio(("mult", "int32"), ("shift", "int32"))
    notes = [f"{key}: {text}" for key, text in sources().items()]
    notes.append(
        f"The published “up to 31× energy, 26× area” is int32 mult against int32 add ({to_add:.0f}×, {area:.0f}×); against shift it is {to_shift:.0f}×."
    )
    return Group(table, Text("\n".join(notes)))


def uncosted_line(energy: Energy) -> str:
    """What is not in the total."""
    if not energy.uncosted:
        return "not counted: nothing that was executed (views, layout and constants are free)"
    by_reason: dict[str, list[str]] = {}
    for entry in energy.uncosted:
        by_reason.setdefault(entry.reason, []).append(f"{entry.name} ×{entry.count}" if entry.count > 1 else entry.name)
    return "\n".join(f"not counted: {', '.join(names)} – {reason}" for reason, names in by_reason.items())


def settings_line(energy: Energy, *skip: str) -> str:
    """Everything that the numbers depend on, less what is shown elsewhere."""
    shown = {key: value for key, value in energy.settings.items() if value not in (None, []) and key not in ("mode", "units_source")}
    bits = {f"{name}_bits": width for name, width in shown.pop("bits", {}).items() if width is not None}
    return "settings: " + ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in {**shown, **bits}.items() if key not in skip)


def mj(value: float) -> str:
    """Four significant digits or so."""
    if value >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1000 else f"{value:.3f}"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "–"


def _right(table: Table, first: int = 1) -> None:
    for column in table.columns[first:]:
        column.justify = "right"
