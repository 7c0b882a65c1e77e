"""Options that several commands share, and reading their values."""

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

from shiftaddvit.errors import UserError, unknown

Model = Annotated[str, typer.Argument(help="A timm model (pvt_v2_b0, deit_tiny_patch16_224, pvt_tiny …), or a .safetensors file that shiftaddvit wrote.")]
Data = Annotated[str, typer.Argument(help="Class folders, Parquet files, tars (train-{000..146}.tar), or torch/NAME, hfds/OWNER/NAME.")]
Weights = Annotated[Path | None, typer.Option(help="Weights of MODEL: .pth or .safetensors, of timm, the official releases or Hugging Face.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download timm's weights for MODEL.")]
Classes = Annotated[int | None, typer.Option(help="Outputs of the model. (default: as the weights or the data have)")]
ModelArgs = Annotated[list[str] | None, typer.Option("--model-arg", help="NAME=VALUE, given to timm when it builds MODEL; may be repeated.")]
RecipeName = Annotated[str | None, typer.Option(help="A recipe's name (see 'shiftaddvit recipes') or a TOML file; dense converts nothing.")]
ImageSize = Annotated[str | None, typer.Option(help="Pixels of a side, or HEIGHTxWIDTH. (default: the model's own)")]
CropPct = Annotated[float | None, typer.Option(help="Share of a side that evaluation looks at. (default: the model's own at its own size, else 1)")]
BatchSize = Annotated[int, typer.Option(help="Images a step, for each process.")]
Workers = Annotated[int | None, typer.Option(help="Processes that decode images, for each training process. (default: one a core, at most 8)")]
Precision = Annotated[str, typer.Option(help="no (float32), fp16 or bf16.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at an image that cannot be read, instead of counting it.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder in which a data set given by name (torch/…, hfds/…) lies.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a data set given by name if it is not there.")]
IgnoreNames = Annotated[bool, typer.Option("--ignore-class-names", help="Let the data call the model's classes by other names.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="List every key and layer of the reports.")]
JsonFile = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to a file, or to the output for '-'.")]


def model_args(given: list[str] | None) -> dict[str, Any]:
    """`["depth=2", "img_size=(32, 32)"]` as a dict of plain values; what is no Python literal is a word."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--model-arg must look like NAME=VALUE, got {text!r}")
        try:
            found[name] = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(value, value))
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value`, or UserError naming what the option takes."""
    if value not in allowed:
        raise unknown(f"value of {option}", value, allowed)
    return value
