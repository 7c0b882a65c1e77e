"""The engine on a real GPU: graphs equal eager runs, logits equal the model's, nothing reads memory that nobody wrote."""

import sys
from pathlib import Path
from threading import Thread

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_models import ADDERS, FAMILIES, PAIRS, SIZE, converted, dense, images, randomised
from ops_checks import poisoned_outputs

from shiftaddvit.engine import Launch, deploy, lower
from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import BinaryConfig
from shiftaddvit.ops import tiling
from shiftaddvit.reparam import Recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def exact_float32():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def engine_of(model, **more):
    return deploy(model, device="cuda", image_size=SIZE, **({"tune_seconds": 0} | more))


@torch.no_grad()
def error(y, model, x) -> float:
    exact = model.cuda()(x.cuda())
    return float((y - exact).norm() / exact.norm())


@torch.no_grad()
def usual_error(y, model, x) -> float:
    """The median image's. Codes and routes are decisions: a value within rounding of its threshold may fall on either side."""
    exact = model.cuda()(x.cuda())
    errors = (y - exact).abs().amax(1) / exact.abs().max()
    assert errors.max() < 0.1
    return float(errors.median())


@pytest.mark.parametrize(("family", "recipe"), PAIRS)
def test_float32_engine_equals_model(family, recipe):
    model, x = converted(family, recipe), images(3)
    assert usual_error(engine_of(model, dtype=torch.float32, batch_size=3)(x), model, x) < 1e-4


