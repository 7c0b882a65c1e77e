"""GNT's multiplications replaced: the rows of the published 3D table (ShiftAddViT, section 5).

What stays dense, always: the feature net, `rgbfeat_fc`, the queries' `q_fcs`, the view transformer's `pos_fc` and `attn_fc`, `rgb_fc` and
the norms. The view transformer subtracts already, so `add` is about the ray transformer alone.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shiftaddvit.errors import UserError
from shiftaddvit.layers.attention import AngularAttention, merge_heads
from shiftaddvit.reparam import Recipe, Report
from shiftaddvit.reparam.recipe import as_recipe
from shiftaddvit.reparam.convert_layers import replace_module, swap_layer

from .gnt import GNT
from .gnt.transformer import FeedForward, RayAttention, ViewAttention

ROWS = ("gnt-add", "gnt-add-shift", "gnt-add-shift-moe", "gnt-shift")
"""The recipes of the published 3D table, in its order."""

DENSE = ("feature_net", "rgbfeat_fc", "q_fcs", "pos_fc", "attn_fc", "rgb_fc", "norm")
"""The parts that no recipe touches."""


class RayAngularAttention(AngularAttention):
    """Linear attention along a ray; with binary codes both of its products are additions."""

    def forward(
        self, x: Float[Tensor, "R S C"], want_weights: bool = False
    ) -> tuple[Float[Tensor, "R S C"], Float[Tensor, "R S"] | None]:
        """The output, and, if wanted, how much the first point attends to each point (mean over heads; sums to 1)."""
        q, k, v = self.queries_keys_values(x)
        if not self.enabled:
            y = F.scaled_dot_product_attention(q, k, v)
            scores = (q[:, :, :1].float() @ k.float().transpose(-1, -2)) * self.head_dim**-0.5
            weights = scores.softmax(dim=-1) if want_weights else None
        else:
            q, k = self.encode(q, k)
            y = self.mix(q, k, v)
            weights = _share(q[:, :, :1], k) if want_weights else None
        return self.proj(merge_heads(y).to(x.dtype)), None if weights is None else weights.mean(dim=1)[:, 0]


def _share(first: Float[Tensor, "R h 1 d"], k: Float[Tensor, "R h S d"]) -> Float[Tensor, "R h 1 S"]:
    """Similarity to the first point, made to sum to 1; equal shares where nothing is similar."""
    similarity = (first @ k.transpose(-1, -2)).float().clamp_min(0) + 1e-4
    return similarity / similarity.sum(dim=-1, keepdim=True)


def reparameterize_gnt(model: GNT, recipe: Recipe | str) -> GNT:
    """Replace the primitives of a GNT as `recipe` says, in place; the model is returned, every pre-trained weight inherited.

    `attention` is `keep` or `linear`, `add` is `none` or `quant` (the ray transformer); `attn_linear` rules q, k, v and out of both
    transformers, `mlp` the feed-forwards. UserError for what the 3D model has no form of, or a model converted before.
    """
    recipe = as_recipe(recipe)
    if not isinstance(model, GNT):
        raise UserError(f"{type(model).__name__} cannot be converted by nvs; allowed: GNT")
    if hasattr(model, "shiftaddvit_recipe"):
        raise UserError(f"the model is already converted (recipe {model.shiftaddvit_recipe.name!r}); start from the dense model")
    names = [name for name, module in model.named_modules() if isinstance(module, ViewAttention | RayAttention | FeedForward)]
    lost = recipe.unmatched(names + [f"{name}.{child}" for name in names for child in ("qkv", "proj", "q_fc", "k_fc", "v_fc", "out_fc", "fc1", "fc2")])
    if lost:
        raise UserError(f"no attention or feed-forward matches the override pattern {lost[0]!r}; names look like {names[0]!r}")
    for name in names:
        here = recipe.at(name)
        if here.attention not in ("keep", "linear") or here.add == "ksh" or here.moe.router == "mlp" or here.angular.shared_qk or here.rest != "mult":
            raise UserError(
                f"{name}: GNT takes attention 'keep' or 'linear', add 'none' or 'quant', a router for each linear, separate queries and "
                f"keys, and rest 'mult'; the recipe says attention = {here.attention!r}, add = {here.add!r}, rest = {here.rest!r}"
            )
    report = Report()
    for name in names:
        _convert(model, name, recipe, report)
    model.shiftaddvit_recipe, model.shiftaddvit_report = recipe, report
    return model


def _convert(model: GNT, name: str, recipe: Recipe, report: Report) -> None:
    module = model.get_submodule(name)
    if isinstance(module, FeedForward):
        for linear in ("fc1", "fc2"):
            swap_layer(model, f"{name}.{linear}", recipe.at(f"{name}.{linear}").mlp, recipe, report)
        return
    linears = ("q_fc", "k_fc", "v_fc", "out_fc")
    if isinstance(module, RayAttention) and recipe.at(name).attention == "linear":
        replace_module(model, name, _angular(module, name, recipe.at(name), report))
        linears = ("qkv", "proj")
    for linear in linears:
        swap_layer(model, f"{name}.{linear}", recipe.at(f"{name}.{linear}").attn_linear, recipe, report)


def _angular(dense: RayAttention, name: str, recipe: Recipe, report: Report) -> RayAngularAttention:
    weight = torch.cat([layer.weight.detach() for layer in (dense.q_fc, dense.k_fc, dense.v_fc)])
    qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    qkv.weight.data.copy_(weight)
    add = recipe.binary if recipe.add == "quant" else None
    attention = RayAngularAttention(qkv, dense.out_fc, dense.heads, weight.shape[1] // dense.heads, add, recipe.angular)
    report.used.extend((f"{name}.{part}_fc", f"{name}.qkv[{part}]") for part in "qkv")
    report.used.append((f"{name}.out_fc", f"{name}.proj"))
    if attention.token_conv is not None:
        report.made.append((f"{name}.token_conv.weight", "zeros"))
    report.dropped.append((f"{name}.dp", "dropout"))
    return attention.to(weight.device).train(dense.training)
