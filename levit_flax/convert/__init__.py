"""Between PyTorch LeViT checkpoints and Flax variables. PyTorch itself is not needed."""

from .conversion import from_torch, save_torch, to_torch
from .errors import ConversionError
from .layouts import WRITTEN_LAYOUTS

__all__ = ["WRITTEN_LAYOUTS", "ConversionError", "from_torch", "save_torch", "to_torch"]
