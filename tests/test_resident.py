"""The device-resident loader: its operations are Pillow's, its batches depend on seed, epoch, step and rank alone."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from shiftaddvit.data import batch_ops, resident
from shiftaddvit.data.augment import AugmentConfig, parse_rand_augment
from shiftaddvit.data.draws import OPERATIONS, Draws, then_affine, then_linear, draw, strengths
from shiftaddvit.data.order import Blocks, Shard, generator, training_order
from shiftaddvit.data.resident import ResidentLoader
from shiftaddvit.errors import UserError


def pictures(count: int, height: int = 20, width: int = 20, seed: int = 0) -> np.ndarray:
    """Smooth colour gradients with a bright patch, different in each image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [rng.uniform(-3, 3, (3, 2)) for _ in range(count)]
    images = np.stack([127 + 100 * np.sin(3 * (y[..., None] * w[:, 0] + x[..., None] * w[:, 1])) for w in waves])
    return images.round().astype(np.uint8)


def loader(count: int = 50, **changes) -> ResidentLoader:
    settings = {"train": True, "batch_size": 8, "classes": 10, "seed": 3} | changes
    return ResidentLoader(pictures(count), np.arange(count) % 10, **settings)


def augmented(images: np.ndarray, draws: Draws) -> np.ndarray:
    (batch,) = batch_ops.batches(draws, torch.device("cpu"))
    pixels = batch_ops.augment(torch.from_numpy(images), batch, images.shape[1:3], torch.full((1, 3, 1, 1), 127.5))
    return pixels.permute(0, 2, 3, 1).numpy()


def drawn(batch: int, config: AugmentConfig = AugmentConfig.none(), source=(20, 20), size=(20, 20)) -> Draws:
    return draw(np.random.default_rng(0), 1, batch, config, source, size)


@pytest.mark.parametrize(
    ("name", "value", "tolerance"),
    [
        ("brightness", 1.6, 1.0), ("color", 0.3, 1.5), ("color", 1.7, 1.6), ("contrast", 0.4, 1.1), ("contrast", 1.8, 1.5),
        ("invert", 1.0, 0), ("autocontrast", 1.0, 1.0), ("posterize", 3, 0), ("posterize", 1, 0), ("solarize", 100, 0),
        ("solarize_add", 60, 0), ("equalize", 1.0, 0), ("sharpness", 0.2, 1.5), ("sharpness", 1.9, 1.5),
    ],
)  # fmt: skip
def test_colour_operation_equals_pillow(name, value, tolerance):
    images = pictures(6)
    draws = drawn(6)
    if name in batch_ops.OPERATION:
        draws.pointwise[name] = np.full((1, 6), value, np.float32)
    else:
        draws.colour[0] = then_linear(draws.colour[0], name, np.full(6, value))
    apply = getattr(auto_augment, {"autocontrast": "auto_contrast"}.get(name, name))
    arguments = () if name in ("invert", "autocontrast", "equalize") else (value,)
    expected = np.stack([np.asarray(apply(Image.fromarray(image), *arguments)) for image in images])
    assert not np.array_equal(expected, images), "the operation must change these images"
    np.testing.assert_allclose(augmented(images, draws), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (16, 28)])
