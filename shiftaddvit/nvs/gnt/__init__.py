"""GNT: a transformer over source views and along rays (Is Attention All That NeRF Needs?, ICLR 2023)."""

from .model import GNT, GNTConfig

__all__ = ["GNT", "GNTConfig"]
