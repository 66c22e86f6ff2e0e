"""Check the inputs of the models."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .configuration import LevitConfig


def _check_pixel_values(pixel_values: jax.Array, config: LevitConfig) -> None:
    """Raise ValueError unless `pixel_values` is a float batch [B H W C] of the config's image size and channels."""
    if not hasattr(pixel_values, "shape"):
        raise TypeError(f"pixel_values must be an array, found {type(pixel_values).__name__}.")
    shape, channels = pixel_values.shape, config.num_channels
    expected = (*config.image_height_width, channels)
    wanted = f"expected float [B H W C] = [B {' '.join(map(str, expected))}]"
    if len(shape) != 4:
        raise ValueError(
            f"pixel_values must have 4 axes: {wanted}, found {len(shape)} axes {shape}. Add a batch axis to a single"
            " image with pixel_values[None]."
        )
    if shape[1:] == (channels, *expected[:2]) and shape[1:] != expected:
        raise ValueError(
            f"pixel_values is channels first: {wanted}, channels last, found {shape}. Use"
            " jnp.transpose(pixel_values, (0, 2, 3, 1))."
        )
    if shape[3] != channels:
        raise ValueError(
            f"pixel_values has the wrong number of channels: {wanted}, found {shape[3]} channels in {shape}. Convert"
            f" the images, or change the config's num_channels, which is {channels}."
        )
    if shape[1:] != expected:
        raise ValueError(
            f"pixel_values has the wrong image size: {wanted}, found {shape[1]}x{shape[2]} pixels. Resize the images"
            " with LevitImageProcessor, or the model with resize_image."
        )
    if shape[0] == 0:
        raise ValueError(f"pixel_values is an empty batch: {wanted} with at least one image, found {shape}.")
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
        raise ValueError(
            f"pixel_values has the wrong dtype: {wanted}, found {pixel_values.dtype}. Rescale and normalize the images"
            " with LevitImageProcessor."
        )


def _check_features(output_features: bool | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Return the indices, from 0, of the stages whose features are returned, or raise ValueError."""
    if isinstance(output_features, bool):
        return tuple(range(num_stages)) if output_features else ()
    wanted = f"expected True, False, or a tuple of stage indices from 0 to {num_stages - 1}"
    try:
        indices = tuple(operator.index(i) for i in output_features)
        valid = bool(indices) and not any(isinstance(i, bool) for i in output_features)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(
            f"output_features is invalid: {wanted}, found {output_features!r}. Pass a tuple such as (0, 1)."
        )
    if not all(-num_stages <= i < num_stages for i in indices):
        raise ValueError(
            f"output_features has an index out of range: {wanted}, found {output_features!r}. The model has"
            f" {num_stages} stages."
        )
    return tuple(i % num_stages for i in indices)
