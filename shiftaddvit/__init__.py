"""ShiftAddViT: a pre-trained vision transformer in, one that shifts and adds out.

The public names are loaded when they are first used, so importing the package is quick and touches no GPU, file or network.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "AugmentConfig": "data.augment",
    "Evaluation": "evaluation",
    "FinetuneConfig": "train",
    "Recipe": "reparam",
    "StageConfig": "train",
    "UserError": "errors",
    "calibrate": "reparam",
    "compare": "evaluation",
    "create_model": "reparam.architecture",
    "deploy": "engine",
    "energy": "cost",
    "evaluate": "evaluation",
    "export": "portable",
    "finetune": "train",
    "load": "serialization",
    "load_pretrained": "models",
    "pack": "layers",
    "record_routing": "layers",
    "recipes": "reparam",
    "reparameterize": "reparam",
    "round_dense": "serialization",
    "save": "serialization",
    "search": "autorecipe",
    "sensitivity": "evaluation.sensitivity",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'shiftaddvit' has no attribute {name!r}")
    return getattr(import_module(f"shiftaddvit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
