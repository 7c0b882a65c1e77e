"""GNT deployed: weights prepared once, fused kernels, one CUDA graph for a chunk of rays (docs/nvs.md)."""

from .engine import RayEngine, deploy_gnt

__all__ = ["RayEngine", "deploy_gnt"]
