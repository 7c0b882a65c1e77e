"""Loaders whose batches depend on seed, epoch, rank and index alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import picture, write_folder

from shiftaddvit.data import batch_ops
from shiftaddvit.data.augment import AugmentConfig
from shiftaddvit.data.decode import decode
from shiftaddvit.data.loaders import ImageLoader, build_loaders, training_transform
from shiftaddvit.data.order import Shard
from shiftaddvit.data.sources import open_dataset


def full_loader(root: Path, workers: int = 0, **changes) -> ImageLoader:
    return ImageLoader(open_dataset(root, "train"), train=True, image_size=16, batch_size=4, workers=workers, seed=5, **changes)


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second) > 0
    for (a, s), (b, t) in zip(first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(s, t)


def test_batches_do_not_depend_on_workers_or_global_randomness(tmp_path):
    write_folder(tmp_path)
    alone = list(full_loader(tmp_path))
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    assert_same(alone, list(full_loader(tmp_path, workers=2)))
    assert alone[0][0].shape == (4, 3, 16, 16) and alone[0][1].shape == (4, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_epoch_equals_uninterrupted_one_and_decodes_only_what_is_left(tmp_path, workers):
    write_folder(tmp_path)
    whole, resumed = full_loader(tmp_path), full_loader(tmp_path, workers)
    next(iter(resumed))
    for loader in (whole, resumed):
        loader.set_epoch(3)
    expected = list(whole)
    for index in resumed.order()[:8]:
        Path(resumed.data.store.name(int(index))).unlink()  # would be an error if it were decoded
    resumed.start_at(2)
    assert_same(expected[2:], list(resumed))
    assert len(whole) == len(resumed) == 3 and not resumed.unreadable
    whole.set_epoch(4)
    assert not torch.equal(next(iter(whole))[0], expected[0][0])


def test_iterating_leaves_global_random_state_alone(tmp_path):
    loader = full_loader(write_folder(tmp_path))
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    list(loader)
    decode(loader.data, 16, workers=0)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_ranks_share_images_without_repeating_any(tmp_path):
    write_folder(tmp_path)
    data = open_dataset(tmp_path, "train")
    for train in (True, False):
        orders = [ImageLoader(data, train=train, image_size=16, batch_size=2, workers=0, shard=Shard(r, 3)).order() for r in range(3)]
        assert sorted(np.concatenate(orders).tolist()) == list(range(12)), f"train={train}"


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_every_crop_gives_the_size_asked_for(tmp_path, crop):
    write_folder(tmp_path)
    augment = AugmentConfig(crop=crop, mixup=0, cutmix=0, label_smoothing=0)
    images, targets = next(iter(full_loader(tmp_path, augment=augment)))
    assert images.shape == (4, 3, 16, 16) and targets.dtype == torch.int64


def test_strongest_posterize_is_black_in_both_pipelines(tmp_path):
    transform = training_transform((20, 20), AugmentConfig(rand_augment="rand-m10-n1-p1-inc1", erasing=0), (0, 0, 0), (1, 1, 1))
    policy = next(step for stage in transform.transforms for step in getattr(stage, "transforms", ()) if hasattr(step, "ops"))
    operation = next(op for op in policy.ops if op.name == "PosterizeIncreasing")
    assert not np.asarray(operation(picture(3))).any()
    pixels = torch.rand(1, 3, 4, 4) * 255
    assert not batch_ops.posterize(pixels, torch.zeros(1, 1, 1, 1)).any()


def test_evaluation_sees_whole_images_in_order(tmp_path):
    write_folder(tmp_path)
    _, loader = build_loaders(*[open_dataset(tmp_path, "train")] * 2, image_size=(20, 24), batch_size=4, workers=0, mean=(0, 0, 0), std=(1, 1, 1))
    images = torch.cat([i for i, _ in loader])
    expected = torch.stack([torch.from_numpy(np.array(picture(n))) for n in range(12)]).permute(0, 3, 1, 2)
    torch.testing.assert_close(images * 255, expected.float())
