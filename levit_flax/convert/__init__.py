"""Convert PyTorch LeViT checkpoints into Flax variables and back, without PyTorch."""

from .conversion import from_torch
from .errors import ConversionError
from .layouts import WRITTEN_LAYOUTS
from .writing import save_torch, to_torch

__all__ = ["WRITTEN_LAYOUTS", "ConversionError", "from_torch", "save_torch", "to_torch"]