@pytest.mark.parametrize(("name", "value"), [("rotate", 20.0), ("shear_x", 0.25), ("shear_y", -0.2), ("translate_x", 0.25), ("translate_y", -0.25)])
def test_geometric_operation_equals_pillow(name, value, height, width):
    images = pictures(4, height, width)
    draws = drawn(4, source=(height, width), size=(height, width))
    draws.theta[0] = then_affine(draws.theta[0], name, np.full(4, value), (height, width))
    if name.startswith("shear"):  # Pillow shears about the corner, this package about the centre: move one onto the other
        across, along = (width, height) if name == "shear_x" else (height, width)
        back = np.full(4, value * along / 2 / across)
        draws.theta[0] = then_affine(draws.theta[0], name.replace("shear", "translate"), back, (height, width))
    apply = getattr(auto_augment, {"translate_x": "translate_x_rel", "translate_y": "translate_y_rel"}.get(name, name))
    expected = np.stack([np.asarray(apply(Image.fromarray(i), value, resample=Image.Resampling.BILINEAR)) for i in images])
    inside = np.s_[:, 6:-6, 8:-8]  # borders are filled otherwise
    assert np.abs(images[inside] - expected[inside].astype(float)).mean() > 5, "the operation must change these images"
    assert np.abs(augmented(images, draws)[inside] - expected[inside]).mean() < 1.0


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m5-mstd0"])
def test_strengths_are_those_of_timm(text):
    policy = parse_rand_augment(text)
    level, timm_suffix = np.array([0.3, 0.7]), "Increasing" if policy.increasing else ""
    names = {"posterize": "Posterize", "solarize": "Solarize", "color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
    fixed = {"solarize_add": "SolarizeAdd", "rotate": "Rotate", "shear_x": "ShearX", "translate_y": "TranslateYRel"}
    for name in [*names, *fixed]:
        rule = auto_augment.LEVEL_TO_ARG[names[name] + timm_suffix if name in names else fixed[name]]
        possible = [{round(float(rule(10 * value, {})[0]), 6) for _ in range(30)} for value in level]
        for sign in (1.0, -1.0):
            for got, allowed in zip(strengths(name, level, np.full(2, sign), policy), possible, strict=True):
                assert round(float(got), 6) in allowed, (name, got, allowed)


def test_rand_augment_draws_every_operation_equally_often():
    config = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1-n1-p1", crop="none", flip=0.0)
    draws = drawn(15_000, config)
    for name, values in draws.pointwise.items():
        assert abs((~np.isnan(values)).sum() - 15_000 / len(OPERATIONS)) < 120, name
    moved = (draws.theta != np.eye(2, 3)).any((2, 3)).sum()
    assert abs(moved - 5_000) < 250
    recoloured = (draws.colour != np.eye(3, 7)).any((2, 3)).sum()
    assert abs(recoloured - 4_000) < 250


def test_resized_crop_lies_inside_and_covers_the_share_asked_for():
    config = AugmentConfig(rand_augment=None, scale=(0.2, 0.5))
    theta = drawn(2000, config, (40, 60), (32, 32)).theta[0]
    half = np.abs(np.stack([theta[:, 0, 0], theta[:, 1, 1]], 1))
    assert (np.abs(theta[:, :, 2]) + half <= 1 + 1e-6).all()
    share = half.prod(1)
    assert 0.1999 <= share.min() < 0.21 and 0.48 < share.max() <= 0.5001
    assert abs((theta[:, 0, 0] < 0).mean() - 0.5) < 0.05, "half are flipped"


def test_whole_image_without_augmentation_is_exact():
    images, _ = next(iter(loader(augment=AugmentConfig.none(), mean=(0, 0, 0), std=(1, 1, 1))))
    order = training_order(50, 3, 0, Shard())[:8]
    assert torch.equal((images * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(pictures(50)[order]))


def test_shift_by_whole_pixels_is_exact():
    config = AugmentConfig(crop="pad", pad=3, flip=0.0, rand_augment=None, erasing=0, mixup=0, cutmix=0, label_smoothing=0)
    images, _ = next(iter(loader(augment=config, mean=(0, 0, 0), std=(1, 1, 1))))
    source = torch.from_numpy(pictures(50)[training_order(50, 3, 0, Shard())[:8]])
    padded = torch.nn.functional.pad(source, (0, 0, 3, 3, 3, 3))
    for image, original in zip((images * 255).permute(0, 2, 3, 1), padded, strict=True):
        places = [original[y : y + 20, x : x + 20] for y in range(7) for x in range(7)]
        assert min((image - place).abs().max().item() for place in places) < 0.01


@pytest.mark.parametrize("drawn_together", [1, 16, 8192])
def test_resumed_epoch_equals_uninterrupted_one(drawn_together, monkeypatch):
    monkeypatch.setattr(resident, "IMAGES_DRAWN", drawn_together)
    whole, resumed = loader(), loader()
    whole.set_epoch(2)
    expected = list(whole)
    next(iter(resumed))  # another epoch before must leave no trace
    resumed.set_epoch(2)
    resumed.start_at(3)
    got = list(resumed)
    assert len(expected) == len(whole) == 6 and len(got) == 3
    for (a, s), (b, t) in zip(expected[3:], got, strict=True):
        assert torch.equal(a, b) and torch.equal(s, t)
    assert len(list(resumed)) == 6, "the start is forgotten after one epoch"


def test_epoch_seed_and_step_all_change_the_batch():
    def first(seed: int, epoch: int, step: int = 0) -> torch.Tensor:
        one = loader(count=8, seed=seed)
        one.set_epoch(epoch)
        return next(iter(one))[0].sort(0).values

    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))
    assert not np.array_equal(generator("augment", 0, 0, 0).random(4), generator("augment", 0, 0, 1).random(4))


