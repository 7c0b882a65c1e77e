"""Reading weights from a file, never code: safetensors, and torch files under `weights_only`."""

import argparse
import os
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shiftaddvit.errors import UserError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Entries of a training checkpoint that hold weights; of several the first is taken, as timm does: the averaged ones."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put in front of every key."""

_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError, struct.error)
"""What torch raises for a damaged file, by where it is damaged."""


def read_weights(path: str | os.PathLike) -> dict[str, Shaped[Tensor, "..."]]:
    """The tensors in a `.safetensors` or torch file (`.pth`, `.pt`, `.bin`), on the CPU, by key.

    A training checkpoint is unwrapped (see `WRAPPERS`) and the prefixes of DDP and torch.compile are removed. No code in the file is
    run. Raises UserError for a file that is missing, truncated, of another kind, that would need code, or that holds no weights.
    """
    return unwrap(path, read_file(path))[0]


def read_file(path: str | os.PathLike) -> object:
    """What the file holds: a dict of tensors, or a training checkpoint around one."""
    path = Path(path)
    if path.is_dir():
        found = sorted(p.name for pattern in ("*.safetensors", "*.bin", "*.pth") for p in path.glob(pattern))
        raise UserError(f"{path} is a folder; give the file with the weights" + (f", such as {path / found[0]}" if found else ""))
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise UserError(f"{path} is empty")
    # A safetensors file starts with eight bytes of length and then JSON, whatever it is called.
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file (truncated or damaged): {error}") from None


def _read_torch(path: Path) -> object:
    try:
        # Namespace is plain data (its arguments), which training scripts like to keep beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except _DAMAGE as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program, not weights; save its state_dict() instead") from None
        raise _damaged(path) from None


def _refusal(path: Path, message: str) -> UserError:
    # torch's message is a page long; the line that names what the file asks for is the one that helps.
    named = re.search(r"(?:GLOBAL|function|class) '?([A-Za-z_]\w*(?:\.\w+)+)", message)
    if named is None:
        return _damaged(path)
    return UserError(
        f"{path} would run code when loaded (it calls {named[1]}), so it is not read; "
        "if you trust it, save its weights alone: torch.save(model.state_dict(), file)"
    )


def _damaged(path: Path) -> UserError:
    # torch's reasons are a paragraph for one file, "[Errno 22]" for the next, and help with none.
    return UserError(f"{path} is not a whole torch file (truncated, damaged or of another kind; it has {path.stat().st_size} bytes): get it again")


def unwrap(path: str | os.PathLike, content: object) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors inside a training checkpoint, keys without wrapper prefixes, and notes on what was chosen."""
    notes: list[str] = []
    if isinstance(content, Mapping):
        present = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if present:
            content = content[present[0]]
            notes += [f"the file holds {', '.join(present)}; {present[0]} is used"] if len(present) > 1 else []
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no weights but {_kind(content)}; it must be a dict of tensors, or one under {', '.join(WRAPPERS)}")
    other = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other:
        raise UserError(
            f"{path} holds more than weights: {str(other[0])!r} is {_kind(content[other[0]])}; "
            f"it must be a dict of tensors, or one under {', '.join(WRAPPERS)}"
        )
    weights = {_strip(key): value for key, value in content.items()}
    if len(weights) != len(content):
        raise UserError(f"{path} holds keys that are equal but for {' or '.join(PREFIXES)}")
    return weights, tuple(notes)


def _kind(value: object) -> str:
    return "an empty dict" if value == {} else f"a {type(value).__name__}"


def _strip(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.partition(".")[2]
    return key
