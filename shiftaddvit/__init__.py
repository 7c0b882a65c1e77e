"""ShiftAddViT: a pre-trained vision transformer in, one that shifts and adds out."""

__version__ = "0.1.0"