@pytest.mark.parametrize("recipe", ADDERS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_networks_of_adders_are_right_step_by_step(family, recipe):
    """Before rounding is amplified."""
    program, x = lower(converted(family, recipe), torch.float32, SIZE, "cuda"), images(3).cuda()
    for step in program.steps:
        expected = step.run(x, Launch("reference"))
        assert (step.run(x, Launch("triton")) - expected).norm() < 1e-3 * expected.norm(), step.name
        x = expected


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("recipe", ("pvt", "msa", "mlp-shift", "ours-quant-moe", "ours-ksh-add-shift"))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_half_engine_is_as_near_as_autocast(family, recipe, dtype):
    model, x = converted(family, recipe), images(16)
    y = engine_of(model, dtype=dtype, batch_size=16)(x)
    model.cuda()
    with torch.autocast("cuda", dtype):
        narrow = model(x.cuda()).float()
    own = error(narrow, model, x)
    assert error(y, model, x) < max(1e-2, 2 * own)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("recipe", ("pvt", "ours-quant-shift", "ours-quant-moe"))
@torch.no_grad()
def test_an_engine_with_whole_mlps_in_one_kernel_is_as_near_as_one_without(monkeypatch, recipe, dtype):
    from shiftaddvit.engine import mlp

    model, x = converted("pvt_v2", recipe, embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), mlp_ratios=(8, 8, 4, 4)), images(16)
    seen, op = set(), mlp.conv_mlp
    monkeypatch.setattr(mlp, "conv_mlp", lambda x, *args: seen.add(x.shape[2]) or op(x, *args))
    errors = []
    for fewest in (10**9, 1):
        monkeypatch.setattr(mlp, "FEWEST_TOKENS", fewest)
        errors.append(usual_error(engine_of(model, dtype=dtype, batch_size=16)(x), model, x))
        assert seen == (set() if fewest > 1 else {32, 64})
    assert errors[1] < max(1e-2, 1.5 * errors[0])


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("recipe", ("ours-quant-shift", "ours-quant-moe"))
@torch.no_grad()
def test_an_engine_with_whole_attention_in_two_kernels_is_as_near_as_one_without(monkeypatch, recipe, dtype):
    from shiftaddvit.engine import attention

    model, x = converted("pvt_v2", recipe, embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), mlp_ratios=(8, 8, 4, 4)), images(16)
    seen, op = set(), attention.attn_block
    monkeypatch.setattr(attention, "attn_block", lambda x, *args, **more: seen.add(x.shape[2]) or op(x, *args, **more))
    errors = []
    for fewest in (None, 1):
        monkeypatch.setattr(attention, "FEWEST_TOKENS", fewest)
        errors.append(usual_error(engine_of(model, dtype=dtype, batch_size=16)(x), model, x))
        assert seen == (set() if fewest is None else {32, 64})
    assert errors[1] < max(1e-2, 1.5 * errors[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_equals_eager_run(family):
    model, x = converted(family, "ours-quant-moe"), images(4)
    engine = engine_of(model, batch_size=4)
    eager = engine.program.run(x.cuda().to(engine.dtype), engine.launch)
    assert torch.equal(engine(x), eager)
    assert torch.equal(engine(x.cuda()), eager)


def test_padded_and_uncaptured_batches_equal_single_images():
    model, x = converted("pvt_v2", "ours-quant-moe"), images(6).cuda()
    engine = engine_of(model, batch_size=(1, 4), dtype=torch.float32)
    alone = torch.cat([engine(x[i : i + 1]) for i in range(6)])
    for count in range(1, 7):
        assert (engine(x[:count]) - alone[:count]).abs().max() < 1e-4 * alone.abs().max()


def test_nothing_reads_memory_that_nobody_wrote():
    for family in FAMILIES:
        program = lower(converted(family, "ours-quant-moe"), torch.bfloat16, SIZE, "cuda")
        x = images(3).cuda().bfloat16()
        clean = program.run(x)
        with poisoned_outputs():
            assert torch.equal(program.run(x), clean)


def test_stale_rows_of_a_padded_batch_reach_nobody():
    engine = engine_of(converted("pvt_v2", "ours-quant-moe"), batch_size=4)
    x = images(1).cuda()
    clean = engine(x)
    engine(torch.full((4, 3, SIZE, SIZE), float("nan"), device="cuda"))
    assert torch.equal(engine(x), clean)


def test_programmatic_launches_change_nothing():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9")
    model, x = converted("pvt_v2", "ours-quant-moe"), images(2)
    plain, overlapped = engine_of(model, batch_size=2, pdl=False), engine_of(model, batch_size=2)
    assert overlapped.launch.pdl and not plain.launch.pdl
    expected = plain(x)
    for _ in range(50):
        assert torch.equal(overlapped(x), expected)


def test_reload_is_seen_by_captured_graphs():
    first, second = converted("pvt_v2", "ours-quant-moe"), randomised(converted("pvt_v2", "ours-quant-moe"))
    engine, x = engine_of(first, batch_size=2, dtype=torch.float32), images(2)
    engine(x)
    engine.reload(second)
    assert usual_error(engine(x), second, x) < 1e-4


def test_batch_dependent_model_is_never_padded():
    model, x = converted("pvt_v2", Recipe(attention="linear", add="quant", binary=BinaryConfig("tensor"))), images(3)
    engine = engine_of(model, batch_size=(4,), dtype=torch.float32)
    assert usual_error(engine(x), model, x) < 1e-4


def test_threads_on_their_own_streams_get_their_own_logits():
    engine = engine_of(converted("pvt_v2", "ours-quant-moe"), batch_size=(1, 2))
    inputs = [images(1 + seed % 2, seed).cuda() for seed in range(8)]
    expected, found = [engine(x) for x in inputs], {}

    def call(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found[i] = engine(inputs[i])
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(8))


def test_two_engines_live_side_by_side():
    one, other = engine_of(converted("pvt_v2", "ours-quant-moe")), engine_of(dense("vit"))
    a, b = one(images(1)), other(images(1))
    assert torch.equal(one(images(1)), a) and torch.equal(other(images(1)), b)


def test_out_of_memory_names_the_batch_that_fits():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2e9 / total))
    try:
        with pytest.raises(UserError, match=r"largest batch that fits is \d+"):
            engine_of(dense("pvt_v2"), batch_size=400_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@torch.no_grad()
def test_bfloat16_engine_agrees_on_the_class():
    """On clear-cut logits; agreement on real images is measured by the benchmark of a trained model."""
    model, x = dense("pvt_v2", num_classes=10), images(512)
    exact, y = model.cuda()(x.cuda()), engine_of(model, batch_size=512)(x)
    top = exact.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1]) > 0.05 * exact.abs().amax(1)
    assert clear.sum() > 50 and (y.argmax(1) == exact.argmax(1))[clear].float().mean() >= 0.999


def test_an_unknown_kind_of_gpu_is_tuned_once_and_stays_right(tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "cache_folder", lambda: tmp_path)
    tiling._table.cache_clear()
    model, x = converted("pvt_v2", "ours-quant-moe").cuda(), images(2).cuda()
    engine = engine_of(model, batch_size=2, dtype=torch.float16, tune_seconds=20)
    (table,) = tmp_path.glob("*.json")
    assert "conv_gelu" in table.read_text()
    before = table.read_text()
    assert torch.equal(engine(x), engine_of(model, batch_size=2, dtype=torch.float16, tune_seconds=20)(x))
    assert table.read_text() == before
    tiling._table.cache_clear()
