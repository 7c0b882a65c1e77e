"""Dense models, and their weights as the official releases and Hugging Face lay them out."""

import re
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import shiftaddvit.models  # noqa: F401  (registers PVTv1)

State = dict[str, Tensor]

PVT2 = {"embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8), "depths": (1, 2, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
PVT1 = PVT2 | {"img_size": 64}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64}


def make(name: str, **args) -> nn.Module:
    """A small random model of a registered family, in evaluation mode; no parameter keeps the value that timm starts it with."""
    sizes = PVT2 if "pvt_v2" in name else VIT if "patch16" in name else PVT1
    if name == "pvt_tiny":
        sizes = {key: value for key, value in sizes.items() if key != "depths"}
    model = timm.create_model(name, **(sizes | {"num_classes": 7} | args)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model: nn.Module, size: int = 64) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


def save(state: object, folder: Path, name: str = "file.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name


# Layouts: the inverse of what is under test, written out apart from it.


def official_pvt2(state: State) -> State:
    def key(k: str) -> str:
        k = k.replace("patch_embed.", "patch_embed1.").replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
        k = re.sub(r"stages\.(\d)\.downsample", lambda m: f"patch_embed{int(m[1]) + 1}", k)
        k = re.sub(r"stages\.(\d)\.blocks", lambda m: f"block{int(m[1]) + 1}", k)
        return re.sub(r"stages\.(\d)\.norm", lambda m: f"norm{int(m[1]) + 1}", k)

    return {key(k): v for k, v in state.items()}


def split_rows(state: State, name: str, parts: tuple[str, ...]) -> State:
    """Every `….name.weight` cut into equal blocks of rows called `….part.weight`."""
    out = {}
    for key, value in state.items():
        if f".{name}." in key:
            out |= {key.replace(f".{name}.", f".{part}."): rows for part, rows in zip(parts, value.chunk(len(parts)), strict=True)}
        else:
            out[key] = value
    return out


def hugging_face_pvt2(state: State) -> State:
    def key(k: str) -> str:
        if k.startswith("head."):
            return k.replace("head.", "classifier.")
        k = re.sub(r"^patch_embed\.", "stages.0.downsample.", k)
        k = k.replace(".downsample.norm.", ".patch_embedding.layer_norm.").replace(".downsample.proj.", ".patch_embedding.proj.")
        k = re.sub(r"^(stages\.\d)\.norm\.", r"\1.layer_norm.", k)
        k = k.replace(".norm1.", ".layer_norm_1.").replace(".norm2.", ".layer_norm_2.").replace(".attn.norm.", ".attn.layer_norm.")
        k = k.replace(".attn.q.", ".attn.query.").replace(".attn.sr.", ".attn.spatial_reduction.").replace(".attn.", ".attention.")
        k = k.replace(".fc1.", ".dense1.").replace(".fc2.", ".dense2.").replace(".dwconv.", ".dwconv.dwconv.")
        return "pvt_v2.encoder." + k.replace("stages.", "layers.")

    return {key(k): v for k, v in split_rows(state, "kv", ("key", "value")).items()}


def hugging_face_pvt1(state: State) -> State:
    def key(k: str) -> str:
        if k.startswith("head."):
            return k.replace("head.", "classifier.")
        if k == "cls_token":
            return "pvt.encoder.patch_embeddings.3.cls_token"
        k = re.sub(r"^pos_embed(\d)", lambda m: f"patch_embeddings.{int(m[1]) - 1}.position_embeddings", k)
        k = re.sub(r"^patch_embed(\d)\.proj", lambda m: f"patch_embeddings.{int(m[1]) - 1}.projection", k)
        k = re.sub(r"^patch_embed(\d)\.norm", lambda m: f"patch_embeddings.{int(m[1]) - 1}.layer_norm", k)
        k = re.sub(r"^block(\d)", lambda m: f"block.{int(m[1]) - 1}", k)
        k = re.sub(r"^norm\.", "layer_norm.", k)
        k = k.replace(".norm1.", ".layer_norm_1.").replace(".norm2.", ".layer_norm_2.").replace("fc1", "dense1").replace("fc2", "dense2")
        k = k.replace("attn.proj", "attention.output.dense").replace("attn.norm", "attention.self.layer_norm")
        k = k.replace("attn.sr", "attention.self.sequence_reduction").replace("attn.q.", "attn.query.").replace("attn.", "attention.self.")
        return "pvt.encoder." + k

    return {key(k): v for k, v in split_rows(state, "kv", ("key", "value")).items()}


def hugging_face_vit(state: State, prefix: str = "vit.", version: int = 4) -> State:
    ends = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    heads = {"head": "cls_classifier", "head_dist": "distillation_classifier"} if "head_dist.weight" in state else {"head": "classifier"}
    inner = {
        4: (
            "encoder.layer.",
            *(f"attention.attention.{part}" for part in ("query", "key", "value")),
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ),
        5: ("layers.", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    }[version]
    names = ("blocks.", "attn.query", "attn.key", "attn.value", "attn.proj", "mlp.fc1", "mlp.fc2")

    def key(k: str) -> str:
        module, dot, leaf = k.rpartition(".") if k.endswith(("weight", "bias")) else (k, "", "")
        if module in heads:
            return heads[module] + dot + leaf
        if module in ends:
            return prefix + ends[module] + dot + leaf
        for ours, theirs in zip(names, inner, strict=True):
            module = re.sub(rf"(^|\.){re.escape(ours)}", lambda m: m[1] + theirs, module, count=1)
        return prefix + module.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after") + dot + leaf

    return {key(k): v for k, v in split_rows(state, "qkv", ("query", "key", "value")).items()}


def unchanged(state: State) -> State:
    return state
