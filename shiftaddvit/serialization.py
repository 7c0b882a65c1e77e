"""One safetensors file: weights (latent or packed), recipe, architecture and calibration state."""

import json
import os
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn

from shiftaddvit.entropy import deflate_codes, inflate_codes
from shiftaddvit.errors import UserError
from shiftaddvit.files import atomic_write
from shiftaddvit.layers.hashing import KernelHash
from shiftaddvit.layers.packed import is_packed, pack
from shiftaddvit.layers.shift import ShiftLayer
from shiftaddvit.model_card import ModelFacts, write_card
from shiftaddvit.reparam import Recipe, reparameterize
from shiftaddvit.reparam.architecture import Architecture, dense_skeleton, rebuilt

FORMAT = 2
"""Of new files. Format 1 differs in packed codes, which it holds as they lie in memory."""
HEADER = "shiftaddvit"
"""The key of the file's own header among its strings."""
IMAGES = "shiftaddvit.images"
"""The key of what a file says about its images."""


@dataclass(frozen=True)
class SaveReport:
    """What was written."""

    path: str
    """The file."""
    bytes: int
    """Its size."""
    dense_bytes: int
    """Size of the dense model's weights in float32."""
    packed: bool
    """Whether shift layers are stored as integer codes."""
    card: str | None = None
    """The card beside it; None where files of the user's own are in the way."""

    @property
    def ratio(self) -> float:
        """File size over the dense float32 weights."""
        return self.bytes / self.dense_bytes

    def __str__(self) -> str:
        form = "packed (no more training)" if self.packed else "not packed (can be trained on)"
        return f"{self.path}: {self.bytes / 1e6:.2f} MB, {form}, {self.ratio:.3f}× the dense fp32 weights ({self.dense_bytes / 1e6:.2f} MB)"


def round_dense(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """Round every float parameter and buffer that is not a shift layer's latent to values that `dtype` holds, in place. The model stays
    float32; its file is then half as large (`save` stores what fits in half precision there), and its logits those of the file."""
    latents = {id(p) for module in model.modules() if isinstance(module, ShiftLayer) for p in module.latent_parameters()}
    hashing = {id(b) for module in model.modules() if isinstance(module, KernelHash) for b in module.buffers()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and id(tensor) not in latents | hashing:
                tensor.copy_(tensor.to(dtype).to(tensor.dtype))
    return model


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    packed: bool = False,
    metadata: dict[str, str] | None = None,
    facts: ModelFacts = ModelFacts(),
) -> SaveReport:
    """Write `model` (converted or dense) to one safetensors file, atomically; lossless.

    A float32 tensor whose values all fit float16 exactly is stored as float16 (see `round_dense`). With `packed`, shift layers are
    stored as 4- or 5-bit codes, Huffman-coded (`entropy`): the loaded model computes exactly what `model` does, and no longer trains. `metadata` adds strings
    (class names, a result) that `read_metadata` gives back. A model card is written beside the file (`model_card.card_path` says where);
    `facts` are what it says of accuracy, data and origin. Of DistributedDataParallel, torch.compile and timm's EMA the model inside is
    saved. Raises UserError for a model whose architecture cannot be named.
    """
    model = _unwrapped(model)
    architecture, dense = rebuilt(model)
    recipe = getattr(model, "shiftaddvit_recipe", None)
    dense_bytes = 4 * sum(p.numel() for p in dense.parameters())
    if metadata and HEADER in metadata:
        raise UserError("metadata key 'shiftaddvit' is the file's own header: choose another")
    packed = packed or is_packed(model)
    written = pack(deepcopy(model)) if packed else model
    _check_rebuilds(written, dense, recipe, packed)
    header = {
        "format": FORMAT,
        "architecture": asdict(architecture),
        "recipe": recipe.to_dict() if recipe is not None else None,
        "packed": packed,
    }
    tensors = {name: _shrink(tensor.detach().cpu()) for name, tensor in written.state_dict().items()}
    deflate_codes(written, tensors)
    strings = {HEADER: json.dumps(header), "format": "pt"} | (metadata or {}) | facts.to_metadata()
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=strings)
    except SafetensorError as error:
        raise UserError(f"{path} could not be written, nothing was replaced: {error}") from None
    size = Path(path).stat().st_size
    card = write_card(Path(path), written, header, (size, dense_bytes), facts)
    return SaveReport(str(path), size, dense_bytes, packed, None if card is None else str(card))


