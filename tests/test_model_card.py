"""The card beside a saved model: what it says, where it goes, and whose files it leaves alone."""

import re

import pytest
import torch
import yaml
from typer.testing import CliRunner

from shiftaddvit.cli.main import app
from shiftaddvit.model_card import ModelFacts, converted, is_untouched
from shiftaddvit.reparam import recipes, reparameterize
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.serialization import load, read_metadata, save

SMALL = {"num_classes": 5, "embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
EVALUATION = {
    "top1": 81.25, "top5": 99.0, "loss": 0.6, "interval95": [79.0, 83.3], "images": 1200, "correct": "…",
    "conditions": {"device": "some CPU", "dtype": "float32", "batch": 50, "torch": "2.11.0", "time": "2026-11-01"},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return reparameterize(create_model("pvt_v2_b0", SMALL), recipes["ours-quant-moe"])


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def test_the_card_says_what_is_known(model, tmp_path):
    facts = ModelFacts.of_evaluation(EVALUATION, data="My Birds", base="mine.pth", license="mit", training="two stages")
    report = save(model, tmp_path / "birds.safetensors", facts=facts)
    assert report.card == str(tmp_path / "birds.md")
    text = (tmp_path / "birds.md").read_text()
    assert "**81.25 %** (95 % interval 79.00 … 83.30)" in text and "1,200 images of My Birds" in text and "float32, batch 50 on some CPU" in text
    assert f"{report.bytes:,} bytes" in text and "mixture of experts" in text and "two stages" in text
    head = front_matter(text)
    assert (
        head["license"] == "mit" and {"pvt_v2_b0", "ours-quant-moe", "image-classification"} <= set(head["tags"]) and head["datasets"] == ["my-birds"]
    )
    metric = head["model-index"][0]["results"][0]["metrics"][0]
    assert metric["type"] == "accuracy" and metric["value"] == 81.25 and metric["verified"] is False


def test_the_card_claims_nothing_that_is_not_known(model, tmp_path):
    save(model, tmp_path / "x.safetensors")
    text = (tmp_path / "x.md").read_text()
    assert "Not measured." in text and "Not computed" in text and "model-index" not in front_matter(text) and "%" not in text.split("## Accuracy")[1]


def test_its_three_lines_load_the_model(model, tmp_path, monkeypatch):
    save(model, tmp_path / "it's.safetensors")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "it's.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.zeros(1, 3, 32, 32)}
    exec(code, names)
    assert names["logits"].shape == (1, 5)


def test_hub_layout_gets_a_readme(model, tmp_path):
    assert save(model, tmp_path / "model.safetensors").card == str(tmp_path / "README.md")


def test_ours_is_renewed_and_a_changed_one_is_left_alone(model, tmp_path):
    path, card = tmp_path / "a.safetensors", tmp_path / "a.md"
    save(model, path)
    save(model, path, facts=ModelFacts(data="new data", training="renewed"))
    assert "renewed" in card.read_text() and is_untouched(card.read_text())
    card.write_text(card.read_text().replace("Not measured.", "I measured 90 %."))
    second = save(model, path)
    assert "I measured 90 %." in card.read_text() and second.card == str(tmp_path / "a.card.md")
    (tmp_path / "a.card.md").write_text("mine too")
    assert save(model, path).card is None and (tmp_path / "a.card.md").read_text() == "mine too"


def test_a_readme_of_the_users_is_never_touched(model, tmp_path):
    (tmp_path / "README.md").write_text("# my project\n")
    assert save(model, tmp_path / "model.safetensors").card == str(tmp_path / "model.card.md")
    assert (tmp_path / "README.md").read_text() == "# my project\n"


def test_texts_cannot_break_the_front_matter_or_the_table(model, tmp_path):
    facts = ModelFacts(data='x"\n---\nlicense: evil', base="a | b <script>", license="apache-2.0")
    save(model, tmp_path / "x.safetensors", facts=facts)
    text = (tmp_path / "x.md").read_text()
    assert front_matter(text)["license"] == "apache-2.0" and "a \\| b &lt;script>" in text and "<script" not in text


def test_layers_are_counted_by_what_they_compute_with(model):
    assert converted(create_model("pvt_v2_b0", SMALL)) == "11 × linear layer left multiplying"
    assert re.fullmatch(r"\d+ × mixture of experts, \d+ × addition over binary codes, 1 × linear layer left multiplying", converted(model))


def test_a_packed_copy_keeps_the_facts_and_a_rounded_one_loses_the_accuracy(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save(model, path, facts=ModelFacts.of_evaluation(EVALUATION, data="My Birds", base="mine.pth"))
    for name, extra, known in (("packed", [], True), ("half", ["--half"], False)):
        outcome = CliRunner().invoke(app, ["convert", str(path), "--packed", *extra, "--output", str(tmp_path / f"{name}.safetensors")])
        assert outcome.exit_code == 0, outcome.output
        assert f"{name}.md" in outcome.output.replace("\n", "")
        facts = ModelFacts.from_metadata(read_metadata(tmp_path / f"{name}.safetensors"))
        assert facts.base == "mine.pth" and bool(facts.evaluation) == known
        assert ("81.25" in (tmp_path / f"{name}.md").read_text()) == known
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(path)(images), load(tmp_path / "packed.safetensors")(images))
