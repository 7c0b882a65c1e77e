"""Reading images in every layout, and what cannot be read."""

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from data_files import CLASSES, assert_holds, number_of, picture, write_folder, write_parquet, write_tar

from shiftaddvit.data.augment import AugmentConfig
from shiftaddvit.data.decode import decode, decode_parquet
from shiftaddvit.data.images import ImageData, Unreadable, open_rgb
from shiftaddvit.data.loaders import NOT_READ, ImageLoader, build_loaders
from shiftaddvit.data.parquet import ParquetImages
from shiftaddvit.data.resident import build_resident_loaders
from shiftaddvit.data.sources import check_classes, open_dataset
from shiftaddvit.data.tar import expand_braces
from shiftaddvit.errors import UserError


def test_imagenet_folders(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", 6)
    data = open_dataset(tmp_path, "train")
    assert data.classes == CLASSES and data.num_classes == 3
    assert_holds(data, list(range(12)), [0] * 4 + [1] * 4 + [2] * 4)
    assert len(open_dataset(tmp_path, "val")) == 6
    assert len(open_dataset(tmp_path / "train", "val")) == 12, "a folder of class folders serves for any split"


def test_validation_labels_are_those_of_training_when_a_class_is_missing(tmp_path):
    write_folder(tmp_path / "train")
    (tmp_path / "val/cat/deeper").mkdir(parents=True)
    picture(5).save(tmp_path / "val/cat/deeper/x.png")
    assert open_dataset(tmp_path, "val")[0][1] == 2
    (tmp_path / "val/dog").mkdir()
    with pytest.raises(UserError, match="'dog'.*not among the training classes"):
        open_dataset(tmp_path, "val")


@pytest.mark.parametrize("inside", [".", "data"])
def test_parquet_in_hub_layout(tmp_path, inside):
    shards = {"train-00000-of-00002.parquet": 5, "train-00001-of-00002.parquet": 4, "validation-00000-of-00001.parquet": 2, "test-0.parquet": 3}
    write_parquet(tmp_path / inside, shards)
    train = open_dataset(tmp_path, "train")
    assert train.classes == CLASSES
    assert_holds(train, list(range(9)), [n % 3 for n in range(9)])
    assert number_of(train[7][0]) == 7 and number_of(train[0][0]) == 0, "any order"
    assert_holds(open_dataset(tmp_path, "val"), [9, 10], [0, 1])
    assert_holds(open_dataset(tmp_path, "test"), [11, 12, 13], [2, 0, 1])


def test_parquet_reads_the_same_with_a_cache_of_one_row_group(tmp_path):
    write_parquet(tmp_path, {"train.parquet": 10})
    store = ParquetImages([tmp_path / "train.parquet"], cache_bytes=1)
    assert store.blocks.starts.tolist() == [0, 3, 6, 9] and store.blocks.together == 1
    assert [number_of(store.image(i)) for i in (9, 0, 5, 3, 9)] == [9, 0, 5, 3, 9]
    assert len(store._cache) == 1
    loader = ImageLoader(ImageData(store), train=True, image_size=20, batch_size=2, workers=0)
    assert sorted(loader.order().tolist()) == list(range(10))


def test_class_names_come_from_a_listing_beside_the_files(tmp_path):
    write_parquet(tmp_path, {"train-0.parquet": 3, "val-0.parquet": 1}, names=False)
    assert open_dataset(tmp_path, "train").classes is None
    (tmp_path / "classes.txt").write_text("n01\tant\nn02\tbee\nn03\tcat\nn04\tdog\n")
    data = open_dataset(tmp_path, "val")
    assert data.classes == [*CLASSES, "dog"] and data.num_classes == 4


def test_webdataset_shards_by_folder_pattern_and_file(tmp_path):
    write_tar(tmp_path / "train-000.tar", range(0, 5))
    write_tar(tmp_path / "train-001.tar", range(5, 9))
    write_tar(tmp_path / "val-000.tar", range(9, 11), kind="png")
    assert_holds(open_dataset(tmp_path, "train"), list(range(9)), [n % 3 for n in range(9)])
    assert_holds(open_dataset(tmp_path, "val"), [9, 10], [0, 1])
    assert len(open_dataset(str(tmp_path / "train-{000..001}.tar"), "train")) == 9
    assert len(open_dataset(tmp_path / "train-001.tar", "val")) == 4


def test_braces_stand_for_ranges_and_lists():
    assert expand_braces("a-{008..010}-{x,y}.tar") == [f"a-{n}-{c}.tar" for n in ("008", "009", "010") for c in "xy"]


def test_timm_names_read_what_is_there_and_download_nothing(tmp_path):
    with pytest.raises(UserError, match="allow the download"):
        open_dataset("torch/cifar10", "train", root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="did you mean 'torch/cifar10'"):
        open_dataset("torch/cifar11", "train", root=tmp_path)
    with pytest.raises(UserError, match="streams"):
        open_dataset("tfds/imagenet", "train")


def broken(tmp_path: Path) -> dict[str, tuple[object, str]]:
    """Wrong inputs by name, with a part of the message."""
    write_folder(tmp_path / "onlytrain/train")
    for name in ("empty", "flat", "hollow/ant"):
        (tmp_path / name).mkdir(parents=True)
    picture(0).save(tmp_path / "flat/0.png")
    (tmp_path / "text.csv").write_text("a")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"img": [1], "label": [1]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}], "label": [-1]}), tmp_path / "unlabelled.parquet")
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}], "label": ["ant"]}), tmp_path / "words.parquet")
    write_tar(tmp_path / "whole.tar", range(4))
    whole = (tmp_path / "whole.tar").read_bytes()
    for cut in range(0, len(whole.rstrip(b"\0")) + 512, 512):
        (tmp_path / f"cut-{cut}.tar").write_bytes(whole[:cut])
    write_tar(tmp_path / "nolabel.tar", range(2), labels=False)
    return {
        "unknown": ("no/such/place", "no such file or folder"),
        "empty": (tmp_path / "empty", "is empty"),
        "flat": (tmp_path / "flat", "1 images but no class folders"),
        "hollow": (tmp_path / "hollow", "hold no images"),
        "split": (tmp_path / "onlytrain", "no split 'val'; it has train"),
        "kind": (tmp_path / "text.csv", "is a .csv"),
        "parquet": (tmp_path / "bad.parquet", "not a Parquet file"),
        "columns": (tmp_path / "columns.parquet", "has columns img, label"),
        "unlabelled": (tmp_path / "unlabelled.parquet", "unlabelled"),
        "words": (tmp_path / "words.parquet", "whole numbers"),
        "nolabel": (tmp_path / "nolabel.tar", "0000.cls"),
        "shard": (str(tmp_path / "s-{0..1}.tar"), "s-0.tar: no such file"),
    }


