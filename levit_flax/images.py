"""Decode image files, PIL images and arrays to RGB."""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

CHANNEL_COUNTS = (1, 3, 4)  # gray, RGB, RGBA

# Pillow's decoders raise far more than OSError on damaged files.
DECODER_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError),
    *(struct.error, zlib.error),
)


class ImageError(ValueError):
    """An image cannot be used; the message says which one and why."""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as transformers' `load_image` does: the first frame, turned upright by its EXIF tag, as RGB.

    Transparency is dropped: the colors that the file stores under it appear. 16-bit images are scaled to 8 bits.

    Args:
        path: the file; its format is told from its content.

    Returns:
        An image of mode "RGB".

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is a directory, empty, not an image, damaged, or above `PIL.Image.MAX_IMAGE_PIXELS`.

    Source: transformers image_utils.py (`load_image`).
    """
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _opaque_rgb(image)


def check_header(path: str | os.PathLike[str]) -> None:
    """Raise what `load_image` raises for a file whose beginning is no image's; nothing is decoded."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image file, whose pixels are not decoded yet."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no image at {path}.")
    if not os.path.isfile(path):
        raise ImageError(f"Expected an image file, but {path} is a directory or a device.")
    if os.path.getsize(path) == 0:
        raise ImageError(f"Expected an image, but {path} is empty (0 bytes).")
    with open(path, "rb") as file, _decoding(str(path)):
        image = Image.open(file)
        if exceeds_pixel_limit(*image.size):
            raise Image.DecompressionBombError
        yield image


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises while it decodes the image `name` into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name} has more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,}; if it can be trusted, raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a format that Pillow reads.") from error
    except DECODER_ERRORS as error:
        raise ImageError(f"{name} cannot be decoded and is probably damaged ({error}).") from error


def exceeds_pixel_limit(width: int, height: int) -> bool:
    """Return whether an image has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`."""
    return Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS


def _opaque_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, dropping transparency and scaling 16 bits to 8."""
    if image.mode.startswith("I"):  # "I", "I;16", "I;16B", ...
        return Image.fromarray(_sixteen_to_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        _require_finite(np.asarray(image))
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns when a palette with transparency becomes RGB directly
    if image.mode == "RGB":
        image.load()  # a file is read here, and closed by the caller
        return image
    return image.convert("RGB")


def _rgb_over_white(image: Image.Image) -> Image.Image:
    """Convert to RGB, laying what is transparent over white."""
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if not transparent or image.mode.startswith("I"):
        return _opaque_rgb(image)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _sixteen_to_eight_bits(levels: np.ndarray) -> np.ndarray:
    if levels.min() < 0 or levels.max() > 65535:
        raise ImageError(f"Expected a 16-bit image with levels 0 to 65535, found {levels.min()} to {levels.max()}.")
    return np.round(levels / 257).astype(np.uint8)  # 65535 = 257 * 255


def image_suffixes() -> frozenset[str]:
    """Return the endings of file names, in lower case, that images have."""
    return frozenset(Image.registered_extensions())


def flatten_images(images: Any) -> Iterator[Any]:
    """Yield the images one by one out of nested lists and batches; the arguments are those of `preprocess`."""
    if isinstance(images, list | tuple):
        for item in images:
            yield from flatten_images(item)
    elif isinstance(images, str | os.PathLike | Image.Image):
        yield images
    else:
        array = _as_array(images)
        if array.ndim == 4:
            yield from array
        else:
            yield array


def read_image(image: Any, input_data_format: str | None, do_convert_rgb: bool) -> Image.Image | np.ndarray:
    """Return the image as an RGB image or as an array [H W C]."""
    if isinstance(image, str | os.PathLike):
        return load_image(image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ImageError(f"Expected an image with at least one pixel, found one of size {image.size}.")
        with _decoding("The PIL image"):  # which may not have read its file yet
            if do_convert_rgb:
                return _rgb_over_white(image)
            image, input_data_format = np.asarray(image), "channels_last"
    pixels = _channels_last(_as_array(image), input_data_format)
    return _array_to_rgb(pixels) if do_convert_rgb else pixels


def _as_array(image: Any) -> np.ndarray:
    if not hasattr(image, "__array__"):
        raise TypeError(f"Expected a path, a PIL image, an array or a list of these, found {type(image).__name__}.")
    try:
        array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"This {type(image).__name__} cannot be read as a NumPy array ({error}).") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"Expected pixels as uint8 or float32, found an array of {array.dtype}.")
    return array


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """Return an image [H W], [H W C] or [C H W] as [H W C], refusing what is not an image."""
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim != 3:
        raise ImageError(f"Expected an array of 3 dimensions, or of 4 for a batch, found shape {array.shape}.")
    elif (input_data_format or _infer_format(array.shape)) == "channels_first":
        array = np.moveaxis(array, 0, -1)
    if array.size == 0:
        raise ImageError(f"Expected an image with at least one pixel, found [H W C] shape {array.shape}.")
    _require_finite(array)
    return array


def _infer_format(shape: tuple[int, ...]) -> str:
    first, last = (shape[axis] in CHANNEL_COUNTS for axis in (0, -1))
    if not first and not last:
        raise ImageError(f"Expected an image with 1, 3 or 4 channels first or last, found an array of shape {shape}.")
    if first and last:
        warnings.warn(
            f"An array of shape {shape} can be read both ways and is taken as channels first; pass input_data_format.",
            stacklevel=6,  # the caller of the processor
        )
    return "channels_first" if first else "channels_last"


def _require_finite(array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ImageError("Expected finite pixel values, found NaN or infinity in the image.")


def _array_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Repeat a gray image's channel, or lay a transparent image over white; [H W C] to [H W 3]."""
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] == 3:
        return pixels
    if pixels.shape[-1] != 4:
        raise ImageError(f"Expected an image with 1, 3 or 4 channels, found [H W C] shape {pixels.shape}.")
    if pixels.dtype.kind == "f" and (pixels.min() < 0 or pixels.max() > 1):
        raise ImageError(
            f"Expected a transparent float image with values in [0, 1], found {pixels.min()} to {pixels.max()}."
        )
    whole = pixels.dtype.kind in "iu"
    white = 255 if whole else 1.0
    alpha = pixels[..., 3:] / white
    rgb: np.ndarray = alpha * pixels[..., :3] + (1 - alpha) * white
    return (np.round(rgb) if whole else rgb).astype(pixels.dtype)
