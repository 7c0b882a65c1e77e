"""The formula."""

import torch
from torch import Tensor


def ray_query(
    q: Tensor, origin: Tensor, direction: Tensor, depths: Tensor, query_weight: Tensor, place_weight: Tensor, heading: Tensor,
    out_weight: Tensor, out_bias: Tensor,
) -> Tensor:  # fmt: skip
    points = (origin[:, None] + depths[:, None] * direction[:, None]).flatten(0, 1)
    angles = points.unsqueeze(-2) * torch.exp2(torch.arange(10, device=q.device, dtype=torch.float32)).unsqueeze(-1)  # (RS, 10, 3)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)
    place = torch.cat([points, waves, points.new_zeros(len(points), 1)], dim=-1).to(q.dtype)
    hidden = (q @ query_weight.t()).float() + (place @ place_weight.t()).float() + heading.repeat_interleave(len(depths), dim=0)
    return ((hidden.relu().to(q.dtype) @ out_weight.t()).float() + out_bias.float()).to(q.dtype)