def test_wrong_input_gets_one_line_that_names_it(tmp_path):
    for name, (path, words) in broken(tmp_path).items():
        with pytest.raises(UserError) as caught:
            open_dataset(path, "val")
        assert words in str(caught.value), name
        assert "\n" not in str(caught.value), name
    for cut in tmp_path.glob("cut-*.tar"):
        with pytest.raises(UserError, match="not a complete|beside it"):
            open_dataset(cut, "val")


def test_class_count_must_fit_the_model(tmp_path):
    data = open_dataset(write_folder(tmp_path), "train")
    check_classes(data, 3)
    with pytest.raises(UserError, match="3 classes but the model 10 outputs"):
        check_classes(data, 10)


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Twelve images of which number 5 is cut short and number 6 is no image."""
    write_folder(tmp_path)
    files = sorted(tmp_path.rglob("*.png"))
    files[5].write_bytes(files[5].read_bytes()[:200])
    files[6].write_bytes(b"nothing")
    return tmp_path


def test_unreadable_image_is_replaced_by_the_next_and_remembered(damaged):
    data = open_dataset(damaged, "train")
    assert number_of(data[5][0]) == 7 and data[5][1] == data.labels[7]
    assert sorted(data.unreadable) == [5, 6] and "05.png" in data.unreadable[5]
    with pytest.raises(Unreadable, match="05.png"):
        open_dataset(damaged, "train", strict=True)[5]


def test_bytes_in_memory_that_are_no_image_are_not_named_by_their_address():
    class Broken:
        labels, classes, blocks = np.zeros(1, dtype=np.int64), None, None

        def image(self, index: int) -> Image.Image:
            return open_rgb(b"broken")

        def name(self, index: int) -> str:
            return "shard.tar:0001"

    with pytest.raises(Unreadable, match="^cannot read image shard.tar:0001: no image of a known format$"):
        ImageData(Broken()).read(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_count_unreadable_images_and_report_once(damaged, workers):
    train, val = (open_dataset(damaged, "train") for _ in range(2))
    loaders = build_loaders(train, val, image_size=16, batch_size=4, workers=workers, augment=AugmentConfig.none())
    for loader, words in zip(loaders, ("replaced", "left out"), strict=True):
        with pytest.warns(UserWarning, match=f"2 of 12 images.*{words}.*png"):
            targets = torch.cat([t for _, t in loader])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list(loader)
        assert sorted(loader.unreadable) == [5, 6]
        assert (targets == NOT_READ).sum() == (0 if loader.train else 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_loader_stops_with_one_line(damaged, workers):
    loader = ImageLoader(open_dataset(damaged, "train", strict=True), train=False, image_size=16, batch_size=4, workers=workers)
    with pytest.raises(Unreadable, match="05.png") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_nothing_readable_stops(tmp_path):
    (tmp_path / "ant").mkdir()
    for number in range(4):
        (tmp_path / f"ant/{number}.png").write_bytes(b"no")
    data = open_dataset(tmp_path, "train")
    with pytest.raises(Unreadable, match="nor can any"):
        list(ImageLoader(data, train=True, image_size=16, batch_size=2, workers=0))
    with pytest.raises(Unreadable, match="none of the 4"):
        decode(data, 16, workers=0)


def test_decoding_is_exact_in_order_and_cached(tmp_path):
    write_parquet(tmp_path / "p", {"train-0.parquet": 5, "train-1.parquet": 4})
    pixels, labels = decode_parquet(sorted((tmp_path / "p").glob("*")), (20, 24), workers=2)
    np.testing.assert_array_equal(pixels, np.stack([np.asarray(picture(n)) for n in range(9)]))
    assert labels.tolist() == [n % 3 for n in range(9)]
    data = open_dataset(tmp_path / "p", "train")
    cache = tmp_path / "cache/train.npy"
    first = decode(data, 16, workers=0, cache=cache)
    data.store.image = None  # a second decoding would fail
    for a, b in zip(first, decode(data, 16, workers=0, cache=cache), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="20×20"):
        decode(data, 20, workers=0, cache=cache)
    other = open_dataset(write_folder(tmp_path / "f"), "train")
    with pytest.raises(UserError, match="other images"):
        decode(other, 16, workers=0, cache=cache)


def test_decoding_leaves_out_unreadable_images(damaged):
    data = open_dataset(damaged, "train")
    with pytest.warns(UserWarning, match="2 of 12.*left out.*05.png"):
        pixels, labels = decode(data, 16, workers=0)
    assert len(pixels) == len(labels) == 10
    with pytest.raises(Unreadable, match="05.png"):
        decode(open_dataset(damaged, "train", strict=True), 16, workers=0)


def test_resident_loaders_from_data(tmp_path):
    data = open_dataset(write_folder(tmp_path / "d"), "train")
    train, val = build_resident_loaders(data, data, image_size=16, batch_size=4, device="cpu", workers=0, cache=tmp_path / "c")
    assert next(iter(train))[1].shape == (4, 3)
    assert torch.cat([t for _, t in val]).tolist() == data.labels.tolist()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["train-16x16.npy", "val-16x16.npy"]
    with pytest.raises(UserError, match="24 images of 9999999×16 are too many"):
        build_resident_loaders(data, data, image_size=(9999999, 16), batch_size=4, device="cpu")


def test_identity_follows_the_images_and_not_the_place(tmp_path):
    for place, shift in (("a", 0), ("b", 0), ("c", 1)):
        write_folder(tmp_path / place / "folder", 12 + shift)
        write_parquet(tmp_path / place / "parquet", {f"train-{shift}.parquet": 12})
        write_tar(tmp_path / place / "tar" / "train.tar", range(shift, 12 + shift))
    for kind in ("folder", "parquet", "tar"):
        first, again, other = (open_dataset(tmp_path / place / kind, "train").identity() for place in "abc")
        assert first == again != other and first["number"] == 12, kind
        assert first["classes"] == (None if kind == "tar" else CLASSES)


def test_class_folders_without_images_are_named(tmp_path):
    write_folder(tmp_path / "some")
    for name in ("dog", "elk"):
        (tmp_path / "some" / name).mkdir()
    with pytest.warns(UserWarning, match="class folders 'dog', 'elk' hold no images"):
        assert open_dataset(tmp_path / "some", "train").num_classes == 5
    (tmp_path / "some" / "elk").rmdir()
    with pytest.warns(UserWarning, match="class folder 'dog' holds no images"):
        open_dataset(tmp_path / "some", "train")
    (tmp_path / "some" / "dog").rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_dataset(tmp_path / "some", "train")
