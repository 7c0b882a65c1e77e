"""Accuracy is counted right, each image once, and two models are compared image by image."""

import json
import math
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from shiftaddvit.data.loaders import NOT_READ
from shiftaddvit.data.order import Shard
from shiftaddvit.data.resident import ResidentLoader
from shiftaddvit.errors import UserError
from shiftaddvit.evaluation import Evaluation, compare, evaluate
from shiftaddvit.evaluation.accuracy import mcnemar, paired_interval, wilson_interval


class Reader(nn.Module):
    """Returns the logits that were written into the image: image[0, 0, :classes]."""

    def __init__(self, classes: int, as_tuple: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.classes, self.as_tuple = classes, as_tuple

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.scale * x[:, 0, 0, : self.classes]
        return (logits, logits.flip(1)) if self.as_tuple else logits


def written(count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 2, classes, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


def batches(images: Tensor, labels: Tensor, size: int = 7) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), size)


def outcome(correct: list[bool]) -> Evaluation:
    count = len(correct)
    images = torch.zeros(count, 3, 1, 2)
    images[torch.arange(count), 0, 0, (~torch.tensor(correct)).long()] = 1.0
    return evaluate(Reader(2), batches(images, torch.zeros(count).long()), progress=False)


@pytest.mark.parametrize("classes", [2, 4, 5, 9])
def test_counts_equal_those_of_a_loop_over_images(classes):
    images, labels = written(30, classes)
    got = evaluate(Reader(classes), batches(images, labels), progress=False)
    first = fifth = loss = 0.0
    for image, label in zip(images, labels, strict=True):
        logits = image[0, 0]
        rank = int((logits > logits[label]).sum())
        first, fifth = first + (rank < 1), fifth + (rank < 5)
        loss += -(logits[label] - logits.logsumexp(0)).item()
    assert got.images == 30 and got.unreadable == 0
    assert got.top1 == pytest.approx(100 * first / 30)
    assert got.top5 == pytest.approx(100 * fifth / 30)
    assert got.loss == pytest.approx(loss / 30, rel=1e-6)
    assert got.correct.sum() == first
    assert (got.top5 == 100) == (classes <= 5)


def test_the_first_of_a_tuple_is_read():
    images, labels = written(20, 9)
    plain, tupled = (evaluate(Reader(9, flag), batches(images, labels), progress=False) for flag in (False, True))
    assert torch.equal(plain.correct, tupled.correct)


def test_images_that_could_not_be_read_are_left_out():
    images, labels = written(20, 3)
    whole = evaluate(Reader(3), batches(images, labels), progress=False)
    labels[[3, 8]] = NOT_READ
    images[3] = float("nan")
    part = evaluate(Reader(3), batches(images, labels), progress=False)
    assert (part.images, part.unreadable) == (18, 2)
    kept = [i for i in range(20) if i not in (3, 8)]
    assert torch.equal(part.correct, whole.correct[kept])


def test_modes_and_parameters_are_left_as_they_were():
    model = nn.Sequential(nn.Dropout(0.5), Reader(3)).train()
    model[1].eval()
    images, labels = written(40, 3)
    got = evaluate(model, batches(images, labels), progress=False)
    assert [m.training for m in model.modules()] == [True, True, False]
    assert torch.equal(got.correct, evaluate(model[1], batches(images, labels), progress=False).correct), "dropout was off"
    assert model[1].scale.requires_grad


def test_autocast_type_is_used_and_noted():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    seen = []
    model[1].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    images, labels = torch.randn(10, 3, 2, 2).bfloat16(), torch.randint(4, (10,))
    assert evaluate(model, batches(images, labels), amp_dtype=torch.bfloat16, progress=False).conditions["dtype"] == "bfloat16"
    assert evaluate(model, batches(images, labels), progress=False).conditions["dtype"] == "float32"
    assert set(seen[:2]) == {torch.bfloat16} and set(seen[2:]) == {torch.float32}


def test_result_survives_json():
    images, labels = written(21, 4)
    first = evaluate(Reader(4), batches(images, labels), progress=False)
    values = json.loads(json.dumps(first.to_json(), allow_nan=False))
    again = Evaluation.from_json(values)
    assert torch.equal(again.correct, first.correct) and again.interval95 == first.interval95
    assert again.to_json() == values
    with pytest.raises(UserError, match="not an evaluation"):
        Evaluation.from_json({"top1": 3})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda images, labels: (images[:0], labels[:0]), "no image"),
        (lambda images, labels: (images * float("nan"), labels), "20 of 20 images is not finite"),
        (lambda images, labels: (images, labels + 3), "label 5: the model has no such output"),
        (lambda images, labels: (images, labels * 0 + NOT_READ), "20 could not be read"),
    ],
)
def test_what_cannot_be_evaluated_is_named(damage, words):
    with pytest.raises(UserError, match=words):
        evaluate(Reader(3), batches(*damage(*written(20, 3))), progress=False)


@given(right=st.integers(0, 500), more=st.integers(0, 500))
@settings(max_examples=50, deadline=None)
def test_wilson_interval_is_that_of_scipy(right, more):
    images = max(1, right + more)
    expected = stats.binomtest(right, images).proportion_ci(0.95, "wilson")
    assert wilson_interval(right, images) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-4)


