"""One file holds a model: lossless, small, whole or refused."""

import json
import os
import pickle
import zlib
from copy import deepcopy
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import shiftaddvit
from shiftaddvit.entropy import deflated
from shiftaddvit.errors import UserError
from shiftaddvit.layers import KernelHash, PackedShiftLinear, ShiftConfig, ShiftLinear
from shiftaddvit.reparam import Recipe, recipes, reparameterize
from shiftaddvit.serialization import is_saved_model, load, read_metadata, round_dense, save

torch.set_num_threads(1)
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny(recipe: Recipe | str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = shiftaddvit.create_model("vit_tiny_patch16_224", ARGS)
    if recipe is not None:
        reparameterize(model, recipe)
        shiftaddvit.calibrate(model, images())
    return model.eval()


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(images())


KSH = Recipe.from_dict({"attention": "linear", "add": "ksh", "mlp": "moe", "hash": {"steps": 2, "anchors": 6, "bits": 4}})


@pytest.mark.parametrize("recipe", [None, "ours-quant-moe", "ours-quant-shift", KSH], ids=["dense", "moe", "shift", "ksh"])
@pytest.mark.parametrize("rounded", [False, True])
def test_saving_is_lossless(recipe, rounded, tmp_path):
    model = tiny(recipe)
    if rounded:
        before = logits(model)
        round_dense(model)
        torch.testing.assert_close(logits(model), before, rtol=0.05, atol=0.05)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype and torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training


def test_what_fits_half_precision_is_stored_so_and_nothing_else(tmp_path):
    model = tiny("ours-quant-shift")
    model.head.bias.data = torch.tensor([1.0, -0.0, 0.5, 65504.0, 2.0**-24])
    model.norm.bias.data[0] = 1 + 2.0**-20
    report = save(model, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    assert stored["head.bias"].dtype == torch.float16 and stored["norm.bias"].dtype == torch.float32
    loaded = load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.head.bias, model.head.bias) and torch.signbit(loaded.head.bias[1])
    assert report.bytes == os.path.getsize(tmp_path / "m.safetensors") and not report.packed


def test_round_dense_leaves_latents_and_hashes_alone():
    model = tiny(Recipe.from_dict({**KSH.to_dict(), "mlp": "shift"}))
    before = deepcopy(model.state_dict())
    round_dense(model)
    kept = {f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, (ShiftLinear, KernelHash)) for k in m.state_dict()}
    for key, value in model.state_dict().items():
        if key in kept and not key.endswith("bias"):
            assert torch.equal(value, before[key]), key
        elif value.is_floating_point():
            assert torch.equal(value, value.half().float()), key
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize(
    ("recipe", "bits", "classes", "limit"),
    [
        ("ours-quant-shift", 5, 200, 0.17),
        ("ours-quant-shift", 5, 1000, 0.19),
        ("ours-quant-shift", 4, 1000, 0.19),
        ("ours-quant-moe", 5, 1000, 0.55),
    ],
)
def test_packed_size_of_a_real_model(recipe, bits, classes, limit, tmp_path):
    """Of PVTv2-B0. The classifier and the convolutions stay dense, in half precision."""
    recipe = replace(recipes[recipe], shift=ShiftConfig(bits=bits))
    model = reparameterize(shiftaddvit.create_model("pvt_v2_b0", {"num_classes": classes}), recipe)
    with torch.no_grad():
        for parameter in model.parameters():  # no value may be small by luck of initialisation
            parameter += 1e-3 * torch.randn_like(parameter)
    report = save(round_dense(model), tmp_path / "m.safetensors", packed=True)
    assert report.dense_bytes == 4 * sum(p.numel() for p in timm.create_model("pvt_v2_b0", num_classes=classes).parameters())
    assert report.ratio == report.bytes / report.dense_bytes <= limit
    assert f"{report.ratio:.3f}" in str(report)


def test_packed_codes_lie_in_the_file_as_a_deflate_stream_of_one_code_a_byte(tmp_path):
    model = tiny("ours-quant-shift")
    save(model, tmp_path / "m.safetensors", packed=True)
    stored = load_file(tmp_path / "m.safetensors")
    for name, layer in shiftaddvit.pack(deepcopy(model)).named_modules():
        if isinstance(layer, PackedShiftLinear):
            codes = zlib.decompress(stored[f"{name}.codes"].numpy().tobytes(), wbits=-15)
            assert torch.equal(torch.frombuffer(bytearray(codes), dtype=torch.uint8).view(layer.shape), layer.integer_codes())


def test_files_of_format_1_hold_codes_as_they_lie_in_memory(tmp_path):
    model = tiny("ours-quant-shift")
    path = tmp_path / "m.safetensors"
    save(model, path, packed=True)
    rewritten(path, {"format": 1})
    strings, tensors = read_metadata(path), load_file(path)
    save_file(tensors | {k: v for k, v in shiftaddvit.pack(deepcopy(model)).state_dict().items() if k.endswith("codes")}, path, strings)
    assert torch.equal(logits(load(path)), logits(model))


