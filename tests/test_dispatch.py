"""Dispatch records: the experts that the model chose, token by token, over pictures as the model sees them."""

import io
import json
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shiftaddvit.cli.main import app
from shiftaddvit.errors import UserError
from shiftaddvit.evaluation.dispatch import dispatch, token_grid
from shiftaddvit.layers.router import record_routing
from shiftaddvit.reparam import recipes, reparameterize
from shiftaddvit.reparam.architecture import create_model
from shiftaddvit.report.reading import read_results
from shiftaddvit.serialization import save

SMALL = {"num_classes": 5, "embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return reparameterize(create_model("pvt_v2_b0", SMALL), recipes["ours-quant-moe"]).eval()


def test_records_are_what_the_routers_decide(model):
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pictures = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    model.train()
    found = dispatch(model, images, pictures, ["a", "b"], ["x", None], list("vwxyz"))
    assert model.training
    model.eval()
    with record_routing(model) as routing, torch.no_grad():
        logits = model(images)
    assert [layer.name for layer in found.layers] == list(routing)
    for layer in found.layers:
        index = routing[layer.name].index
        assert layer.share[1] == pytest.approx(index.float().mean().item()) and layer.tokens == index.shape[1]
        assert found.pictures[1].experts[layer.name] == "".join(map(str, index[1].tolist()))
    assert found.pictures[0].predicted == "vwxyz"[int(logits[0].argmax())]
    assert found.layers[0].grid == (8, 8)


@pytest.mark.parametrize(
    ("tokens", "size", "prefix", "expected"),
    [(64, (32, 32), 0, ((8, 8), 0)), (197, (224, 224), 1, ((14, 14), 1)), (198, (224, 224), 2, ((14, 14), 2)), (50, (224, 224), 0, ((7, 7), 1)),
     (48, (96, 128), 0, ((6, 8), 0)), (51, (224, 224), 0, (None, 0))],
)  # fmt: skip
def test_tokens_lie_on_a_grid_of_the_images_form(tokens, size, prefix, expected):
    assert token_grid(tokens, size, prefix) == expected


def test_a_model_without_mixtures_is_refused():
    with pytest.raises(UserError, match="no mixture of experts"):
        dispatch(create_model("pvt_v2_b0", SMALL), torch.zeros(1, 3, 32, 32), torch.zeros(0, 32, 32, 3, dtype=torch.uint8), [])


def test_the_command_writes_what_the_report_reads(model, tmp_path):
    torch.manual_seed(0)
    save(
        model,
        tmp_path / "m.safetensors",
        metadata={"shiftaddvit.images": json.dumps({"image_size": [32, 32], "crop_pct": 1.0, "classes": list("vwxyz")})},
    )
    for name, value in (("v", 40), ("w", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.full((32, 32, 3), value + number, dtype=np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
    target = tmp_path / "out" / "dispatch.json"
    arguments = ["dispatch", str(tmp_path / "m.safetensors"), str(tmp_path / "images"), "--output", str(target), "--show", "2"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    found = read_results([target]).dispatches[0]
    assert found.title == "pvt_v2_b0, ours-quant-moe" and found.images == 4 and [picture.label for picture in found.pictures] == ["v", "w"]
    # Normalising and back gives the picture itself.
    shown = [np.asarray(Image.open(io.BytesIO(b64decode(picture.image.partition(",")[2])))) for picture in found.pictures]
    assert (shown[0] == 40).all() and (shown[1] == 200).all()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "exists already" in again.output
    empty = CliRunner().invoke(app, ["dispatch", str(tmp_path / "m.safetensors"), str(tmp_path / "out"), "--output", str(tmp_path / "n.json")])
    assert empty.exit_code == 2 and "no .jpg" in empty.output and not (tmp_path / "n.json").exists()
