"""Decode image files, PIL images and arrays to RGB."""

import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .image_sources import _DECODING, ImageError, _is_data_url, _is_encoded, _opened_source

__all__ = ["ImageError"]

_CHANNEL_COUNTS = (1, 3, 4)  # gray, RGB, RGBA

# Pillow's decoders raise far more than OSError on damaged files.
_DECODER_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError),
    *(struct.error, zlib.error),
)


# The formats that Pillow decodes itself. For others, such as EPS, it starts another program.
_FORMATS = frozenset("AVIF BMP DIB GIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP XBM".split())


def _load_image(source: Any, channels: int = 3, held: ExitStack | None = None) -> Image.Image:
    """Read the first frame of an encoded image, rotated by its EXIF orientation, as transformers does.

    The format is detected from the content. 16-bit images are scaled to 8 bits.

    Args:
        source: a path, an http or https URL, bytes, or an open binary file.
        channels: 1 for gray, 3 for RGB without the alpha channel, 4 for RGBA.
        held: keeps the memory of the decoded image reserved until it is closed; None releases it on return.

    Source: transformers image_utils.py (`_load_image`).
    """
    with _opened(source) as image, ExitStack() as released:
        (released if held is None else held).enter_context(_DECODING.reserve(_decoded_bytes(image)))
        ImageOps.exif_transpose(image, in_place=True)
        return _with_channels(image, channels)


def _check_header(source: Any) -> None:
    """Raise the errors of `_load_image` that can be detected without decoding the pixels."""
    with _opened(source):
        pass


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """Open an encoded image without decoding its pixels."""
    with _opened_source(source) as (file, name), _decoding(name):
        image = Image.open(file, formats=_installed_formats())
        if _exceeds_pixel_limit(*image.size):
            raise Image.DecompressionBombError(f"({image.width * image.height} pixels)")  # as Pillow says it
        yield image


def _decoded_bytes(image: Image.Image) -> int:
    """Return an upper estimate of the memory in bytes for decoding an image and converting it to RGB."""
    per_pixel = 20 if image.format == "JPEG2000" else 11  # its decoder has four bytes per channel
    return image.width * image.height * per_pixel


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Convert the errors that Pillow raises while decoding the image `name` to an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        match = re.search(r"\((\d+) pixels\)", str(error))
        raise ImageError(
            f"{name} is too large: expected at most {Image.MAX_IMAGE_PIXELS:,} pixels, found"
            f" {f'{int(match[1]):,}' if match else 'more'}. If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image: expected one of the formats {', '.join(sorted(_installed_formats()))}."
        ) from error
    except (AssertionError, *_DECODER_ERRORS) as error:
        if isinstance(error, AssertionError) or "closed" in str(error):  # Pillow's answers if the image or file is
            raise ImageError(
                f"{name} is closed: expected an open image. Call its load() before closing its file."
            ) from error
        raise ImageError(f"{name} cannot be decoded and is probably damaged ({error}).") from error


@contextmanager
def _naming(image: Any) -> Iterator[None]:
    """Add the name of an image file to the errors that do not have it."""
    try:
        yield
    except ImageError as error:
        if not isinstance(image, str | os.PathLike) or str(image) in str(error) or _is_data_url(image):
            raise
        raise ImageError(f"{image}: {error}") from error