def test_iterating_leaves_global_random_state_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader())
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_ranks_see_disjoint_images_and_together_all_of_them():
    shards = [training_order(50, 0, 1, Shard(rank, 3)) for rank in range(3)]
    assert [len(s) for s in shards] == [16, 16, 16]
    assert len(np.unique(np.concatenate(shards))) == 48
    evaluated = [loader(train=False, shard=Shard(rank, 3)) for rank in range(3)]
    labels = torch.cat([torch.cat([t for _, t in one]) for one in evaluated])
    assert len(labels) == 50 and torch.equal(labels.bincount(), torch.full((10,), 5))


def test_block_order_visits_each_image_once_and_few_blocks_at_a_time():
    blocks = Blocks(np.arange(0, 1000, 10), together=4)
    order = training_order(1000, 0, 0, Shard(), blocks)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert len(np.unique(order[:40] // 10)) == 4
    assert not np.array_equal(order, training_order(1000, 0, 1, Shard(), blocks))


def test_soft_targets_match_what_was_mixed():
    images = np.zeros((8, 20, 20, 3), np.uint8)
    images[1::2] = 255
    quiet = {"crop": "none", "flip": 0.0, "rand_augment": None, "erasing": 0.0, "label_smoothing": 0.0}
    for alphas in ({"mixup": 1.0, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}):
        config = AugmentConfig(**quiet, **alphas)
        one = ResidentLoader(images, np.arange(8) % 2, train=True, batch_size=8, augment=config, mean=(0, 0, 0), std=(1, 1, 1), seed=1)
        for epoch in range(5):
            one.set_epoch(epoch)
            mixed, targets = next(iter(one))
            torch.testing.assert_close(mixed.mean((1, 2, 3)), targets[:, 1], atol=1e-5, rtol=0, msg="share of white is the share of label 1")
            assert torch.allclose(targets.sum(1), torch.ones(8))


def test_erasing_changes_one_box_in_the_share_of_images_asked_for():
    config = AugmentConfig(crop="none", flip=0, rand_augment=None, erasing=0.5, erasing_mode="const", mixup=0, cutmix=0, label_smoothing=0)
    one = ResidentLoader(np.full((2000, 16, 16, 3), 255, np.uint8), np.zeros(2000, int), train=True, batch_size=2000, augment=config)
    images, _ = next(iter(one))
    erased = (images[:, 0] == 0).flatten(1).sum(1)
    assert abs((erased > 0).float().mean().item() - 0.5) < 0.05
    assert erased.max() <= 0.36 * 256


def test_output_dtype_and_memory_format():
    for train in (True, False):
        images, _ = next(iter(loader(train=train, dtype=torch.bfloat16)))
        assert images.dtype == torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_yields_every_image_in_order():
    one = loader(train=False, image_size=(10, 12))
    batches = list(one)
    assert len(batches) == len(one) == 7
    assert batches[0][0].shape == (8, 3, 10, 12)
    assert torch.equal(torch.cat([t for _, t in batches]), torch.arange(50) % 10)


@pytest.mark.gpu
def test_gpu_draws_what_the_cpu_draws():
    config = AugmentConfig(erasing_mode="const")
    on_cpu, on_gpu = (loader(augment=config, device=device) for device in ("cpu", "cuda"))
    for (a, s), (b, t) in zip(on_cpu, on_gpu, strict=True):
        assert (a - b.cpu()).abs().mean() < 0.01, "a few pixels may fall to the other side of a threshold"
        torch.testing.assert_close(s, t.cpu())


@pytest.mark.gpu
def test_gpu_sustains_a_hundred_thousand_images_a_second():
    images = torch.randint(256, (50_000, 64, 64, 3), dtype=torch.uint8)
    one = ResidentLoader(images, torch.arange(50_000) % 200, train=True, batch_size=1024, device="cuda", dtype=torch.bfloat16)
    list(one)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for epoch in range(3):
        one.set_epoch(epoch)
        for _ in one:
            pass
    torch.cuda.synchronize()
    rate = 3 * len(one) * 1024 / (time.perf_counter() - start)
    print(f"{rate:.0f} images/s")
    assert rate > 100_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 51}, "only 50 training images"),
        ({"classes": 5}, "0 … 4"),
        ({"shard": Shard(1, 8), "batch_size": 7}, "only 6 training images"),
    ],
)
def test_impossible_settings_are_named(change, words):
    with pytest.raises(UserError, match=words):
        loader(**change)


@pytest.mark.parametrize("field", [{"rand_augment": "rand-m9-q3"}, {"flip": 2.0}, {"scale": (0.5, 0.1)}, {"crop": "zoom"}, {"mixup": -1.0}])
def test_bad_augmentation_is_named(field):
    with pytest.raises(UserError, match=next(iter(field))):
        AugmentConfig(**field)
