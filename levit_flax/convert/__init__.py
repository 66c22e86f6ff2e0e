"""Convert PyTorch LeViT checkpoints to Flax variables and back, without PyTorch."""

from levit_flax.choices import WRITTEN_LAYOUTS

from .conversion import from_torch
from .errors import ConversionError
from .writing import save_torch, to_torch

__all__ = ["WRITTEN_LAYOUTS", "ConversionError", "from_torch", "save_torch", "to_torch"]
