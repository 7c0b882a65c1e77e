"""`shiftaddvit recipes` and `models`: what there is to choose from."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from shiftaddvit.errors import unknown

if TYPE_CHECKING:
    from rich.table import Table

FAMILIES = (
    ("pvt_v2_*", "PVTv2 (timm): all of it", "pvt_v2_b0"),
    ("pvt_tiny … pvt_large", "PVTv1 (ours, in timm's registry): all of it", "pvt_tiny"),
    ("deit_*, deit3_*", "DeiT (timm), distilled too: all of it", "deit_tiny_patch16_224"),
    ("vit_*, dinov2 too", "ViT (timm): all of it, but for attention with rotary or relative positions", "vit_small_patch16_224"),
    ("others of timm", "linears of attention and MLP (qkv, proj, fc1, fc2): shift and mixture recipes", "mlp-shift on beit_base_patch16_224"),
)
"""(names, what converts, an example)."""


def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe as TOML, to start a file of your own from.")] = None) -> None:
    """List the recipes, or print one."""
    from shiftaddvit.reparam import recipes as shipped

    if name is not None:
        typer.echo(shipped[name].to_toml(), nl=False)
        return
    table = _table("recipe", "attention", "add", "attention linears", "MLP", "rest", "what it is")
    for key in shipped:
        recipe = shipped[key]
        table.add_row(key, recipe.attention, recipe.add, recipe.attn_linear, recipe.mlp, recipe.rest, recipe.description)
    _print(table)


def models(pattern: Annotated[str | None, typer.Argument(help="List timm's names that match this glob, such as 'vit_*_dinov2'.")] = None) -> None:
    """List the families of models that convert, or timm's names."""
    if pattern is None:
        table = _table("models", "what converts", "example")
        for row in FAMILIES:
            table.add_row(*row)
        _print(table)
        return
    import timm

    import shiftaddvit.models  # noqa: F401  (registers PVTv1)

    found = timm.list_models(pattern)
    if not found:
        raise unknown("model", pattern, timm.list_models())
    typer.echo("\n".join(found))


def _table(*headings: str) -> "Table":
    from rich.table import Table

    table = Table()
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=number == 0)
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)