@pytest.mark.parametrize("damage", ("cut", "longer", "other", "shape", "bomb", "empty", "large codes"))
def test_damaged_codes_are_named(damage, tmp_path):
    path = tmp_path / "m.safetensors"
    save(tiny("ours-quant-shift"), path, packed=True)
    strings, tensors = read_metadata(path), load_file(path)
    key = next(key for key in tensors if key.endswith("fc1.codes"))
    codes = tensors[key]
    count = len(zlib.decompress(codes.numpy().tobytes(), wbits=-15))
    tensors[key] = {
        "cut": codes[:-3].clone(), "longer": torch.cat([codes, codes]), "other": codes.flip(0), "shape": codes.unsqueeze(0),
        "bomb": deflated(torch.zeros(10**8, dtype=torch.uint8)), "empty": codes[:0].clone(),
        "large codes": deflated(torch.full((count,), 32, dtype=torch.uint8)),
    }[damage]  # fmt: skip
    save_file(tensors, path, strings)
    with pytest.raises(UserError, match=f"{key} (is damaged|must be a row of bytes)"):
        load(path)


def test_a_packed_model_saves_as_packed(tmp_path):
    model = tiny("ours-quant-shift")
    expected = logits(model)
    shiftaddvit.pack(model)
    assert save(model, tmp_path / "a.safetensors").packed
    loaded = load(tmp_path / "a.safetensors")
    assert any(isinstance(module, PackedShiftLinear) for module in loaded.modules())
    assert torch.equal(logits(loaded), expected)
    assert save(loaded, tmp_path / "b.safetensors").packed  # and again
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_saving_and_loading_leave_the_random_state_and_the_model_alone(tmp_path):
    model = tiny("ours-quant-moe")
    before, state = deepcopy(model.state_dict()), torch.get_rng_state()
    save(model, tmp_path / "m.safetensors", packed=True)
    load(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_metadata_comes_back(tmp_path):
    save(tiny(), tmp_path / "m.safetensors", metadata={"top1": "71.5", "classes": "a,b"})
    assert read_metadata(tmp_path / "m.safetensors")["top1"] == "71.5"
    assert is_saved_model(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="'shiftaddvit'"):
        save(tiny(), tmp_path / "n.safetensors", metadata={"shiftaddvit": "mine"})


def test_a_model_that_timm_built_saves_too(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=7).eval()
    save(model, tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").patch_embed.img_size == (48, 48)
    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    vars(model).pop("_model_args", None)  # older versions of timm do not remember how they were asked
    with pytest.raises(UserError, match="not what its architecture says.*create_model"):
        save(model, tmp_path / "n.safetensors")
    assert not (tmp_path / "n.safetensors").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file_is_refused(share, tmp_path):
    save(tiny(), tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(tmp_path / "m.safetensors")


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="load_pretrained"):
        load(tmp_path / "foreign.safetensors")
    assert not is_saved_model(tmp_path / "foreign.safetensors")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (tmp_path / "m.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(tmp_path / "m.safetensors")
    assert not (tmp_path / "exploded").exists()


def rewritten(path, header=None, tensors=None) -> None:
    """The file again with its header's fields or its tensors changed."""
    stored, metadata = load_file(path), read_metadata(path)
    known = json.loads(metadata["shiftaddvit"])
    metadata["shiftaddvit"] = json.dumps(known | header) if isinstance(header, dict) else header or metadata["shiftaddvit"]
    save_file(stored if tensors is None else tensors(stored), path, metadata=metadata)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": 3}, "has format 3; this version reads formats up to 2"),
        ("{", "header is damaged"),
        ("[]", "header is damaged"),
        ('{"format": 1}', "header is damaged"),
        ({"architecture": {"name": "vit_tiny"}}, "header is damaged"),
        ({"architecture": {"name": "vit_tinny_patch16_224", "args": {}}}, "did you mean 'vit_tiny_patch16_224'"),
        ({"recipe": {"mpl": "shift"}}, "did you mean 'mlp'"),
        ({"architecture": {"name": "vit_tiny_patch16_224", "args": {**ARGS, "depth": 1}}}, "unexpected blocks.1"),
    ],
)
def test_strange_headers_are_refused(header, message, tmp_path):
    save(tiny(), tmp_path / "m.safetensors")
    rewritten(tmp_path / "m.safetensors", header)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "m.safetensors")


def test_missing_unexpected_and_misshapen_keys_are_listed(tmp_path):
    def change(tensors: dict) -> dict:
        del tensors["norm.weight"]
        return tensors | {"head.bias": torch.zeros(6), "extra": torch.zeros(1)}

    save(tiny(), tmp_path / "m.safetensors")
    rewritten(tmp_path / "m.safetensors", tensors=change)
    with pytest.raises(UserError) as error:
        load(tmp_path / "m.safetensors")
    for part in ("missing norm.weight", "unexpected extra", "head.bias is (6,), must be (5,)"):
        assert part in str(error.value)


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save(tiny(), path)
    whole = path.read_bytes()

    def half_written(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shiftaddvit.serialization.save_file", half_written)
    with pytest.raises(OSError, match="No space"):
        save(tiny("mlp-shift"), path)
    assert path.read_bytes() == whole and sorted(p.name for p in tmp_path.iterdir()) == ["m.md", "m.safetensors"]
