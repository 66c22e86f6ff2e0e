"""Proof of a conversion: the same inputs through PyTorch and through the converted model."""

import importlib.util
from typing import NamedTuple

import jax
import numpy as np

from .conversion import Conversion
from .sources import Source

PROBES = 2
PROBE_SEED = 0

# Float32 rounding through some sixty layers stays a few times below this; a wrong tensor is far above it.
PARITY_LIMIT = 1e-5


class Comparison(NamedTuple):
    """How far two results are apart.

    Attributes:
        absolute: the largest difference of two logits.
        relative: the same as a share of the largest logit.
    """

    absolute: float
    relative: float

    @property
    def passed(self) -> bool:
        """Whether the results agree within the limit."""
        return self.relative <= PARITY_LIMIT


def compare(result: np.ndarray, reference: np.ndarray) -> Comparison:
    """Return the largest difference between two arrays of logits."""
    absolute = float(np.abs(result - reference).max())
    return Comparison(absolute, absolute / float(np.abs(reference).max()))


def forward(conversion: Conversion, pixel_values: np.ndarray) -> np.ndarray:
    """Return the first output of the converted model for float32 pixels [B H W C], at full precision."""
    model = conversion.model.clone(precision="highest")
    apply = jax.jit(lambda variables, pixels: model.apply(variables, pixels, return_dict=False)[0])
    return np.asarray(apply(conversion.variables, pixel_values))


def transformers_is_installed() -> bool:
    """Return whether there is a PyTorch model to compare with."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def compare_with_transformers(source: Source, conversion: Conversion) -> Comparison:
    """Run seeded inputs through transformers' model with the source's own tensors, and through the converted one.

    Args:
        source: the opened checkpoint, in transformers' layout.
        conversion: what became of it.

    Returns:
        The difference of the logits (of the last hidden state, for a model without heads) in float32.
    """
    import torch
    import transformers

    config = conversion.model.config
    reference = getattr(transformers, type(conversion.model).__name__)(
        transformers.LevitConfig.from_dict(config.to_dict())
    )
    ignored = set().union(*conversion.ignored.values())
    reference.load_state_dict(
        {
            name: torch.from_numpy(np.array(tensor, np.float32 if tensor.dtype.kind == "V" else tensor.dtype))
            for name, tensor in source.tensors.items()
            if name not in ignored
        }
    )
    shape = (PROBES, *config.image_height_width, config.num_channels)
    pixel_values = np.random.default_rng(PROBE_SEED).standard_normal(shape, np.float32)
    with torch.inference_mode():
        wanted = reference.float().eval()(torch.from_numpy(pixel_values).permute(0, 3, 1, 2)).to_tuple()[0].numpy()
    return compare(forward(conversion, pixel_values), wanted)
