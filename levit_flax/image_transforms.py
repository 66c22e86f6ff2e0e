"""Resize, crop, rescale and stack pixel values, as transformers does."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from .images import ImageError, _exceeds_pixel_limit

# LeViT is evaluated on images resized to 256 pixels and cropped to 224. Source: facebookresearch/LeViT datasets.py.
_RESIZE_RATIO = 256 / 224


class _Inputs(dict[str, Any]):
    """The result of a processor: a dictionary whose entries are also attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"The result has no {name}: it has {', '.join(self)}.")
        return self[name]


@functools.cache
def _register_inputs() -> None:
    """Let JAX's transformations take the result of a processor, as they take dictionaries."""
    import jax

    def flatten(inputs: _Inputs) -> tuple[list[tuple[Any, Any]], Any]:
        return [(jax.tree_util.DictKey(name), value) for name, value in inputs.items()], tuple(inputs)

    jax.tree_util.register_pytree_with_keys(
        _Inputs,
        flatten,
        lambda names, values: _Inputs(zip(names, values, strict=True)),
    )


def _resize(image: Image.Image | np.ndarray, size: Mapping[str, int], resample: int) -> np.ndarray:
    """Resize with Pillow and return [H W C]; float values in [0, 1] are quantized to 8 bits and scaled back."""
    scaled = False
    if not isinstance(image, Image.Image):
        if image.shape[-1] > 4:
            raise ImageError(
                f"The image cannot be resized: expected at most 4 channels, found [H W C] shape {image.shape}."
            )
        levels, scaled = _to_levels(image)
        image = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    width, height = _resized_dimensions(*image.size, size)
    if _exceeds_pixel_limit(width, height):
        raise ImageError(
            f"The image of {image.width} x {image.height} pixels would be too large after resizing: expected at most"
            f" {Image.MAX_IMAGE_PIXELS:,} pixels, found {width} x {height}. Crop it first, or set size to (height,"
            " width)."
        )
    resized = np.asarray(image.resize((width, height), Image.Resampling(resample)))
    if resized.ndim == 2:
        resized = resized[:, :, None]
    return _rescale(resized, 1 / 255) if scaled else resized


def _to_levels(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return pixel values as uint8 levels, and whether they were in [0, 1]."""
    if pixels.dtype == np.uint8:
        return pixels, False
    low, high = pixels.min(), pixels.max()
    if low >= 0 and high <= 255:
        if pixels.dtype.kind != "f" or np.allclose(pixels, pixels.astype(int)):
            return pixels.astype(np.uint8), False
        if high <= 1:
            return _rescale(pixels, 255).astype(np.uint8), True
    raise _out_of_range(pixels)


def _out_of_range(pixels: np.ndarray) -> ImageError:
    return ImageError(
        "The pixel values are out of range: expected integers from 0 to 255 or values in [0, 1], found"
        f" {pixels.min()} to {pixels.max()}. Scale them to one of these ranges."
    )


def _resized_dimensions(width: int, height: int, size: Mapping[str, int]) -> tuple[int, int]:
    if "height" in size:
        return size["width"], size["height"]
    short = int(_RESIZE_RATIO * size["shortest_edge"])
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _crop(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Crop [height width C] from an image, padding with black outside of it."""
    inside = pixels[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    if inside.shape[:2] == (height, width):
        return inside
    canvas = np.zeros((height, width, pixels.shape[2]), pixels.dtype)
    top, left = max(-top, 0), max(-left, 0)
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return canvas


def _rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    return (pixels.astype(np.float64) * factor).astype(np.float32)  # via float64, as in transformers


def _per_channel(name: str, value: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    if isinstance(value, float):
        return (value,) * channels
    if len(value) != channels:
        raise ValueError(f"{name} must be one number, or one for each of the {channels} channels, found {len(value)}.")
    return value


def _to_tensors(images: list[np.ndarray], return_tensors: str | None) -> Any:
    if return_tensors is None:
        return images
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise ImageError(
            f"The images cannot be stacked: expected equal shapes, found {shapes}. Crop them with do_center_crop=True,"
            " or pass return_tensors=None for a list."
        )
    batch = np.stack(images)
    if return_tensors == "jax":
        import jax.numpy as jnp

        _register_inputs()
        return jnp.asarray(batch)
    if return_tensors == "pt":
        try:
            import torch
        except ImportError as error:
            raise ImportError(
                'return_tensors="pt" requires PyTorch, which is not installed. Install torch, or use "jax" or "np".'
            ) from error
        return torch.from_numpy(batch)
    return batch
