"""From images to the arrays that LeViT takes, bit for bit as transformers' `LevitImageProcessorPil` makes them."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from . import files
from .hub import HubOptions, resolve
from .image_settings import (
    Size,
    check_choice,
    parse_flag,
    parse_number,
    parse_numbers,
    parse_resample,
    parse_size,
)
from .images import ImageError, exceeds_pixel_limit, flatten_images, read_image

PROCESSOR_FILE = "preprocessor_config.json"

TIMM_CROP_PCT = 0.9  # with which timm's accuracies of LeViT were measured
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# LeViT is evaluated on images resized to 256 before the crop of 224. Source: facebookresearch/LeViT datasets.py.
RESIZE_RATIO = 256 / 224

RETURN_TYPES = (None, "np", "jax", "pt")
DATA_FORMATS = ("channels_last", "channels_first")

# The names under which transformers' versions have written this processor.
PROCESSOR_TYPES = ("LevitImageProcessor", "LevitImageProcessorFast", "LevitImageProcessorPil", "LevitFeatureExtractor")

# Written by transformers and without effect on the pixels of a single image: read past in silence.
HOUSEKEEPING_KEYS = frozenset(
    "_processor_class _valid_processor_keys auto_map data_format device disable_grouping feature_extractor_type"
    " image_processor_type image_seq_length input_data_format pad_size processor_class return_tensors use_fast".split()
)

# Would change the pixels: accepted with the value that LeViT has anyway, and refused with any other.
FIXED_KEYS = {"do_pad": False, "default_to_square": False}


class LevitImageProcessor:
    """Resize, crop, rescale and normalize images for LeViT.

    The result has the same bits as that of transformers' `LevitImageProcessorPil` wherever that one has a result, with
    these differences, all on purpose:

    - The output is channels last unless `data_format="channels_first"` is asked for.
    - `do_convert_rgb` is on by default, so that gray, palette, CMYK and transparent images work. As in transformers,
      transparency in a PIL image or an array is laid over white, and dropped from a file that is given by its path.
    - 16-bit images (modes "I" and "I;16") are scaled to 8 bits, where Pillow's conversion would clip them to white.
    - Values that are not finite, images above the pixel limit (`PIL.Image.MAX_IMAGE_PIXELS`, which here also limits
      the image once resized) and settings that are None are refused.

    Args:
        do_resize: whether to resize.
        size: n or {"shortest_edge": n} resizes the shorter edge to int(256 / 224 * n) pixels and keeps the aspect
            ratio; (height, width) or {"height": h, "width": w} resizes to just that.
        resample: Pillow's filter, `PIL.Image.Resampling`; bicubic by default.
        do_center_crop: whether to crop the center; an image smaller than the crop gets black borders.
        crop_size: n, (height, width) or {"height": h, "width": w}.
        do_rescale: whether to multiply the values by `rescale_factor`.
        rescale_factor: what takes levels 0 to 255 to the range that the mean refers to.
        do_normalize: whether to subtract `image_mean` and divide by `image_std`.
        image_mean: one number, or one per channel.
        image_std: one number, or one per channel.
        do_convert_rgb: whether images of every kind become RGB.

    Raises:
        ValueError: a setting is not what it should be; the message names it.

    Example:
        >>> processor = LevitImageProcessor(size=160, crop_size=160)
        >>> processor(np.zeros((100, 200, 3), np.uint8), return_tensors="np")["pixel_values"].shape
        (1, 160, 160, 3)

    Source: transformers models/levit/image_processing_pil_levit.py; facebookresearch/LeViT datasets.py.
    """

    def __init__(
        self,
        *,
        do_resize: bool = True,
        size: Size = 224,
        resample: int = Image.Resampling.BICUBIC,
        do_center_crop: bool = True,
        crop_size: Size = 224,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] = IMAGENET_MEAN,
        image_std: float | Sequence[float] = IMAGENET_STD,
        do_convert_rgb: bool = True,
    ) -> None:
        # The attributes are exactly the parameters: `preprocess`, `to_dict` and `from_dict` rely on it.
        self.do_resize = parse_flag("do_resize", do_resize)
        self.size = parse_size("size", size, shortest_edge=True)
        self.resample = parse_resample(resample)
        self.do_center_crop = parse_flag("do_center_crop", do_center_crop)
        self.crop_size = parse_size("crop_size", crop_size, shortest_edge=False)
        self.do_rescale = parse_flag("do_rescale", do_rescale)
        self.rescale_factor = parse_number("rescale_factor", rescale_factor)
        self.do_normalize = parse_flag("do_normalize", do_normalize)
        self.image_mean = parse_numbers("image_mean", image_mean)
        self.image_std = parse_numbers("image_std", image_std)
        self.do_convert_rgb = parse_flag("do_convert_rgb", do_convert_rgb)
        if 0 in np.atleast_1d(self.image_std):
            raise ValueError(f"image_std must not be zero, because the pixels are divided by it; found {image_std!r}.")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        data_format: str = "channels_last",
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> dict[str, Any]:
        """Turn one image or many into pixel values for the model.

        Args:
            images: a path, a PIL image, an array [H W], [H W C] or [C H W] (NumPy, JAX, PyTorch), an array of four
                dimensions for a batch of these, or a list of any of them. Only files are turned upright by their EXIF
                tag; of an animation the first frame is taken. Float arrays hold values in [0, 1] or whole levels 0 to
                255.
            return_tensors: "np", "jax" or "pt" (PyTorch) for one array of the whole batch; None for a list of NumPy
                arrays, one per image, whose sizes may differ.
            data_format: "channels_last" for [B H W C], "channels_first" for [B C H W].
            input_data_format: the channel order of the arrays in `images`; inferred from their shapes when left out.
            **overrides: any parameter of the class, for this call only.

        Returns:
            A dictionary with "pixel_values", float32 as long as rescaling or normalization is on.

        Raises:
            ImageError: an image cannot be used, or images of different sizes were to become one array.
            FileNotFoundError: a path leads nowhere.
            TypeError: something is not an image, or an override is not a parameter.
            ValueError: a setting is not what it should be.
            ImportError: `return_tensors="pt"` without PyTorch.

        Example:
            >>> images = [np.zeros((100, 200, 3), np.uint8), Image.new("L", (300, 250))]
            >>> LevitImageProcessor().preprocess(images, return_tensors="jax")["pixel_values"].shape
            (2, 224, 224, 3)
        """
        check_choice("return_tensors", return_tensors, RETURN_TYPES)
        check_choice("data_format", data_format, DATA_FORMATS)
        # Built anew even without overrides, so that an attribute that was assigned to is checked as well.
        processor = type(self)(**{**vars(self), **overrides})
        images = list(flatten_images(images))
        if not images:
            raise ImageError("Expected at least one image, found an empty list or batch.")
        results = []
        for index, image in enumerate(images):
            try:
                pixels = processor.rescale_and_normalize(processor.resize_and_crop(image, input_data_format))
            except ImageError as error:
                if len(images) == 1:
                    raise
                raise ImageError(f"Image {index} of the {len(images)} (counted from 0): {error}") from error
            if data_format == "channels_first":
                pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
            results.append(pixels)
        return {"pixel_values": _to_tensors(results, return_tensors)}

    __call__ = preprocess

    def resize_and_crop(self, image: Any, input_data_format: str | None = None) -> np.ndarray:
        """Do the first half of the work for one image: all that comes before the arithmetic on pixel values.

        Args:
            image: a path, a PIL image, or an array [H W], [H W C] or [C H W].
            input_data_format: the channel order of an array; inferred from its shape when left out.

        Returns:
            [H W C]: uint8 levels, or float32 in [0, 1] where the image came as such; it may share memory with it.

        Raises:
            ImageError: the image cannot be used.
            FileNotFoundError: the path leads nowhere.
            TypeError: `image` is not an image.

        Example:
            >>> pixels = LevitImageProcessor().resize_and_crop(Image.new("RGB", (400, 300), "red"))
            >>> pixels.shape, pixels.dtype.name, pixels[0, 0].tolist()
            ((224, 224, 3), 'uint8', [255, 0, 0])
        """
        check_choice("input_data_format", input_data_format, (None, *DATA_FORMATS))
        image = read_image(image, input_data_format, self.do_convert_rgb)
        if self.do_resize:
            image = _resize(image, self.size, self.resample)
        pixels = np.asarray(image)
        if self.do_center_crop:
            height, width = self.crop_size["height"], self.crop_size["width"]
            top, left = self.crop_offset(pixels.shape[0] - height), self.crop_offset(pixels.shape[1] - width)
            pixels = _crop(pixels, top, left, height, width)
        return pixels

    def crop_offset(self, margin: int) -> int:
        """Return where the center crop begins in an edge that is `margin` pixels longer; below 0 for black borders.

        Example:
            >>> LevitImageProcessor().crop_offset(33)
            16
        """
        return margin // 2

    def rescale_and_normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Do the second half of the work: the arithmetic on pixel values.

        Args:
            pixels: [... C], as `resize_and_crop` returns them.

        Returns:
            [... C], float32 unless both steps are off or a float array of another width came in unresized.

        Raises:
            ValueError: `image_mean` or `image_std` does not fit the number of channels.

        Example:
            >>> processor = LevitImageProcessor(image_mean=0.5, image_std=0.5)
            >>> processor.rescale_and_normalize(np.array([[[0, 255, 0]]], np.uint8)).tolist()
            [[[-1.0, 1.0, -1.0]]]
        """
        if self.do_rescale and pixels.dtype.kind == "f" and pixels.min() >= 0 and 0 < pixels.max() <= 1:
            warnings.warn(
                "The image's values are in [0, 1] already, and do_rescale=True shrinks them once more; pass "
                "do_rescale=False if they are not levels 0 to 255.",
                stacklevel=3,  # the caller of the processor
            )
        if pixels.dtype != np.uint8 or not (self.do_rescale or self.do_normalize):
            return self._arithmetic(pixels)
        # 256 levels a channel: looking the results up gives the same bits in a fifth of the time.
        levels = np.arange(256, dtype=np.uint8)
        tables = self._arithmetic(np.stack([levels] * pixels.shape[-1], axis=-1)).T.copy()  # [C 256]
        # A uint8 is never out of range; "clip" spares NumPy the check.
        looked_up = [
            table.take(plane, mode="clip") for table, plane in zip(tables, np.moveaxis(pixels, -1, 0), strict=True)
        ]
        return np.stack(looked_up, axis=-1)

    def _arithmetic(self, pixels: np.ndarray) -> np.ndarray:
        if self.do_rescale:
            pixels = _rescale(pixels, self.rescale_factor)
        if self.do_normalize:
            channels = pixels.shape[-1]
            dtype = pixels.dtype if pixels.dtype.kind == "f" else np.dtype(np.float32)
            mean = np.array(_per_channel("image_mean", self.image_mean, channels), dtype)
            std = np.array(_per_channel("image_std", self.image_std, channels), dtype)
            pixels = (pixels.astype(dtype) - mean) / std
        return pixels

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **overrides: Any) -> Self:
        """Build the processor from the content of a `preprocessor_config.json`.

        Args:
            settings: what any version of transformers, or `to_dict`, wrote. A setting that is absent or None takes its
                default; a key that is unknown is warned of and has no effect.
            **overrides: parameters of the class that replace those in `settings`.

        Raises:
            ValueError: the settings belong to another processor, ask for what LeViT's cannot do, or are malformed.
            TypeError: an override is not a parameter.

        Example:
            >>> LevitImageProcessor.from_dict({"size": {"shortest_edge": 160}, "crop_size": 160}).crop_size
            {'height': 160, 'width': 160}
        """
        kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or PROCESSOR_TYPES[0]
        if kind not in PROCESSOR_TYPES:
            raise ValueError(f"Expected the settings of a LevitImageProcessor, found those of a {kind}.")
        known = vars(cls())
        given = {name: value for name, value in settings.items() if value is not None}
        for name, value in FIXED_KEYS.items():
            if given.get(name, value) != value:
                raise ValueError(f"LevitImageProcessor works with {name}={value} only, found {given[name]!r}.")
        unknown = sorted(given.keys() - known.keys() - HOUSEKEEPING_KEYS - FIXED_KEYS.keys())
        if unknown:
            warnings.warn(f"LevitImageProcessor does not know these settings and leaves them: {unknown}.", stacklevel=2)
        return cls(**{**{name: given[name] for name in known if name in given}, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, under the keys that transformers reads.

        Example:
            >>> settings = LevitImageProcessor().to_dict()
            >>> settings["image_processor_type"], settings["size"]
            ('LevitImageProcessor', {'shortest_edge': 224})
        """
        return {"image_processor_type": PROCESSOR_TYPES[0], **json.loads(json.dumps(vars(self)))}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self:
        """Read the processor from a directory or a Hub repository.

        Args:
            source: a directory with a `preprocessor_config.json`, or the name of a Hub repository.
            revision: branch, tag or commit on the Hub.
            token: access token for the Hub.
            cache_dir: where downloads are kept; Hugging Face's own cache when left out.
            local_files_only: use what is in the cache and do not touch the network.
            **overrides: parameters of the class that replace those in the file.

        Raises:
            FileNotFoundError: there is no such directory, or no `preprocessor_config.json` in it.
            HubError: the Hub did not serve the file.
            ValueError: the file is not the JSON of a LeViT image processor.
            TypeError: an override is not a parameter.

        Example:
            >>> LevitImageProcessor.from_pretrained("cifar10").crop_size
            {'height': 144, 'width': 144}
        """
        options = HubOptions(revision, token, cache_dir, local_files_only)
        directory = resolve(source, files=(PROCESSOR_FILE,), options=options).directory
        path = directory / PROCESSOR_FILE
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}).") from error
        if not isinstance(settings, dict):
            raise ValueError(f"Expected {path} to hold a JSON object, found a {type(settings).__name__}.")
        return cls.from_dict(settings, **overrides)

    def save_pretrained(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `preprocessor_config.json`, which transformers reads too, into a directory.

        Args:
            directory: where to write; made if it does not exist.
            overwrite: whether a file that is there already may be replaced.

        Raises:
            FileExistsError: the file is there already.
            NotADirectoryError: `directory` is a file.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     LevitImageProcessor(size=160, crop_size=160).save_pretrained(folder)
            ...     LevitImageProcessor.from_pretrained(folder).size
            {'shortest_edge': 160}
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"Expected a directory to write {PROCESSOR_FILE} into, but {directory} is a file.")
        path = directory / PROCESSOR_FILE
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists already; pass overwrite=True to replace it.")
        files.write_text(path, json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")


# Names under which transformers has, or had, the same processor.
LevitImageProcessorFast = LevitImageProcessor
LevitFeatureExtractor = LevitImageProcessor


def size_for_edge(edge: int) -> int:
    """Return the largest `size` of the processor that resizes the shorter edge to `edge` pixels or less.

    The processor makes int(256 / 224 * size) pixels of it, which is every number but those 7 above a multiple of 8.
    """
    return (7 * edge + 6) // 8


def _resize(image: Image.Image | np.ndarray, size: Mapping[str, int], resample: int) -> np.ndarray:
    """Resize with Pillow on 8-bit levels and return [H W C]; values in [0, 1] become levels and are scaled back."""
    scaled = False
    if not isinstance(image, Image.Image):
        if image.shape[-1] > 4:
            raise ImageError(f"Pillow resizes images of up to 4 channels, found [H W C] shape {image.shape}.")
        levels, scaled = _to_levels(image)
        image = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    width, height = _resized_dimensions(*image.size, size)
    if exceeds_pixel_limit(width, height):
        raise ImageError(
            f"An image of {image.width} x {image.height} pixels would be resized to {width} x {height}, more than "
            f"the limit of {Image.MAX_IMAGE_PIXELS:,} pixels; crop it first, or set size to (height, width)."
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
    raise ImageError(f"Resizing expects whole levels 0 to 255 or values in [0, 1], found values from {low} to {high}.")


def _resized_dimensions(width: int, height: int, size: Mapping[str, int]) -> tuple[int, int]:
    if "height" in size:
        return size["width"], size["height"]
    short = int(RESIZE_RATIO * size["shortest_edge"])
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _crop(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Cut [height width C] out of an image; what lies outside of it is black."""
    inside = pixels[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    if inside.shape[:2] == (height, width):
        return inside
    canvas = np.zeros((height, width, pixels.shape[2]), pixels.dtype)
    top, left = max(-top, 0), max(-left, 0)
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return canvas


def _rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    return (pixels.astype(np.float64) * factor).astype(np.float32)  # through float64, as transformers does


def _per_channel(name: str, value: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    if isinstance(value, float):
        return (value,) * channels
    if len(value) != channels:
        raise ValueError(f"{name} must be one number or one for each of the {channels} channels, found {len(value)}.")
    return value


def _to_tensors(images: list[np.ndarray], return_tensors: str | None) -> Any:
    if return_tensors is None:
        return images
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise ImageError(
            f"Images of different shapes {shapes} cannot become one array; crop them with do_center_crop=True, or "
            "pass return_tensors=None for a list."
        )
    batch = np.stack(images)
    if return_tensors == "jax":
        import jax.numpy as jnp

        return jnp.asarray(batch)
    if return_tensors == "pt":
        try:
            import torch
        except ImportError as error:
            raise ImportError('return_tensors="pt" needs PyTorch, which is not installed; use "jax".') from error
        return torch.from_numpy(batch)
    return batch
