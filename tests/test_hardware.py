"""The integer network: exact arithmetic, the same bits everywhere, no product in converted layers, and a folder that explains itself."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_models import converted, dense, images

import shiftaddvit as sav
from shiftaddvit.errors import UserError
from shiftaddvit.hardware import Widths, hand_over, reference, to_integers, torch_reference
from shiftaddvit.hardware.accuracy import compare
from shiftaddvit.hardware.audit import audit, products_in_source
from shiftaddvit.hardware.layers import float_run, signed_digits
from shiftaddvit.hardware.lower import as_tokens, lower
from shiftaddvit.layers.attention import AngularConfig, BinaryConfig
from shiftaddvit.layers.moe import MoEConfig
from shiftaddvit.layers.shift import ShiftConfig, ShiftLinear
from shiftaddvit.ops.matshift import formats, matshift_int8
from shiftaddvit.ops.matshift.reference import shift_literally

SHORT = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
SMALL = {"pvt_v2": SHORT, "vit": {"depth": 1}}
MOE = sav.recipes["ours-quant-moe"]
SHIFT = sav.recipes["ours-quant-shift"]
CASES = {
    "pyramid, all shift": ("pvt_v2", SHIFT, {}),
    "pyramid, mixtures of 4 bits": ("pvt_v2", replace(MOE, shift=ShiftConfig(bits=4)), {}),
    "pyramid, dense with spatial reduction": ("pvt_v2", None, {}),
    "plain, ±1 codes around zero": ("vit", replace(SHIFT, binary=BinaryConfig(threshold="zero", codes="plus-minus")), {}),
    "plain, other forms": (
        "vit", replace(SHIFT, angular=AngularConfig(local="mean", context="sum", output_norm="none", token_conv=0, shared_qk=True, unit_codes=True)), {},
    ),
    "plain, one router an MLP, DeepShift-Q": ("vit", replace(sav.recipes["mlp-moe"], moe=MoEConfig(router="mlp"), shift=ShiftConfig(variant="q")), {}),
    "plain, mean of the tokens": ("vit", None, {"global_pool": "avg"}),
}  # fmt: skip


def model_of(case: str):
    family, recipe, more = CASES[case]
    more = SMALL[family] | more
    return dense(family, **more) if recipe is None else converted(family, recipe, **more)


def network_and_image(case: str):
    network = to_integers(model_of(case), images(4))
    return network, network.to_integers(as_tokens(images(2, seed=5)).numpy())


@pytest.mark.parametrize("case", CASES)
def test_numpy_and_torch_give_the_same_bits_in_every_tensor_and_the_logits_are_the_models(case):
    network, image = network_and_image(case)
    literal, fast = network.run(image), torch_reference.run(network, torch.from_numpy(image))
    for name, tensor in literal.items():
        assert np.array_equal(tensor, fast[name].numpy()), name
        told = network.description["tensors"][name]
        assert list(tensor.shape[1:]) == told["shape"] and abs(tensor).max() <= 2 ** (told["bits"] - 1), name
    with torch.no_grad():
        expected = model_of(case)(images(2, seed=5)).numpy()
    logits = literal["head"][:, 0] * 2.0 ** -network.description["tensors"]["head"]["fraction"]
    assert abs(logits - expected).max() < 0.25 * expected.std(), "eight-bit activations are near the float logits"


@pytest.mark.parametrize("case", CASES)
def test_the_lowered_layers_compute_the_models_function_on_floats(case):
    model = model_of(case)
    layers = lower(model, (32, 32), Widths())
    with torch.no_grad():
        torch.testing.assert_close(float_run(layers, as_tokens(images(3)))["head"][:, 0], model(images(3)).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 5])
def test_a_shift_layers_sums_are_those_of_literal_shifts_and_of_the_integer_path_on_the_cpu(bits):
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (7, 63), generator=draw, dtype=torch.uint8)
    codes[codes == 2 ** (bits - 1)] = 0  # no negative zero
    x = torch.randint(-128, 128, (5, 63), generator=draw)
    p = {"codes": codes.numpy(), "code_bits": bits, "bias": np.zeros(7, np.int64), "shift": 0, "bits": 60}
    ours = torch.from_numpy(reference.shift_linear(p, x.numpy()[None]))[0]
    assert torch.equal(ours, shift_literally(x, codes, bits))
    assert torch.equal(ours, x @ torch_reference.code_integers(codes.long(), bits).t())
    # Eight bits hold seven exponents: 5-bit codes are the sum of three such weights.
    total = torch.zeros_like(ours)
    e = codes & (2 ** (bits - 1) - 1)
    for part in range(-(-(2 ** (bits - 1) - 1) // 7)):
        inside = (e > 7 * part) & (e <= 7 * part + 7)
        four = torch.where(inside, (codes >> (bits - 1)) << 3 | (e - 7 * part), 0)
        weight, _ = formats.decode_int8(four.to(torch.uint8))
        total += matshift_int8(x.to(torch.int8), torch.ones(1), weight, torch.ones(7), backend="cpu").long() << 7 * part
    assert torch.equal(ours, total)


def test_rounding_is_to_nearest_with_halves_up():
    for x in (-7, -6, -5, -1, 0, 1, 5, 6, 7, 1000003):
        for shift in (-3, 0, 1, 2, 5):
            assert reference.round_shift(np.int64(x), shift) == math.floor(Fraction(x) / Fraction(2) ** shift + Fraction(1, 2)), (x, shift)
        for b in (1, 2, 3, 10):
            assert reference.round_divide(np.int64(x), np.int64(b)) == math.floor(Fraction(x, b) + Fraction(1, 2)), (x, b)
    assert reference.saturate(np.array([-200, -128, 127, 128]), 8).tolist() == [-128, -128, 127, 127]


def test_the_integer_square_root_is_exact_up_to_62_bits():
    values = [0, 1, 2, 3, 4, 8, 9, 10**9, 2**52 + 1, (2**31 - 1) ** 2 - 1, (2**31 - 1) ** 2, 2**62 - 1]
    assert reference.integer_sqrt(np.array(values)).tolist() == [math.isqrt(value) for value in values]
    assert torch_reference._sqrt(torch.tensor(values)).tolist() == [math.isqrt(value) for value in values]


def test_constants_become_few_signed_shifts():
    for constant in (1.0, 0.5, 1 / math.pi, 1 / (197 * math.pi), 0.7, 3.0):
        terms = signed_digits(constant)
        assert abs(sum(sign * 2.0**place for sign, place in terms) / constant - 1) <= 2.0**-12 and len(terms) <= 7
    assert signed_digits(0.25) == [(1, -2)]
    for constant in (1, 5, 24, 48):
        assert reference.times_constant(np.int64(7), constant) == 7 * constant


@pytest.mark.parametrize("case", ["pyramid, all shift", "pyramid, mixtures of 4 bits"])
def test_no_input_overflows_an_accumulator_and_no_bit_of_it_is_spare(case):
    network = to_integers(model_of(case), images(4))
    for layer in network.description["layers"]:
        if layer["kind"] not in ("shift_linear", "linear"):
            continue
        arrays = {field: network.arrays[name].astype(np.int64) for field, name in layer["arrays"].items()}
        weight = (
            arrays["weight"]
            if layer["kind"] == "linear"
            else torch_reference.code_integers(torch.from_numpy(arrays["codes"]), layer["code_bits"]).numpy()
        )
        lowest = -(2 ** (network.description["tensors"][layer["inputs"][0]]["bits"] - 1))
        # The worst input of a row has every sum of one sign; so a partial sum is never larger.
        worst = [int(b) + int(abs(w).sum()) * -lowest for b, w in zip(abs(arrays["bias"]), weight, strict=True)]
        ends = [w * 2 ** max(-int(s), 0) + (2 ** (int(s) - 1) if s > 0 else 0) for w, s in zip(worst, arrays["shift"], strict=True)]
        assert 2 ** (layer["accumulator_bits"] - 2) <= max(ends) < 2 ** (layer["accumulator_bits"] - 1), layer["name"]


def test_every_shift_layer_is_converted_and_the_audit_counts_one_addition_a_weight():
    model = model_of("pyramid, mixtures of 4 bits")
    network = to_integers(model, images(4))
    found = audit(network, network.to_integers(as_tokens(images(1)).numpy()))
    assert found.failures == []
    shifting = {name for name, module in model.named_modules() if isinstance(module, ShiftLinear)}
    assert shifting == {one.name for one in found.layers if one.kind == "shift_linear"} and shifting
    assert "multiply" not in found.total(converted=True) and "divide" not in found.total(converted=True)
    layer = next(one for one in found.layers if one.name == "stages.0.blocks.0.mlp.fc1.experts.1")
    assert layer.counts["add"] == 64 * 16 * 32 + 64 * 32  # one a weight and token, and half a unit before the shift
    dense_twin = next(one for one in found.layers if one.name == "stages.0.blocks.0.mlp.fc1.experts.0")
    assert dense_twin.counts["multiply"] == 64 * 16 * 32


def test_the_audit_sees_every_way_to_multiply(monkeypatch):
    network, image = network_and_image("plain, ±1 codes around zero")
    shift_linear = reference.shift_linear

    def cheats(p, x):
        return shift_linear(p, x * np.int64(1))

    def hides(p, x):
        return shift_linear(p, np.asarray(x)) + np.einsum("bnc->bn", np.asarray(x))[..., None] * 0

    for wrong, seen in ((cheats, "did multiply"), (hides, "not watched")):
        monkeypatch.setitem(reference.KINDS, "shift_linear", wrong)
        monkeypatch.setattr("shiftaddvit.hardware.audit.products_in_source", lambda kinds: [])
        failures = audit(network, image).failures
        assert len(failures) == 4 and all(seen in failure for failure in failures)


def test_the_source_of_converted_kinds_holds_no_product_and_that_of_others_does():
    assert products_in_source(["shift_linear", "shift_add", "codes", "mat_add_keys", "mat_add_queries"]) == []
    for kind in ("linear", "conv", "token_conv", "layer_norm", "unit", "softmax_attention", "route"):
        assert products_in_source([kind]), kind


def test_the_embedded_images_keep_their_classes_as_integers():
    from shiftaddvit.quickstart.assets import load_dense, load_images, test_loader

    data = load_images()
    model = load_dense()
    calibration = next(iter(test_loader(data.train_images[:64], data.train_labels[:64])))[0]
    network = to_integers(model, calibration)
    found = compare(model, network, test_loader(data.test_images[::8], data.test_labels[::8]))
    assert found.images == 250 and found.same >= 245 and abs(found.integers - found.model) <= 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hardware") / "out"
    report = hand_over(model_of("plain, ±1 codes around zero"), images(4), path, vectors=1)
    assert "layers, " in str(report) and report.images == 4
    return path


def alone(folder: Path) -> subprocess.CompletedProcess:
    """reference.py in a Python that has NumPy, and neither torch nor this package."""
    code = "import sys, runpy; sys.modules['torch'] = sys.modules['shiftaddvit'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, str(folder / "reference.py"), str(folder)], capture_output=True, text=True)


def test_the_folder_runs_by_itself_and_notices_one_wrong_bit(folder, tmp_path):
    done = alone(folder)
    assert done.returncode == 0 and " 0 differ" in done.stdout, done.stderr
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    codes = np.load(copy / "arrays" / "blocks.0.mlp.fc1.codes.npy")
    codes[0, np.flatnonzero(codes[0])[0]] ^= 1 << 4
    np.save(copy / "arrays" / "blocks.0.mlp.fc1.codes.npy", codes)
    done = alone(copy)
    assert done.returncode == 1 and "blocks.0.mlp.fc1" in done.stdout


def test_hex_files_packed_codes_and_descriptions_say_the_same_as_the_arrays(folder):
    network = json.loads((folder / "network.json").read_text())
    for name, told in network["tensors"].items():
        values, array = hex_values(folder / "vectors" / f"{name}.hex", told["bits"]), np.load(folder / "vectors" / f"{name}.npy")
        assert values == array.reshape(-1).tolist() and list(array.shape) == [1, *told["shape"]]
    for name, told in network["arrays"].items():
        array = np.load(folder / "arrays" / f"{name}.npy")
        assert hex_values(folder / "arrays" / f"{name}.hex", told["bits"]) == array.reshape(-1).tolist() and list(array.shape) == told["shape"]
    for layer in network["layers"]:
        if layer["kind"] == "shift_linear":
            codes = np.load(folder / "arrays" / f"{layer['arrays']['codes']}.npy")
            packed = torch.from_numpy(np.load(folder / "packed" / f"{layer['name']}.npy"))
            assert np.array_equal(formats.unpack(packed, layer["code_bits"], codes.shape[1]).numpy(), codes)
    assert json.loads((folder / "audit.json").read_text())["failures"] == []


def hex_values(path: Path, bits: int) -> list[int]:
    width = 4 * -(-bits // 4)
    return [value - (1 << width) if value >> (width - 1) else value for value in (int(line, 16) for line in path.read_text().split())]


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="needs iverilog")
def test_a_verilog_simulator_matches_every_bit_and_notices_one_that_is_wrong(folder, tmp_path):
    simulate = [sys.executable, str(Path(__file__).parents[1] / "examples" / "hardware" / "simulate.py")]
    layers = ["blocks.0.attn.qkv", "blocks.0.attn.key_value", "blocks.0.attn.query_context", "blocks.0.mlp.fc2"]
    done = subprocess.run([*simulate, str(folder), *layers], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASS") == 4, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in ("blocks.0.mlp.fc2", "blocks.0.attn.key_value"):
        vector = copy / "vectors" / f"{name}.hex"
        lines = vector.read_text().split()
        lines[3] = f"{int(lines[3], 16) ^ 1:0{len(lines[3])}x}"
        vector.write_text("\n".join(lines) + "\n")
    done = subprocess.run([*simulate, str(copy), layers[1], layers[3]], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("FAIL: 1 of") == 2


@pytest.mark.parametrize(
    ("family", "recipe", "said"),
    [
        ("vit", "ours-ksh-add", r"blocks\.0\.attn has no integer form here: of linear attention"),
        ("vit", "ecoformer", r"blocks\.0\.attn \(EcoformerAttention\) has no integer form"),
        ("vit", replace(MOE, moe=MoEConfig(gate="paper")), "multiplies by its gate"),
        ("vit", replace(SHIFT, binary=BinaryConfig(threshold="tensor")), "threshold 'token' or 'zero'"),
        ("vit", replace(SHIFT, angular=AngularConfig(output_norm="similarity")), "output_norm = 'similarity'"),
        ("pvt_v2", "addernet", r"stages\.0\.blocks\.0\.attn\.q \(NormedAdder\) has no integer form"),
        ("vit", "deepshift-ps", r"patch_embed\.proj \(ShiftConv2d\) has no integer form"),
        ("pvt_v1", None, "PyramidVisionTransformer has no integer form yet"),
    ],
)  # fmt: skip
def test_what_has_no_integer_form_is_named_and_nothing_is_written(family, recipe, said, tmp_path):
    model = dense(family) if recipe is None else converted(family, recipe, **SMALL[family])
    with pytest.raises(UserError, match=said):
        hand_over(model, images(2), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_folder_of_other_things_is_not_replaced_and_an_earlier_hand_off_is(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds files that are no hand-off"):
        sav.export(dense("vit", depth=1), tmp_path / "mine", "vectors", images=images(2))
    with pytest.raises(UserError, match="calibrates the ranges"):
        sav.export(dense("vit", depth=1), tmp_path / "new", "vectors")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "stray").write_text("of the earlier one")
    hand_over(dense("vit", depth=1), images(2), copy, vectors=1)
    assert not (copy / "stray").exists() and sorted(os.listdir(tmp_path)) == ["copy", "mine"]


def test_the_reference_and_the_audit_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import shiftaddvit.hardware.reference, shiftaddvit.hardware.network, shiftaddvit.hardware.audit"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