def check_savable(model: nn.Module) -> None:
    """Raise the UserError that `save` would: before a long run, rather than at its end."""
    model = _unwrapped(model)
    _, dense = rebuilt(model)
    _check_rebuilds(model, dense, getattr(model, "shiftaddvit_recipe", None), is_packed(model))


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> nn.Module:
    """The model that `save` wrote, in evaluation mode: same logits. Where the file says which images it was trained on, the model's
    `pretrained_cfg` says so too, and `deploy`, `energy` and `export` take that size by default. UserError for a file that is truncated,
    of another program or of a newer format, or whose tensors do not fit."""
    header, tensors = _read(path)
    architecture = Architecture(**header["architecture"])
    recipe = Recipe.from_dict(header["recipe"], source=f"the recipe in {path}") if header["recipe"] is not None else None
    model = _rebuild(dense_skeleton(architecture), recipe, header["packed"])
    model.shiftaddvit_packed = header["packed"]
    expected = model.state_dict()
    if header["format"] > 1:
        inflate_codes(model, tensors, path)
    problems = [f"missing {key}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected {key}" for key in tensors.keys() - expected.keys()]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, must be {tuple(expected[key].shape)}"
        for key in expected.keys() & tensors.keys()
        if tensors[key].shape != expected[key].shape
    ]
    if problems:
        raise UserError(f"{path} does not fit its own architecture: " + "; ".join(sorted(problems)[:8]))
    model.load_state_dict({key: tensor.to(expected[key].dtype) for key, tensor in tensors.items()})
    model.shiftaddvit_architecture = architecture
    _set_images(model, read_image_settings(path))
    return model.to(device).eval()


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings stored beside the weights."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def read_image_settings(path: str | os.PathLike) -> dict[str, Any]:
    """`image_size` (height, width), `crop_pct` and `classes`, as far as the file of a model holds them."""
    return json.loads(read_metadata(path).get(IMAGES, "{}"))


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """What a saved model is: `format`, `architecture` (name, args), `recipe` (None for a dense model), `packed`. UserError for a file that
    is damaged, of another program or of another format."""
    metadata = read_metadata(path)
    if HEADER not in metadata:
        raise UserError(f"{path} holds weights but no shiftaddvit model; load it into a model with shiftaddvit.load_pretrained")
    try:
        header = json.loads(metadata[HEADER])
        version, parts = header["format"], set(header)
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: its header is damaged") from None
    if version not in range(1, FORMAT + 1):
        raise UserError(f"{path} has format {version}; this version reads formats up to {FORMAT}")
    if not {"architecture", "recipe", "packed"} <= parts or set(header["architecture"]) != {"name", "args"}:
        raise UserError(f"{path}: its header is damaged")
    return header


def is_saved_model(path: str | os.PathLike) -> bool:
    """Whether the file was written by `save` (rather than holding bare weights)."""
    return Path(path).suffix == ".safetensors" and Path(path).is_file() and HEADER in read_metadata(path)


def _read(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    header = read_header(path)
    with safe_open(str(path), framework="pt") as file:
        return header, {key: file.get_tensor(key) for key in file.keys()}


def _set_images(model: nn.Module, settings: dict[str, Any]) -> None:
    """timm's own place for the size and crop that a model's weights are for."""
    if settings.get("image_size"):
        model.pretrained_cfg["input_size"] = (model.pretrained_cfg["input_size"][0], *settings["image_size"])
    if settings.get("crop_pct"):
        model.pretrained_cfg["crop_pct"] = settings["crop_pct"]


def _shrink(tensor: Tensor) -> Tensor:
    """float32 as float16 when that loses nothing, bit for bit."""
    tensor = tensor.contiguous()
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.to(torch.float16)
    return half if torch.equal(half.to(torch.float32), tensor) else tensor


def _rebuild(dense: nn.Module, recipe: Recipe | None, packed: bool) -> nn.Module:
    """The form that a model had when it was saved, leaving the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        if recipe is not None:
            reparameterize(dense, recipe)
        return pack(dense) if packed else dense


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of training."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, ModelEmaV2, ModelEmaV3)):
        return _unwrapped(model.module)
    return _unwrapped(model._orig_mod) if hasattr(model, "_orig_mod") else model


def _check_rebuilds(model: nn.Module, dense: nn.Module, recipe: Recipe | None, packed: bool) -> None:
    """The file must lead back to this model: same names, shapes and settings as its architecture and recipe give."""
    again = _rebuild(dense, recipe, packed)
    expected = {name: tuple(tensor.shape) for name, tensor in again.state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    odd = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)) or _other_settings(model, again)
    if odd:
        raise UserError(
            f"the model is not what its architecture{' and recipe say' if recipe is not None else ' says'} (first difference: {odd[0]}); "
            "build it with shiftaddvit.create_model(name, args) so that its arguments are known, and change no setting afterwards"
        )


_TRAINING_ONLY = {"training", "p", "drop_prob", "scale_by_keep", "inplace", "grad_checkpointing", "distilled_training", "fused_attn"}
"""Settings that change nothing about what a model computes in evaluation."""


def _other_settings(model: nn.Module, again: nn.Module) -> list[str]:
    """Plain attributes in which modules of one kind differ: tensors do not show how many heads share a matrix."""
    found = []
    for name, module in model.named_modules():
        twin = again.get_submodule(name) if name in dict(again.named_modules()) else None
        if type(twin) is not type(module):
            continue
        for key, value in vars(module).items():
            other = vars(twin).get(key, value)
            if not key.startswith("_") and key not in _TRAINING_ONLY and isinstance(value, (bool, int, float, str)) and value != other:
                found.append(f"{name}.{key} is {value!r}, would be {other!r}".removeprefix("."))
    return found
