"""Training: fine-tuning in stages, resumable; and pre-training a dense model with the same loop."""

from .config import FinetuneConfig, StageConfig, pretraining
from .finetune import FinetuneResult, finetune
from .guard import NotFinite
from .interrupt import Interrupted

__all__ = ["FinetuneConfig", "FinetuneResult", "Interrupted", "NotFinite", "StageConfig", "finetune", "pretraining"]