@given(first=st.integers(0, 2000), second=st.integers(0, 2000))
@settings(max_examples=50, deadline=None)
def test_mcnemar_is_the_exact_binomial_test(first, second):
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_comparison_counts_what_only_one_model_gets_right():
    first = outcome([True] * 50 + [True] * 10 + [False] * 4 + [False] * 36)
    second = outcome([True] * 50 + [False] * 10 + [True] * 4 + [False] * 36)
    paired = compare(first, second)
    assert (paired.only_first, paired.only_second, paired.images) == (10, 4, 100)
    assert paired.difference == pytest.approx(6.0) == first.top1 - second.top1
    assert paired.p_value == pytest.approx(stats.binomtest(10, 14).pvalue)
    back = compare(second, first)
    assert back.difference == -paired.difference
    assert back.interval95 == pytest.approx([-paired.interval95[1], -paired.interval95[0]])
    json.dumps(paired.to_json())


def test_interval_leaves_zero_out_exactly_where_the_exact_test_says_so():
    low, high = paired_interval(6, 15, 60)
    assert mcnemar(6, 15) > 0.05 and low < -15 < 0 < high
    for images, most in ((60, 30), (2000, 90), (50_000, 60)):
        for first in range(most):
            for second in range(first + 1):
                low, high = paired_interval(first, second, images)
                assert (low > 0) == (mcnemar(first, second) < 0.05), (first, second, images)
                assert low <= 100 * (first - second) / images <= high


@given(first=st.integers(0, 3000), second=st.integers(0, 3000))
@settings(max_examples=50, deadline=None)
def test_interval_holds_that_of_the_exact_test(first, second):
    discordant = first + second
    low, high = paired_interval(first, second, 10_000)
    exact = stats.binomtest(first, discordant).proportion_ci(0.95, "exact") if discordant else None
    if exact is not None:
        scale = discordant / 100
        assert low <= scale * (2 * exact.low - 1) + 1e-6 and high >= scale * (2 * exact.high - 1) - 1e-6
        half = 0.5 * (high - low)
        assert half < 1.1 * (196 * np.sqrt(discordant + 1) / 10_000) + 0.02, "not much wider than it must be"


def test_paired_interval_agrees_with_the_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.random(4000) < 0.55
    other = np.where(rng.random(4000) < 0.06, ~base, base)
    first, second = outcome(base.tolist()), outcome(other.tolist())
    got = compare(first, second).interval95
    gap = base.astype(float) - other
    drawn = 100 * gap[rng.integers(4000, size=(2000, 4000))].mean(1)
    assert got == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.08)
    assert got[1] - got[0] < 0.5 * (first.interval95[1] - first.interval95[0]), "pairing is what makes it narrow"


def test_identical_models_differ_by_nothing_but_not_with_certainty():
    same = outcome([True, False] * 50)
    paired = compare(same, same)
    assert paired.difference == 0 and paired.p_value == 1
    assert paired.interval95[0] < 0 < paired.interval95[1] < 5


def test_other_images_are_not_paired():
    images, labels = written(20, 3)
    one = evaluate(Reader(3), batches(images, labels), progress=False)
    for other in (torch.arange(19, -1, -1), torch.arange(19)):
        with pytest.raises(UserError, match="same order"):
            compare(one, evaluate(Reader(3), batches(images[other], labels[other]), progress=False))


def _evaluate_shared(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    images, labels = written(23, 3)
    data = TensorDataset(images, labels)
    resident = (torch.arange(23 * 12) % 251).byte().view(23, 2, 2, 3), labels
    loaders = {
        "padded sampler": DataLoader(data, 5, sampler=DistributedSampler(data, shuffle=True)),
        "accelerate": Accelerator(cpu=True).prepare_data_loader(DataLoader(data, 5)),
        "not divided": DataLoader(data, 5),
    }
    results = {name: evaluate(Reader(3), loader, progress=False).to_json() for name, loader in loaders.items()}
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    torch.manual_seed(0)
    nn.init.normal_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    for name, shard in (("resident", Shard(rank, world)), ("resident whole", Shard())):
        loader = ResidentLoader(*resident, train=False, batch_size=5, shard=shard, classes=3)
        results[name] = evaluate(model, loader, progress=False).to_json()
    try:
        evaluate(Reader(3), DataLoader(data, 5, shuffle=True), progress=False)
    except UserError as error:
        results["shuffled"] = str(error)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    torch.distributed.destroy_process_group()


def test_processes_count_each_image_once(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(_evaluate_shared, (2, port, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    alone = evaluate(Reader(3), batches(*written(23, 3)), progress=False)
    for found in ranks:
        for name in ("padded sampler", "accelerate", "not divided"):
            assert found[name]["correct"] == alone.to_json()["correct"], name
            assert math.isclose(found[name]["loss"], alone.loss, rel_tol=1e-6), name
            assert found[name]["labels_digest"] == alone.labels_digest, name
            assert found[name]["images"] == 23, name
        assert found["resident"]["correct"] == found["resident whole"]["correct"]
        assert found["resident"]["images"] == 23
        assert "shuffle=False" in found["shuffled"]
