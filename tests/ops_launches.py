"""The launches that `ops_compile` compiles: each op at the sizes of the models, on tensors without data."""

import torch


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def matshift():
    from shiftaddvit.ops.matshift import triton as kernels

    half = torch.bfloat16
    for m, k, n in ((3136 * 32, 64, 512), (784, 1024, 128), (49, 256, 1024)):
        yield f"matshift bf16 {m}x{k}x{n}", lambda m=m, k=k, n=n: kernels.matshift(
            meta(m, k), meta(n, k), None, meta(n, dtype=torch.float32), 0, "gelu"
        )
    single = torch.float32
    yield "matshift fp32", lambda: kernels.matshift(
        meta(25088, 512, dtype=single), meta(128, 512, dtype=half), meta(128, dtype=single), None, 0, "none"
    )
    for bits in (4, 5):
        packed = meta(512, 64 // 8 * bits, dtype=torch.uint8)
        yield f"matshift packed {bits}", lambda b=bits, w=packed: kernels.matshift(
            meta(3136 * 32, 64), w, meta(512, dtype=single), None, b, "none"
        )
    yield "matshift int8", lambda: kernels.matshift_int8(
        meta(25088, 512, dtype=torch.int8), meta(1, dtype=single), meta(128, 512, dtype=torch.int8), meta(128, dtype=single),
        meta(128, dtype=single), meta(1, dtype=single), "gelu", torch.int8,
    )  # fmt: skip


# PVTv2-B0: tokens of one image, channels and hidden channels of its stages.
STAGES = ((56, 32, 256), (28, 64, 512), (14, 160, 640), (7, 256, 1024))


def norm_linear():
    from shiftaddvit.ops.norm_linear import triton as kernels

    single, half = torch.float32, torch.float16
    for batch in (1, 32, 256):
        for side, c, hidden in STAGES:
            m = batch * side * side
            for experts in (1, 2):
                router = lambda k, e=experts: meta(16, k, dtype=half) if e == 2 else None  # noqa: E731
                bias = lambda n, e=experts: meta(e, n, dtype=single)  # noqa: E731
                yield f"norm_linear x{experts} {m}x{c}x{hidden}", lambda m=m, c=c, n=hidden, e=experts, r=router, b=bias: kernels.norm_linear(
                    meta(m, c), meta(c, dtype=single), meta(c, dtype=single), 1e-6, meta(e, n, c, dtype=half), b(n), r(c), None, None, "none", True,
                )  # fmt: skip
                yield f"norm_linear x{experts} {m}x{hidden}x{c}", lambda m=m, c=c, n=hidden, e=experts, r=router, b=bias: kernels.norm_linear(
                    meta(m, n, dtype=half), None, None, 0.0, meta(e, c, n, dtype=half), b(c), r(n), meta(m, c), None, "none", True,
                )  # fmt: skip


def conv_gelu():
    from shiftaddvit.ops.conv_gelu import triton as kernels

    for batch in (1, 32, 256):
        for side, _, hidden in STAGES:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                yield f"conv_gelu {dtype} {batch}x{side}x{hidden}", lambda b=batch, s=side, k=hidden, t=dtype: kernels.conv_gelu(
                    meta(b, s * s, k, dtype=t), s, s, meta(9, k, dtype=t), meta(k, dtype=torch.float32), None, True
                )


def conv_mlp():
    from shiftaddvit.ops.conv_mlp import triton as kernels

    single, half = torch.float32, torch.float16
    linear = lambda e, n, k: (meta(e, n, k, dtype=half), meta(e, n, dtype=single), meta(16, k, dtype=half) if e == 2 else None)  # noqa: E731
    # PVTv2-B0's first two stages, at 224 and at other sizes, and B1's first.
    pictures = [(b, 56, 56, 32) for b in (1, 32, 256)] + [(8, 64, 64, 32), (8, 24, 40, 32)]
    pictures += [(b, 28, 28, 64) for b in (1, 32, 256)] + [(32, 56, 56, 64)]
    for batch, height, width, c in pictures:
        for first, second in ((1, 1), (2, 2), (2, 1), (1, 2)) if c == 32 else ((1, 1), (2, 2)):
            name = f"conv_mlp x{first}{second} {batch}x{height}x{width}x{c}"
            yield name, lambda b=batch, h=height, w=width, c=c, e=first, f=second: kernels.conv_mlp(
                meta(b, h * w, c), h, w, 1e-6, meta(c, dtype=single), meta(c, dtype=single), *linear(e, 8 * c, c), meta(9, 8 * c, dtype=half),
                meta(8 * c, dtype=single), *linear(f, c, 8 * c), True,
            )  # fmt: skip


def attn_block():
    from shiftaddvit.ops.attn_block import triton as kernels

    single, half = torch.float32, torch.float16
    linear = lambda e, n, k: (meta(e, n, k, dtype=half), meta(e, n, dtype=single), meta(16, k, dtype=half) if e == 2 else None)  # noqa: E731
    usual = ("token", "zero-one", "own", True, True, True)
    # PVTv2-B0's first two stages; then other forms, and float16 tokens.
    sizes = [(b, n, c) for b in (1, 256) for n, c in ((3136, 32), (784, 64))]
    cases = [(f"attn_block x{e}{f} {b}x{n}x{c}", b, n, c, e, f, usual, torch.bfloat16) for b, n, c in sizes for e, f in ((1, 1), (2, 2))]
    other = ("zero", "plus-minus", "none", False, False, True)
    cases += [(f"attn_block forms 256x{n}x{c}", 256, n, c, 2, 1, other, half) for n, c in ((3136, 32), (784, 64))]
    for name, b, n, c, e, f, form, dtype in cases:
        # More tokens a step of 64 channels would spill.
        for m, stages in ((64, 1), (64, 2), (128, 1), (128, 2))[: 4 if c == 32 else 2]:
            launch = lambda b=b, n=n, c=c, e=e, f=f, s=form, x=dtype: kernels.attn_block(  # noqa: E731
                meta(b, n, c, dtype=x), 1e-6, meta(c, dtype=single), meta(c, dtype=single), *linear(e, 3 * c, c), meta(c // 32, 9, dtype=single),
                *linear(f, c, c), c // 32, *s,
            )  # fmt: skip
            yield f"{name} m{m} s{stages}", lambda m=m, s=stages, launch=launch: _tiled(kernels, m, s, launch)


def _tiled(kernels, m, stages, launch):
    """The launch with `m` tokens a step of a program."""
    from dataclasses import replace

    usual = kernels.attn_tile
    kernels.attn_tile = lambda *args: replace(usual(*args), m=m, stages=stages)
    try:
        launch()
    finally:
        kernels.attn_tile = usual


def linear_attention():
    from shiftaddvit.ops.linear_attention import triton as kernels

    single, half = torch.float32, torch.float16
    # PVTv2-B0's three stages, B2's third, DeiT-T.
    for batch in (1, 32, 256):
        for tokens, c, heads in ((3136, 32, 1), (784, 64, 2), (196, 160, 5), (196, 320, 5), (197, 192, 3)):
            d, parts = c // heads, kernels.parts_for(batch, tokens, heads, None)
            for experts in (1, 2):
                router = meta(16, c, dtype=half) if experts == 2 else None
                bias, name = meta(experts, 3 * c, dtype=single), f"x{experts} {batch}x{tokens}x{c}"
                yield f"encode {name}", lambda b=batch, n=tokens, c=c, e=experts, r=router, h=heads, s=bias, p=parts: (
                    kernels.encode(
                        meta(b, n, c, dtype=half), meta(c, dtype=single), meta(c, dtype=single), 1e-6, meta(e, 3 * c, c, dtype=half), s, r,
                        None, h, "token", "zero-one", False, False, p, True,
                    )
                )  # fmt: skip
                yield f"mix {name}", lambda b=batch, n=tokens, c=c, e=experts, r=router, h=heads, d=d, p=parts: (
                    kernels.mix(
                        meta(b, h, n, d // 32, dtype=torch.int32), meta(b, n, 3 * c, dtype=half)[..., 2 * c :],
                        meta(b, p, h, d, d, dtype=single), meta(0, dtype=single), meta(0, dtype=single), meta(h, 9, dtype=single),
                        meta(e, c, c, dtype=half), meta(e, c, dtype=single), r, meta(b, n, c, dtype=half), "zero-one", "own", True, "l2",
                        1.0, 0, True,
                    )
                )  # fmt: skip


def patch_embed():
    from shiftaddvit.ops.patch_embed import padded_side
    from shiftaddvit.ops.patch_embed import triton as kernels

    half, single = torch.float16, torch.float32
    # PVTv2-B0's embeddings, its reductions of keys and values, DeiT-T's embedding.
    shapes = (
        (3, 224, 32, 7, 4, 3), (32, 56, 64, 3, 2, 1), (64, 28, 160, 3, 2, 1), (160, 14, 256, 3, 2, 1), (32, 56, 32, 8, 8, 0), (64, 28, 64, 4, 4, 0),
        (160, 14, 160, 2, 2, 0), (3, 224, 192, 16, 16, 0),
    )  # fmt: skip
    for batch in (1, 32, 256):
        for c, side, n, kernel, stride, padding in shapes:
            planes, norm = c == 3, kernel < 16
            x = meta(batch, c, side, side, dtype=half) if planes else meta(batch, side * side, c, dtype=half)
            yield f"patch_embed {batch}x{c}x{side} k{kernel}", lambda x=x, n=n, c=c, k=kernel, s=stride, p=padding, z=side, q=planes, g=norm: (
                kernels.patch_embed(
                    x, meta(n, c * (padded_side(k) if q else k) ** 2, dtype=half), meta(n, dtype=single), meta(n, dtype=single) if g else None,
                    meta(n, dtype=single) if g else None, 1e-6, None, None, z, z, k, s, p, q, True,
                )
            )  # fmt: skip


def moe_linear():
    from shiftaddvit.ops.moe_linear import triton as kernels

    half, single = torch.bfloat16, torch.float32
    for m, k, n in ((100352, 64, 512), (50176, 320, 1280), (50176, 1280, 320), (196, 160, 640)):
        w, bias, index = meta(2, n, k, dtype=half), meta(2, n, dtype=single), meta(m, dtype=torch.int64)
        yield f"dual {m}x{k}x{n}", lambda m=m, k=k, w=w, b=bias, i=index: kernels.dual(meta(m, k), i, meta(m, dtype=single), w, b)
        yield f"order {m}x{k}x{n}", lambda m=m, k=k: kernels.order_rows(meta(m, k), None, meta(2, k, dtype=single))
        yield f"partition {m}x{k}x{n}", lambda m=m, k=k, w=w, b=bias: kernels.partition(
            meta(m, k), meta(m, dtype=torch.int32), meta(m // 512 + 1, dtype=torch.int32), None, w, b
        )


def moe_train():
    from shiftaddvit.ops.moe_train import triton as kernels

    single = torch.float32
    for m, k, n in ((262144, 32, 256), (262144, 256, 32), (65536, 64, 64), (16384, 160, 640), (4096, 1024, 256)):
        rows, index, router, noise, w = meta(m, k), meta(m, dtype=torch.int8), meta(2, k, dtype=single), meta(m, 2, dtype=single), meta(2, n, k)
        yield f"moe_train {m}x{k}x{n}", lambda x=rows, r=router, z=noise, w=w, n=n: kernels.forward(x, r, z, w, meta(2, n, dtype=single))
        yield f"moe_train grad {m}x{k}x{n}", lambda m=m, n=n, x=rows, i=index, r=router, z=noise, w=w: kernels.backward(
            meta(m, n), z, x, meta(m, n), z, i, r, z, w
        )
    yield "moe_train grad float16 65536x64x512", lambda: kernels.weight_grads(
        meta(65536, 512, dtype=torch.float16), meta(65536, 64, dtype=torch.float16), meta(65536, dtype=torch.int8), meta(65536, 2, dtype=single)
    )


def matadd():
    from shiftaddvit.ops.matadd import triton as kernels

    for batch, heads, tokens, r, d, dtype in (
        (1, 1, 3136, 16, 32, torch.float16), (32, 2, 784, 16, 32, torch.float16), (32, 1, 3136, 16, 32, torch.float32),
        (32, 6, 197, 64, 64, torch.bfloat16),
    ):  # fmt: skip
        words, values = meta(batch, heads, tokens, -(-r // 32), dtype=torch.int32), meta(batch, heads, tokens, d, dtype=dtype)
        yield f"key_value {batch}x{heads}x{tokens} r{r}", lambda w=words, v=values, r=r: kernels.key_value(w, v, r, 0.0, 1.0)
        context = meta(batch, heads, r, d, dtype=dtype)
        yield f"query_context {batch}x{heads}x{tokens} r{r}", lambda w=words, c=context: kernels.query_context(w, c, 0.0, 1.0)
    yield "pack", lambda: kernels.pack(meta(32, 1, 3136, 16), 0.5)


def adder():
    from shiftaddvit.ops.adder import triton as kernels

    single = torch.float32
    for m, k, n in ((100352, 64, 512), (196, 160, 640)):
        x, w, g = meta(m, k, dtype=single), meta(n, k, dtype=single), meta(m, n, dtype=single)
        yield f"adder {m}x{k}x{n}", lambda x=x, w=w: kernels.distance(x, w)
        yield f"adder grad {m}x{k}x{n}", lambda x=x, w=w, g=g: kernels.grad_x(x, w, g)
    q, g = meta(128, 2, 784, 32, dtype=single), meta(128, 2, 784, 784, dtype=single)
    yield "adder scores 128x2x784x32", lambda: kernels.distance(q, q)
    yield "adder scores grad 128x2x784x32", lambda: kernels.grad_x(q, q, g)


def float32():
    """Operands twice as large, three products for one: what fits the shared memory only in tiles of its own."""
    from shiftaddvit.ops.matadd import triton as matadd
    from shiftaddvit.ops.moe_linear import triton as moe
    from shiftaddvit.ops.norm_linear import triton as mlp
    from shiftaddvit.ops.patch_embed import triton as patch

    m = lambda *shape: meta(*shape, dtype=torch.float32)  # noqa: E731
    for rows, k, n in ((50176, 160, 640), (12544, 256, 1024), (50432, 192, 576), (200704, 128, 512), (50176, 320, 1280)):
        for experts in (1, 2):
            router = m(16, k) if experts == 2 else None
            yield f"norm_linear fp32 x{experts} {rows}x{k}x{n}", lambda r=rows, k=k, n=n, e=experts, router=router: mlp.norm_linear(
                m(r, k), m(k), m(k), 1e-6, m(e, n, k), m(e, n), router, None, None, "none"
            )
    for r, d in ((64, 64), (128, 128)):
        words = meta(3, 5, 197, r // 32, dtype=torch.int32)
        yield f"key_value fp32 r{r} d{d}", lambda w=words, r=r, d=d: matadd.key_value(w, m(3, 5, 197, d), r, 0.0, 1.0)
        yield f"query_context fp32 r{r} d{d}", lambda w=words, r=r, d=d: matadd.query_context(w, m(3, 5, r, d), 0.0, 1.0)
    yield "dual fp32 50176x320x1280", lambda: moe.dual(m(50176, 320), meta(50176, dtype=torch.int64), None, m(2, 1280, 320), m(2, 1280))
    yield "patch_embed fp32 3x224 k14 1024", lambda: patch.patch_embed(
        m(1, 3, 224, 224), m(1024, 768), m(1024), m(1024), m(1024), 1e-6, None, None, 224, 224, 14, 14, 0, True
    )


def softmax_attention():
    from shiftaddvit.ops.softmax_attention import triton as kernels

    for tokens, c, heads in ((49, 256, 8), (197, 192, 3)):
        q, k, v = meta(256, tokens, 3 * c, dtype=torch.float16).split(c, dim=-1)
        yield f"softmax_attention {tokens}x{c}", lambda q=q, k=k, v=v, h=heads: kernels.softmax_attention(q, k, v, h, True)


def layer_norm():
    from shiftaddvit.ops.layer_norm import triton as kernels

    single = torch.float32
    for batch, tokens, c in ((1, 196, 160), (256, 196, 160), (256, 49, 512), (256, 197, 384)):
        x, w = meta(batch, tokens, c, dtype=torch.float16), meta(c, dtype=single)
        for mean in (False, True):
            yield f"layer_norm {batch}x{tokens}x{c}{' mean' if mean else ''}", lambda x=x, w=w, mean=mean: kernels.layer_norm(x, w, w, 1e-6, mean, True)


def expert_sums():
    from shiftaddvit.ops.expert_sums import triton as kernels

    m = lambda *shape: meta(*shape, dtype=torch.float32)  # noqa: E731
    for tokens in (802816, 12544, 63):
        yield f"expert_sums {tokens}", lambda t=tokens: kernels.expert_sums(m(t, 2), m(t, 2))
        yield f"expert_sums grad {tokens}", lambda t=tokens: kernels.gradients(m(t, 2), m(t, 2), m(2, 2))


def gnt():
    """The published width, 192 samples, 10 views, a picture of 504×378."""
    from shiftaddvit.ops.feed_forward import triton as feed
    from shiftaddvit.ops.ray_output import triton as output
    from shiftaddvit.ops.ray_query import triton as query
    from shiftaddvit.ops.ray_transformer import triton as ray
    from shiftaddvit.ops.view_attention import triton as attention
    from shiftaddvit.ops.view_lookup import triton as lookup

    single = torch.float32
    rays, samples, views, c = 2048, 192, 10, 64
    points = rays * samples
    vector = lambda *shape: meta(*shape, dtype=single)  # noqa: E731
    for half in (torch.bfloat16, torch.float16):
        m = lambda *shape, t=half: meta(*shape, dtype=t)  # noqa: E731
        name = str(half).removeprefix("torch.")
        yield f"view_lookup {name}", lambda m=m: lookup.view_lookup(
            vector(rays, 3), vector(rays, 3), vector(samples), vector(views, 3, 4), vector(views, 3), m(views, 378, 504, 4),
            m(views, 95, 126, 32), m(c, 4), m(c, 32), vector(c), m(c, c), vector(c),
        )  # fmt: skip
        yield f"view_attention {name}", lambda m=m: attention.view_attention(
            m(points, c), m(views, points, c), m(views, points, 8), vector(c), vector(c), 1e-6, m(16, c), m(16, c), m(16, 16), vector(16),
            m(16, 8), vector(16), m(c, 16), m(c, c), m(c, 16), m(c, c), vector(c), [], 1e-6,
        )  # fmt: skip
        for first, second in ((1, 1), (2, 2)):
            yield f"feed_forward x{first}{second} {name}", lambda m=m, e=first, f=second: feed.feed_forward(
                m(points, c), vector(c), vector(c), m(e, 256, c), vector(e, 256), m(f, c, 256), vector(f, c),
                vector(2, c) if e == 2 else None, vector(2, 256) if f == 2 else None, 1e-6,
            )  # fmt: skip
            fed = lambda m=m, e=first, f=second: [  # noqa: E731
                vector(c), vector(c), m(e, 256, c), vector(e, 256), m(f, c, 256), vector(f, c), vector(2, c) if e == 2 else None,
                vector(2, 256) if f == 2 else None,
            ]  # fmt: skip
            yield f"view_attention x{first}{second} {name}", lambda m=m, fed=fed: attention.view_attention(
                m(points, c), m(views, points, c), m(views, points, 8), vector(c), vector(c), 1e-6, m(16, c), m(16, c), m(16, 16), vector(16),
                m(16, 8), vector(16), m(c, 16), m(c, c), m(c, 16), m(c, c), vector(c), fed(), 1e-6,
            )  # fmt: skip
            for form in ("softmax", "token"):
                yield f"ray_transformer {form} x{first}{second} {name}", lambda m=m, fed=fed, form=form: ray.ray_transformer(
                    m(rays, samples, c), 4, vector(c), vector(c), 1e-6, m(3 * c, c), m(c, c), vector(c), fed(), 1e-6, form, 0.0, True, True,
                    True, vector(4, 9) if form == "token" else None,
                )  # fmt: skip
        yield f"ray_query {name}", lambda m=m: query.ray_query(
            m(points, c), vector(rays, 3), vector(rays, 3), vector(samples), m(c, c), m(c, 64), vector(rays, c), m(c, c), vector(c)
        )
        yield f"ray_color {name}", lambda m=m: output.ray_color(m(rays, samples, c), vector(c), vector(c), 1e-5, vector(3, c), vector(3))
        for codes in ("softmax", "token"):
            yield f"ray_scores {codes} {name}", lambda m=m, s=codes: output.ray_scores(
                m(rays, samples, c), vector(c), vector(c), 1e-6, m(c, c), m(c, c), 4, s, 0.0
            )


OPS = {
    "matshift": matshift,
    "norm_linear": norm_linear,
    "conv_gelu": conv_gelu,
    "conv_mlp": conv_mlp,
    "attn_block": attn_block,
    "linear_attention": linear_attention,
    "moe_linear": moe_linear,
    "moe_train": moe_train,
    "matadd": matadd,
    "patch_embed": patch_embed,
    "softmax_attention": softmax_attention,
    "layer_norm": layer_norm,
    "adder": adder,
    "expert_sums": expert_sums,
    "gnt": gnt,
    "float32": float32,
}
# A launch of every large kernel, those with the most registers: quick enough for every run of the tests.
REPRESENTATIVE = (
    "matshift bf16 100352x64x512", "matshift packed 5", "matshift int8", "norm_linear x2 50176x160x640",
    "norm_linear x2 50176x640x160", "conv_gelu torch.float16 256x56x256", "conv_mlp x11 256x56x56x32", "conv_mlp x21 256x56x56x32",
    "attn_block x22 256x3136x32 m64 s1", "attn_block x22 256x3136x32 m128 s2", "attn_block x22 256x784x64 m64 s1",
    "encode x2 256x196x160", "mix x2 256x784x64",
    "mix x2 256x197x192", "norm_linear x2 802816x32x256", "dual 50176x320x1280",
    "partition 50176x320x1280", "moe_train grad 262144x256x32", "moe_train grad 65536x64x64", "key_value 32x1x3136 r16", "patch_embed 256x3x224 k7", "patch_embed 256x160x14 k3",
    "patch_embed 1x160x14 k3", "softmax_attention 197x192",
    "layer_norm 256x49x512 mean",
    "adder grad 100352x64x512", "expert_sums 802816", "expert_sums grad 802816", "view_lookup bfloat16", "view_attention x22 bfloat16", "feed_forward x22 bfloat16", "ray_query bfloat16",
    "ray_transformer token x22 bfloat16", "ray_transformer softmax x11 bfloat16", "ray_scores token bfloat16",
    "norm_linear fp32 x1 200704x128x512", "norm_linear fp32 x2 50176x160x640", "key_value fp32 r64 d64", "query_context fp32 r128 d128",
)  # fmt: skip
