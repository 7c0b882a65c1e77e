"""The rules by which the keys of published weights become those of timm (and of our PVTv1): plain tables.

A rule is a pair of templates: `#` stands for a number and `*` for weight or bias, the same on both sides. A target that ends with
`@i/n` is the i-th of n equal blocks of rows: Hugging Face keeps query, key and value apart. The first rule that fits a key counts.
"""

Rules = tuple[tuple[str, str], ...]


def _stages(*rules: tuple[str, str], source: int, target: int) -> Rules:
    """The rules for each of four stages: `%` is its number, counted from `source` on the left and `target` on the right."""
    return tuple((a.replace("%", str(i + source)), b.replace("%", str(i + target))) for i in range(4) for a, b in rules)


_PVT_SAME = ("norm1", "attn.q", "attn.kv", "attn.sr", "attn.norm", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")

PVT2_OFFICIAL = (
    ("patch_embed1.proj.*", "patch_embed.proj.*"),
    ("patch_embed1.norm.*", "patch_embed.norm.*"),
    *_stages(
        ("patch_embed%.proj.*", "stages.%.downsample.proj.*"),
        ("patch_embed%.norm.*", "stages.%.downsample.norm.*"),
        *((f"block%.#.{part}.*", f"stages.%.blocks.#.{part}.*") for part in _PVT_SAME),
        ("block%.#.mlp.dwconv.dwconv.*", "stages.%.blocks.#.mlp.dwconv.*"),
        ("norm%.*", "stages.%.norm.*"),
        source=1,
        target=0,
    ),
    ("head.*", "head.*"),
)

PVT2_HF = (
    ("encoder.layers.0.patch_embedding.proj.*", "patch_embed.proj.*"),
    ("encoder.layers.0.patch_embedding.layer_norm.*", "patch_embed.norm.*"),
    ("encoder.layers.#.patch_embedding.proj.*", "stages.#.downsample.proj.*"),
    ("encoder.layers.#.patch_embedding.layer_norm.*", "stages.#.downsample.norm.*"),
    ("encoder.layers.#.layer_norm.*", "stages.#.norm.*"),
    *(
        (f"encoder.layers.#.blocks.#.{a}.*", f"stages.#.blocks.#.{b}")
        for a, b in (
            ("layer_norm_1", "norm1.*"),
            ("attention.query", "attn.q.*"),
            ("attention.key", "attn.kv.*@0/2"),
            ("attention.value", "attn.kv.*@1/2"),
            ("attention.spatial_reduction", "attn.sr.*"),
            ("attention.layer_norm", "attn.norm.*"),
            ("attention.proj", "attn.proj.*"),
            ("layer_norm_2", "norm2.*"),
            ("mlp.dense1", "mlp.fc1.*"),
            ("mlp.dwconv.dwconv", "mlp.dwconv.*"),
            ("mlp.dense2", "mlp.fc2.*"),
        )
    ),
    ("classifier.*", "head.*"),
)

PVT1_HF = (
    ("encoder.patch_embeddings.3.cls_token", "cls_token"),
    *_stages(
        ("encoder.patch_embeddings.%.position_embeddings", "pos_embed%"),
        ("encoder.patch_embeddings.%.projection.*", "patch_embed%.proj.*"),
        ("encoder.patch_embeddings.%.layer_norm.*", "patch_embed%.norm.*"),
        *(
            (f"encoder.block.%.#.{a}.*", f"block%.#.{b}")
            for a, b in (
                ("layer_norm_1", "norm1.*"),
                ("attention.self.query", "attn.q.*"),
                ("attention.self.key", "attn.kv.*@0/2"),
                ("attention.self.value", "attn.kv.*@1/2"),
                ("attention.self.sequence_reduction", "attn.sr.*"),
                ("attention.self.layer_norm", "attn.norm.*"),
                ("attention.output.dense", "attn.proj.*"),
                ("layer_norm_2", "norm2.*"),
                ("mlp.dense1", "mlp.fc1.*"),
                ("mlp.dense2", "mlp.fc2.*"),
            )
        ),
        source=0,
        target=1,
    ),
    ("encoder.layer_norm.*", "norm.*"),
    ("classifier.*", "head.*"),
)

_VIT_HF_ENDS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
    ("layernorm.*", "norm.*"),
    ("classifier.*", "head.*"),
    ("cls_classifier.*", "head.*"),
    ("distillation_classifier.*", "head_dist.*"),
)

VIT_HF = (
    *_VIT_HF_ENDS,
    *(
        (f"encoder.layer.#.{a}.*", f"blocks.#.{b}")
        for a, b in (
            ("layernorm_before", "norm1.*"),
            ("attention.attention.query", "attn.qkv.*@0/3"),
            ("attention.attention.key", "attn.qkv.*@1/3"),
            ("attention.attention.value", "attn.qkv.*@2/3"),
            ("attention.output.dense", "attn.proj.*"),
            ("layernorm_after", "norm2.*"),
            ("intermediate.dense", "mlp.fc1.*"),
            ("output.dense", "mlp.fc2.*"),
        )
    ),
)

# The names that transformers 5 has in memory; the files that it saves keep those above.
_QKV_HF5 = (("q_proj", "attn.qkv.*@0/3"), ("k_proj", "attn.qkv.*@1/3"), ("v_proj", "attn.qkv.*@2/3"), ("o_proj", "attn.proj.*"))

VIT_HF5 = (
    *_VIT_HF_ENDS,
    ("layers.#.layernorm_before.*", "blocks.#.norm1.*"),
    *((f"layers.#.attention.{a}.*", f"blocks.#.{b}") for a, b in _QKV_HF5),
    ("layers.#.layernorm_after.*", "blocks.#.norm2.*"),
    ("layers.#.mlp.fc1.*", "blocks.#.mlp.fc1.*"),
    ("layers.#.mlp.fc2.*", "blocks.#.mlp.fc2.*"),
)

DINO2_HF = (
    *(rule for rule in _VIT_HF_ENDS if "classifier" not in rule[0]),
    *((f"encoder.layer.#.{part}.*", f"blocks.#.{part}.*") for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")),
    *((f"encoder.layer.#.layer_scale{i}.lambda1", f"blocks.#.ls{i}.gamma") for i in (1, 2)),
    *(rule for rule in VIT_HF if ".attention." in rule[0]),
    *((f"encoder.layer.#.attention.{a}.*", f"blocks.#.{b}") for a, b in _QKV_HF5),
)
