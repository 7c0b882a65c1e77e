"""The card beside a view model: what a run knows, and nothing that it does not know."""

import re
from dataclasses import replace

import nvs_synthetic
import pytest
import torch
import yaml

from shiftaddvit.model_card import is_untouched
from shiftaddvit.nvs.card import ViewFacts
from shiftaddvit.nvs.gnt import GNT, GNTConfig
from shiftaddvit.nvs.nerf import NeRF, NeRFConfig
from shiftaddvit.nvs.pictures import write_png
from shiftaddvit.nvs.scene import normalise
from shiftaddvit.nvs.state import load_model, read_header, save_model
from shiftaddvit.nvs.train import NvsTrainConfig, train
from shiftaddvit.nvs.transforms_json import write_transforms
from shiftaddvit.reparam import reparameterize

torch.set_num_threads(1)

TINY = GNTConfig(width=16, depth=1, samples=4, sources=2, feature_channels=4, feature_base=4)
SHORT = NvsTrainConfig(steps=3, rays=16, check_every=3, warmup_steps=1, source_jitter=0, measure_latency=False)


def synthetic(**more):
    return normalise(nvs_synthetic.make_scene(views=6, width=36, height=32, **more))


def tiny(recipe: str | None = None):
    torch.manual_seed(0)
    return GNT(TINY) if recipe is None else reparameterize(GNT(TINY), recipe)


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


def test_the_card_of_a_run_says_scene_size_budget_recipe_and_psnr(tmp_path):
    result = train(tiny("gnt-add-shift-moe"), [synthetic(test=(0, 3))], tmp_path, SHORT, show=False)
    text = (tmp_path / "README.md").read_text()
    assert is_untouched(text)
    assert (
        f"PSNR **{result.held_out_psnr:.2f} dB**, mean over 2 held-out views of synthetic at 36×32, on 2,304 fixed pixels of them; fp32 on " in text
    )
    assert "| scenes | synthetic |" in text and "| training | 3 steps of 16 rays in " in text and "on 4 views of 36×32 pixels |" in text
    assert "| recipe | gnt-add-shift-moe: attention = linear, add = quant, attn_linear = shift, mlp = moe |" in text and "mixture of experts" in text
    assert f"| file | {(tmp_path / 'model.safetensors').stat().st_size:,} bytes; latent" in text
    head = front_matter(text)
    assert {"gnt", "gnt-add-shift-moe", "novel-view-synthesis"} <= set(head["tags"]) and head["datasets"] == ["synthetic"]
    metric = head["model-index"][0]["results"][0]["metrics"][0]
    assert metric["value"] == round(result.held_out_psnr, 2) and metric["verified"] is False


def test_every_scene_is_named_and_their_views_counted(tmp_path):
    scenes = [synthetic(test=(0,)), replace(synthetic(test=()), name="fern")]
    train(tiny(), scenes, tmp_path, replace(SHORT, steps=1), show=False)
    text = (tmp_path / "README.md").read_text()
    assert "| scenes | synthetic, fern |" in text and "on 11 views of" in text and "mean over 1 held-out view of synthetic" in text


def test_without_held_out_views_no_quality_is_claimed(tmp_path):
    train(tiny(), [synthetic(test=())], tmp_path, SHORT, show=False)
    text = (tmp_path / "README.md").read_text()
    assert "Not measured" in text and "model-index" not in front_matter(text)


def test_weights_that_were_trained_on_since_the_last_look_have_no_psnr(tmp_path):
    config = replace(SHORT, steps=4, check_every=2, checkpoint_minutes=1e-9)
    measured = []

    class Watched(GNT):
        def encode(self, images):
            if (tmp_path / "model.safetensors").exists():
                facts = ViewFacts.from_json(read_header(tmp_path / "model.safetensors")["trained"])
                measured.append((facts.steps, facts.psnr is not None))
            return super().encode(images)

    torch.manual_seed(0)
    train(Watched(TINY), [synthetic(test=(0,))], tmp_path, config, show=False)
    assert set(measured) == {(1, False), (2, True), (3, False)}
    assert ViewFacts.from_json(read_header(tmp_path / "model.safetensors")["trained"]).psnr is not None


def test_its_lines_render_a_picture(tmp_path, monkeypatch):
    scene = nvs_synthetic.make_scene(views=6, width=36, height=32)
    for name, image in zip(scene.names, scene.images, strict=True):
        write_png(tmp_path / "photos" / "images" / name, image)
    write_transforms(tmp_path / "photos", scene)
    train(tiny("gnt-shift"), [normalise(scene)], tmp_path / "run", SHORT, show=False)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path / "run")
    names = {"folder": tmp_path / "photos"}
    exec(code, names)
    assert names["picture"].rgb.shape == (32, 36, 3) and names["picture"].depth.shape == (32, 36)


def test_facts_stay_with_a_packed_copy(tmp_path):
    train(tiny("gnt-add-shift"), [synthetic(test=(0,))], tmp_path, SHORT, show=False)
    model = load_model(tmp_path / "model.safetensors")
    assert save_model(model, tmp_path / "packed.safetensors", model.trained, packed=True) == tmp_path / "packed.md"
    text = (tmp_path / "packed.md").read_text()
    assert "packed: shift weights as integer codes" in text and f"**{model.trained.psnr:.2f} dB**" in text
    assert load_model(tmp_path / "packed.safetensors").trained == model.trained


@pytest.mark.parametrize("model", [tiny, lambda: NeRF(NeRFConfig(width=16, samples=4, fine_samples=4))], ids=["gnt", "nerf"])
def test_a_model_of_unknown_origin_claims_nothing(model, tmp_path):
    save_model(model(), tmp_path / "x.safetensors")
    text = (tmp_path / "x.md").read_text()
    assert "| training | not recorded |" in text and "| scenes | not recorded |" in text and "Not measured" in text
    assert "shift" not in text.replace("shiftaddvit", "")


def test_a_readme_of_the_users_is_never_touched(tmp_path):
    (tmp_path / "README.md").write_text("# my photos\n")
    train(tiny(), [synthetic()], tmp_path, SHORT, show=False)
    assert (tmp_path / "README.md").read_text() == "# my photos\n" and is_untouched((tmp_path / "model.card.md").read_text())
