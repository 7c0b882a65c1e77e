"""Arithmetic of the element-wise functions, and which operators they are."""

_EXP = (4, 4)
"""A polynomial of degree four after the range is reduced by a shift."""
_DIVIDE = (4, 2)
"""Two Newton steps for the reciprocal, one multiplication with it."""


def _sum(*parts: tuple[int, int]) -> tuple[int, int]:
    return sum(m for m, _ in parts), sum(a for _, a in parts)


_SIGMOID = _sum(_EXP, _DIVIDE, (0, 1))

FUNCTIONS: dict[str, tuple[int, int]] = {
    "add": (0, 1), "sub": (0, 1), "rsub": (0, 1), "neg": (0, 1), "abs": (0, 1), "where": (0, 0), "compare": (0, 1), "clamp": (0, 2),
    "mul": (1, 0), "div": _DIVIDE, "square": (1, 0), "sqrt": (6, 3), "exp": _EXP, "log": _EXP, "sin": _EXP, "sign": (0, 1), "round": (0, 1),
    "relu": (0, 1), "sigmoid": _SIGMOID, "tanh": _SIGMOID, "silu": _sum(_SIGMOID, (1, 0)), "gelu": _sum(_SIGMOID, (4, 1)),
    "hardswish": (2, 3), "elu": _sum(_EXP, (1, 2)),
    "softmax": _sum(_EXP, (1, 2)), "layer_norm": (3, 4), "rms_norm": (3, 1), "group_norm": (3, 4), "batch_norm": (1, 1),
    "sum": (0, 1), "mean": (0, 1), "max": (0, 1), "variance": (1, 2), "pool": (0, 1), "sort": (0, 8), "interpolate": (4, 3),
    "move": (0, 0), "dispatch": (0, 0),
}  # fmt: skip
"""(multiplications, additions) an element. Comparisons count as additions."""

POINTWISE = {
    "relu": "relu", "gelu": "gelu", "silu": "silu", "sigmoid": "sigmoid", "tanh": "tanh", "hardtanh": "clamp", "hardswish": "hardswish",
    "hardsigmoid": "clamp", "leaky_relu": "relu", "elu": "elu", "softplus": "exp", "exp": "exp", "expm1": "exp", "log": "log", "log1p": "log",
    "sin": "sin", "cos": "sin", "asin": "sin", "neg": "neg", "abs": "abs", "sign": "sign", "sgn": "sign", "clamp": "clamp",
    "clamp_min": "clamp", "clamp_max": "clamp", "sqrt": "sqrt", "rsqrt": "sqrt", "reciprocal": "div", "square": "square", "round": "round",
    "floor": "round", "ceil": "round", "logical_not": "compare", "bitwise_not": "compare", "isnan": "compare", "nan_to_num": "compare",
    "erf": "tanh", "mish": "silu", "prelu": "relu", "_prelu_kernel": "relu", "masked_fill": "where", "trunc": "round",
}  # fmt: skip
"""Operators of one tensor, each with the function whose arithmetic it has."""

BINARY = {
    "add": "add", "sub": "sub", "rsub": "sub", "mul": "mul", "div": "div", "pow": "square", "maximum": "max", "minimum": "max", "where": "where",
    "eq": "compare", "ne": "compare", "gt": "compare", "ge": "compare", "lt": "compare", "le": "compare", "logical_and": "compare",
    "logical_or": "compare", "bitwise_or": "compare", "bitwise_and": "compare", "addcmul": "mul", "lerp": "mul", "atan2": "div",
    "remainder": "div", "floor_divide": "div", "fmod": "div", "copysign": "sign",
}  # fmt: skip
"""Operators of two tensors, or of a tensor and a number, in which case they are pointwise."""

REDUCTIONS = {
    "sum": "sum", "mean": "mean", "amax": "max", "amin": "max", "max": "max", "min": "max", "argmax": "max", "argmin": "max",
    "var": "variance", "var_mean": "variance", "std": "variance", "std_mean": "variance", "linalg_vector_norm": "variance", "norm": "variance",
    "cumsum": "sum", "cumprod": "mul", "logsumexp": "exp", "prod": "mul", "any": "compare", "all": "compare",
    "topk": "sort", "sort": "sort", "searchsorted": "sort",
    "avg_pool2d": "pool", "_adaptive_avg_pool2d": "pool", "_adaptive_avg_pool3d": "pool", "max_pool2d_with_indices": "pool",
    "adaptive_max_pool2d": "pool", "avg_pool1d": "pool", "max_pool2d": "pool", "adaptive_avg_pool2d": "pool",
}  # fmt: skip
"""Operators that read many elements for each one written."""

NORMS = {
    "native_layer_norm": "layer_norm", "layer_norm": "layer_norm", "native_group_norm": "group_norm", "group_norm": "group_norm",
    "rms_norm": "rms_norm", "_fused_rms_norm": "rms_norm", "instance_norm": "group_norm",
}  # fmt: skip
"""Norms whose statistics come from the input."""

BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
               "batch_norm", "_batch_norm_no_update")  # fmt: skip
"""With stored statistics these scale and shift: pointwise."""

SOFTMAX = ("_softmax", "_safe_softmax", "softmax", "_log_softmax", "log_softmax")

MOVES = ("gather", "scatter", "scatter_add", "index_select", "index", "index_put", "embedding", "cat", "stack", "constant_pad_nd", "pad",
         "reflection_pad2d", "replication_pad2d", "roll", "flip", "repeat", "repeat_interleave", "index_add", "slice_scatter", "select_scatter",
         "masked_scatter", "pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", "take_along_dim", "tril", "triu")  # fmt: skip
"""Operators that copy elements to other places."""

INTERPOLATIONS = ("upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_nearest2d",
                  "grid_sampler_2d", "upsample_nearest2d_vec")  # fmt: skip

FREE = ("view", "_unsafe_view", "reshape", "permute", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "unbind", "split",
        "split_with_sizes", "chunk", "detach", "alias", "as_strided", "clone", "contiguous", "_to_copy", "lift_fresh", "copy_", "unfold",
        "_reshape_alias", "view_as_real", "view_as_complex", "dropout", "native_dropout", "diagonal", "movedim", "flatten", "_conj", "to",
        "empty_like", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full", "fill_", "fill", "zero_",
        "_assert_async", "device", "unsafe_split", "narrow", "swapaxes", "resolve_conj", "resolve_neg", "empty_strided",
        "new_empty_strided", "_has_same_storage_numel", "is_same_size", "expand_as", "type_as", "item", "_local_scalar_dense", "sym_size",
        "scalar_tensor", "_fused_sdp_choice", "rand_like", "randn_like", "bernoulli_", "uniform_", "normal_")  # fmt: skip
"""Addressing, layout, dtype and constants: no arithmetic on data and no traffic of its own."""