def _exceeds_pixel_limit(width: int, height: int) -> bool:
    """Return whether an image has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`."""
    return Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert to gray (1 channel), RGB (3) or RGBA (4), scaling 16 bits to 8."""
    if channels == 4 and image.mode in ("RGBA", "LA", "PA", "P"):
        return image.convert("RGBA")
    rgb = _opaque_rgb(image)
    return rgb if channels == 3 else rgb.convert("L" if channels == 1 else "RGBA")


def _opaque_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, dropping transparency and scaling 16 bits to 8."""
    if image.mode == "F" or image.mode.startswith("I"):  # "I", "I;16", "I;16B", ...
        return _to_eight_bits(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts it to
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns if a palette with transparency is converted directly to RGB
    if image.mode == "RGB":
        image.load()  # before the caller closes the file
        return image
    return image.convert("RGB")


def _rgb_over_white(image: Image.Image) -> Image.Image:
    """Convert to RGB, blending transparent pixels with white."""
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if not transparent or image.mode.startswith("I"):
        return _opaque_rgb(image)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


# The ranges of images of modes "F" and "I": (smallest and largest maximum, scale to levels from 0 to 255). Between them
# are those of images with 10 or 12 bits, for example, whose range cannot be told from their values.
_RANGES = ((0, 1, 255.0), (2, 255, 1.0), (4096, 65535, 1 / 257))
_OVERSHOOT = 0.05  # share of the range by which resampling exceeds it


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of mode "F", "I" or "I;16" with levels 0 to 255; its range follows from its values."""
    values = np.asarray(image)
    _require_finite(values)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        ranges: tuple[tuple[float, float, float], ...] = ((0, 255, 1.0), (256, 65535, 1 / 257))
    else:
        ranges = _RANGES if image.mode == "F" else ((0, 255, 1.0), _RANGES[-1])
    for least, most, scale in ranges:
        slack = _OVERSHOOT * most if image.mode == "F" else 0
        if least <= high <= most + slack and low >= -slack:
            return Image.fromarray(np.round(np.clip(values, 0, most) * scale).astype(np.uint8))
    raise ImageError(
        f"The range of the image is not known: expected values in [0, 1], [0, 255] or [0, 65535], found {low} to"
        f" {high}. Scale them to one of these ranges."
    )


def _installed_formats() -> list[str]:
    """Return the image formats that can be decoded: those of `_FORMATS` that this build of Pillow has."""
    Image.init()
    return [name for name in Image.OPEN if name in _FORMATS]


def _image_suffixes() -> frozenset[str]:
    """Return the lower-case file name suffixes of the image formats that can be decoded."""
    formats = {*_installed_formats(), "MPO"}  # the JPEG decoder opens MPO
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def _is_one_image(images: Any) -> bool:
    """Return whether an argument is one image and not a list or a batch."""
    if isinstance(images, list | tuple):
        return False
    return _is_encoded(images) or isinstance(images, Image.Image) or images is None or _as_array(images).ndim < 4


def _flatten_images(images: Any) -> Iterator[Any]:
    """Yield the single images of nested lists and batches; `images` is as in `LevitImageProcessor.preprocess`."""
    if isinstance(images, list | tuple):
        for item in images:
            yield from _flatten_images(item)
    elif images is None or _is_encoded(images) or isinstance(images, Image.Image):
        yield images
    else:
        array = _as_array(images)
        if array.ndim == 4:
            yield from array
        else:
            yield array


def _read_image(
    image: Any, input_data_format: str | None, channels: int | None, held: ExitStack
) -> Image.Image | np.ndarray:
    """Return an image as a PIL image or as an array [H W C].

    `channels` is the number of channels to convert to; None converts files to RGB and nothing else. `held` is as in
    `_load_image`.
    """
    if image is None:
        raise ImageError("The image is missing: expected an image, found None.")
    if _is_encoded(image):
        return _load_image(image, channels or 3, held)
    if isinstance(image, Image.Image):
        if image.format == "EPS":  # Pillow would start Ghostscript
            raise ImageError("The PIL image is not decoded: expected pixels, found an EPS file. Convert it to PNG.")
        if 0 in image.size:
            raise ImageError(f"The PIL image is empty: expected at least one pixel, found size {image.size}.")
        with _decoding("The PIL image"):  # PIL images can be lazy
            if channels is not None:
                return _rgb_over_white(image) if channels == 3 else _with_channels(image, channels)
            image, input_data_format = np.asarray(image), "channels_last"
    pixels = _channels_last(_as_array(image), input_data_format)
    return pixels if channels is None else _array_with_channels(pixels, channels)


def _as_array(image: Any) -> np.ndarray:
    if not hasattr(image, "__array__"):
        raise TypeError(
            "An image has the wrong type: expected a path, a URL, bytes, an open file, a PIL image, an array or a list"
            f" of these, found {type(image).__name__}."
        )
    try:
        if str(getattr(image, "dtype", "")) == "torch.bfloat16":  # unknown to NumPy
            image = image.float()
        array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"The {type(image).__name__} cannot be converted to a NumPy array ({error}).") from error
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.name == "bfloat16":  # from JAX; Pillow and most of NumPy do not compute with it
        return array.astype(np.float32)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"An image array has the wrong dtype: expected uint8 or float32, found {array.dtype}.")
    return array


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """Return an image [H W], [H W C] or [C H W] as [H W C], or raise ImageError if the array is not an image."""
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim != 3:
        raise ImageError(
            f"An image array has the wrong rank: expected 2 or 3 axes, or 4 for a batch, found shape {array.shape}."
        )
    elif (input_data_format or _infer_format(array.shape)) == "channels_first":
        array = np.moveaxis(array, 0, -1)
    if array.size == 0:
        raise ImageError(f"An image array is empty: expected at least one pixel, found [H W C] shape {array.shape}.")
    _require_finite(array)
    return array


def _infer_format(shape: tuple[int, ...]) -> str:
    first, last = (shape[axis] in _CHANNEL_COUNTS for axis in (0, -1))
    if not first and not last:
        raise ImageError(
            "An image array has the wrong number of channels: expected 1, 3 or 4 on the first or last axis, found shape"
            f" {shape}."
        )
    if first and last:
        warnings.warn(
            f"The channel axis of an array of shape {shape} is ambiguous, and channels first is assumed. Pass"
            " input_data_format to choose.",
            stacklevel=6,  # the caller of the processor
        )
    return "channels_first" if first else "channels_last"


def _require_finite(array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ImageError("The image is not valid: expected finite pixel values, found NaN or infinity.")


def _array_with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert [H W C] to the number of channels."""
    if pixels.shape[-1] == channels:
        return pixels
    rgb = _array_to_rgb(pixels)
    if channels == 3:
        return rgb
    if channels == 1:
        gray: np.ndarray = rgb @ np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow converts
        integer = rgb.dtype.kind in "iu"
        return (np.round(gray) if integer else gray).astype(rgb.dtype)[..., None]
    opaque = 255 if rgb.dtype.kind in "iu" or rgb.max() > 1 else 1
    return np.concatenate([rgb, np.full((*rgb.shape[:2], 1), opaque, rgb.dtype)], axis=-1)


def _array_to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert [H W C] to [H W 3]: repeat a gray channel, and blend transparent pixels with white."""
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] == 3:
        return pixels
    if pixels.shape[-1] != 4:
        raise ImageError(
            f"An image array has the wrong number of channels: expected 1, 3 or 4, found [H W C] shape {pixels.shape}."
        )
    if pixels.dtype.kind == "f" and (pixels.min() < 0 or pixels.max() > 1):
        raise ImageError(
            "A float image with an alpha channel is out of range: expected values in [0, 1], found"
            f" {pixels.min()} to {pixels.max()}."
        )
    integer = pixels.dtype.kind in "iu"
    white = 255 if integer else 1.0
    alpha = pixels[..., 3:] / white
    rgb: np.ndarray = alpha * pixels[..., :3] + (1 - alpha) * white
    return (np.round(rgb) if integer else rgb).astype(pixels.dtype)
