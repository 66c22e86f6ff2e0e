"""Preprocess images for LeViT, bit for bit like transformers' PIL processor."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from . import files
from .hub import _HubOptions, _resolve
from .image_settings import (
    _FIXED_KEYS,
    _HOUSEKEEPING_KEYS,
    _check_choice,
    _check_fixed,
    _parse_flag,
    _parse_number,
    _parse_numbers,
    _parse_resample,
    _parse_size,
)
from .image_transforms import _crop, _Inputs, _out_of_range, _per_channel, _rescale, _resize, _to_tensors
from .images import ImageError, _flatten_images, _naming, _read_image

_PROCESSOR_FILE = "preprocessor_config.json"

_TIMM_CROP_PCT = 0.9  # used for the accuracies that timm reports for LeViT

_RETURN_TYPES = (None, "np", "jax", "pt")
_DATA_FORMATS = ("channels_last", "channels_first")

# The names of this processor in the files of different transformers versions.
_PROCESSOR_TYPES = ("LevitImageProcessor", "LevitImageProcessorFast", "LevitImageProcessorPil", "LevitFeatureExtractor")

# The default number of each setting; None in a call or a file means this value.
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": 224,
    "resample": Image.Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
    "do_convert_rgb": True,
}


class LevitImageProcessor:
    """Resize, crop, rescale and normalize images for LeViT.

    The results are bit-for-bit equal to those of transformers' `LevitImageProcessorPil`, except for these deliberate
    differences:

    - The output is channels last by default; pass `data_format="channels_first"` for the other order.
    - `do_convert_rgb` is True by default, so that gray, palette, CMYK and transparent images work. As in transformers,
      the alpha channel of PIL images and arrays is blended with white, and that of image files is dropped.
    - 16-bit images (modes "I" and "I;16") and floating-point images (mode "F") are scaled to 8 bits, by the range of
      their values: [0, 1], [0, 255] or [0, 65535]. Pillow's conversion would clip them. Boolean images have the levels
      0 and 255.
    - An error is raised for pixel values that are not finite, and for images that have more than
      `PIL.Image.MAX_IMAGE_PIXELS` pixels before or after resizing.

    Args:
        do_resize: whether to resize. For this and all other settings, None means the default.
        size: n or {"shortest_edge": n} resizes the shorter edge to int(256 / 224 * n) pixels and keeps the aspect
            ratio. (height, width) or {"height": h, "width": w} resizes to exactly this size in pixels.
        resample: the resampling filter, a `PIL.Image.Resampling` value or its name. LeViT is evaluated with bicubic
            resampling, the default.
        do_center_crop: whether to crop the center. Images smaller than the crop are padded with black.
        crop_size: n, (height, width) or {"height": h, "width": w}, in pixels.
        do_rescale: whether to multiply pixel values by `rescale_factor`.
        rescale_factor: factor that maps the levels 0 to 255 to the range of `image_mean`, [0, 1] by default.
        do_normalize: whether to subtract `image_mean` and divide by `image_std`.
        image_mean: one number, or one per channel. The default is ImageNet's.
        image_std: one number, or one per channel. The default is ImageNet's.
        do_convert_rgb: whether to convert all images to RGB, or to gray or RGBA if `image_mean` has one or four
            numbers.
        **ignored: settings of transformers' processors that do not affect the pixels of a single image, such as
            `device` and `disable_grouping`, and `do_pad=False` and `default_to_square=False`.

    Raises:
        ValueError: a setting is invalid or not supported.
        TypeError: there is no such setting.

    Examples:
        >>> processor = LevitImageProcessor(size=160, crop_size=160)
        >>> processor(np.zeros((100, 200, 3), np.uint8), return_tensors="np")["pixel_values"].shape
        (1, 160, 160, 3)

    Source: transformers models/levit/image_processing_pil_levit.py; facebookresearch/LeViT datasets.py.
    """

    def __init__(
        self,
        *,
        do_resize: bool | None = None,
        size: int | Sequence[int] | Mapping[str, int] | None = None,
        resample: int | str | None = None,
        do_center_crop: bool | None = None,
        crop_size: int | Sequence[int] | Mapping[str, int] | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_rgb: bool | None = None,
        **ignored: Any,
    ) -> None:
        _check_fixed(ignored)
        unknown = sorted(ignored.keys() - _HOUSEKEEPING_KEYS - _FIXED_KEYS.keys())
        if unknown:
            raise TypeError(f"LevitImageProcessor has no setting {', '.join(unknown)}. It has {', '.join(_DEFAULTS)}.")

        def given(name: str, value: Any) -> Any:
            return _DEFAULTS[name] if value is None else value

        # `preprocess`, `to_dict` and `from_dict` rely on the attributes being exactly the parameters.
        self.do_resize = _parse_flag("do_resize", given("do_resize", do_resize))
        self.size = _parse_size("size", given("size", size), shortest_edge=True)
        self.resample = _parse_resample(given("resample", resample))
        self.do_center_crop = _parse_flag("do_center_crop", given("do_center_crop", do_center_crop))
        self.crop_size = _parse_size("crop_size", given("crop_size", crop_size), shortest_edge=False)
        self.do_rescale = _parse_flag("do_rescale", given("do_rescale", do_rescale))
        self.rescale_factor = _parse_number("rescale_factor", given("rescale_factor", rescale_factor))
        self.do_normalize = _parse_flag("do_normalize", given("do_normalize", do_normalize))
        self.image_mean = _parse_numbers("image_mean", given("image_mean", image_mean))
        self.image_std = _parse_numbers("image_std", given("image_std", image_std))
        self.do_convert_rgb = _parse_flag("do_convert_rgb", given("do_convert_rgb", do_convert_rgb))
        if np.any(np.abs(np.atleast_1d(self.image_std)) < np.finfo(np.float32).tiny):
            raise ValueError(f"image_std must not be zero, because pixels are divided by it, found {image_std!r}.")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        data_format: str | None = "channels_last",
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> dict[str, Any]:
        """Convert one image or several to pixel values for the model.

        Args:
            images: a path, an http, https or data URL, bytes, an open binary file, a PIL image, an array [H W],
                [H W C] or [C H W] (NumPy, JAX or PyTorch), a batch of these with 4 axes, or a list of any of them.
                Float arrays contain values in [0, 1] or integers from 0 to 255.
                Image files are rotated by their EXIF orientation, and the first frame of an animation is used.
            return_tensors: "np", "jax" or "pt" (PyTorch) returns one array for the batch; None returns a list of NumPy
                arrays, one per image, whose sizes may differ.
            data_format: "channels_last" or None for [B H W C], "channels_first" for [B C H W].
            input_data_format: channel order of the arrays in `images`, "channels_last" or "channels_first"; None infers
                it from the shapes. "none" is for arrays [H W] without a channel axis.
            **overrides: parameters of the class, for this call only; None keeps the setting.

        Returns:
            {"pixel_values": ...}, whose entry is also an attribute, float32 if images are rescaled or normalized.

        Raises:
            ImageError: an image cannot be used, or images of different sizes cannot be stacked.
            FileNotFoundError: a file does not exist.
            TypeError: an object is not an image, or an override is not a parameter of the class.
            ValueError: a setting is invalid.
            ImportError: `return_tensors` is "pt", and PyTorch is not installed.

        Examples:
            >>> images = [np.zeros((100, 200, 3), np.uint8), Image.new("L", (300, 250))]
            >>> LevitImageProcessor().preprocess(images, return_tensors="jax")["pixel_values"].shape
            (2, 224, 224, 3)
        """
        _check_choice("return_tensors", return_tensors, _RETURN_TYPES)
        _check_choice("data_format", data_format, (None, *_DATA_FORMATS))
        # Constructed even without overrides, to validate attributes that were assigned since construction.
        given = {name: value for name, value in overrides.items() if value is not None}
        processor = type(self)(**{**vars(self), **given})
        images = list(_flatten_images(images))
        if not images:
            raise ImageError("There are no images: expected at least one, found an empty list or batch.")
        results = []
        for index, image in enumerate(images):
            try:
                pixels = processor.rescale_and_normalize(processor.resize_and_crop(image, input_data_format))
            except ImageError as error:
                if len(images) == 1:
                    raise
                raise ImageError(f"Image {index} of {len(images)} (counted from 0): {error}") from error
            if data_format == "channels_first":
                pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
            results.append(pixels)
        return _Inputs(pixel_values=_to_tensors(results, return_tensors))

    __call__ = preprocess

    def resize_and_crop(self, image: Any, input_data_format: str | None = None) -> np.ndarray:
        """Read, resize and crop one image: the first half of `preprocess`.

        Args:
            image: a path, an http or https URL, bytes, an open binary file, a PIL image, or an array [H W], [H W C] or
                [C H W].
            input_data_format: channel order of an array, "channels_last", "channels_first" or "none" for [H W]; None
                infers it from the shape.

        Returns:
            An array [H W C] of uint8 levels, or of float32 in [0, 1] if the image is a float array in that range. It
            may share memory with `image`.

        Raises:
            ImageError: the image cannot be used.
            FileNotFoundError: the file does not exist.
            TypeError: `image` is not an image.

        Examples:
            >>> pixels = LevitImageProcessor().resize_and_crop(Image.new("RGB", (400, 300), "red"))
            >>> pixels.shape, pixels.dtype.name, pixels[0, 0].tolist()
            ((224, 224, 3), 'uint8', [255, 0, 0])
        """
        _check_choice("input_data_format", input_data_format, (None, "none", *_DATA_FORMATS))
        with ExitStack() as held, _naming(image):
            image = _read_image(image, input_data_format, self._channels if self.do_convert_rgb else None, held)
            if self.do_resize:
                image = _resize(image, self.size, self.resample)
            pixels = np.asarray(image)
            if pixels.ndim == 2:
                pixels = pixels[:, :, None]
            if self.do_rescale and (pixels.min() < 0 or pixels.max() > 255):
                raise _out_of_range(pixels)
        if self.do_center_crop:
            height, width = self.crop_size["height"], self.crop_size["width"]
            top, left = self.crop_offset(pixels.shape[0] - height), self.crop_offset(pixels.shape[1] - width)
            pixels = _crop(pixels, top, left, height, width)
        return pixels

    @property
    def _channels(self) -> int:
        """The number of channels of the result: 1, 3 or 4."""
        return len(self.image_mean) if isinstance(self.image_mean, tuple) and len(self.image_mean) in (1, 4) else 3

    def crop_offset(self, margin: int) -> int:
        """Return the offset of the center crop, in pixels.

        Args:
            margin: length of the image's edge minus that of the crop, in pixels. If negative, so is the offset, and the
                image is padded with black.

        Examples:
            >>> LevitImageProcessor().crop_offset(33)
            16
        """
        return margin // 2

    def rescale_and_normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Rescale and normalize pixel values: the second half of `preprocess`.

        Args:
            pixels: [... C], as returned by `resize_and_crop`.

        Returns:
            An array [... C], float32 except in two cases: if neither step is enabled, the dtype is unchanged, and
            arrays of another float dtype keep it.

        Raises:
            ValueError: `image_mean` or `image_std` does not fit the number of channels.

        Examples:
            >>> processor = LevitImageProcessor(image_mean=0.5, image_std=0.5)
            >>> processor.rescale_and_normalize(np.array([[[0, 255, 0]]], np.uint8)).tolist()
            [[[-1.0, 1.0, -1.0]]]
        """
        if self.do_rescale and pixels.dtype.kind == "f" and pixels.min() >= 0 and 0 < pixels.max() <= 1:
            warnings.warn(
                "The pixel values are already in [0, 1], and do_rescale=True rescales them again. Pass do_rescale=False"
                " if they are not levels from 0 to 255.",
                stacklevel=3,  # the caller of the processor
            )
        if pixels.dtype != np.uint8 or not (self.do_rescale or self.do_normalize):
            return self._arithmetic(pixels)
        # A table of the 256 results per channel gives the same bits in a fifth of the time.
        levels = np.arange(256, dtype=np.uint8)
        tables = self._arithmetic(np.stack([levels] * pixels.shape[-1], axis=-1)).T.copy()  # [C 256]
        # With mode="clip", NumPy skips the bounds check, which uint8 does not need.
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
        """Build a processor from the content of a `preprocessor_config.json`.

        Args:
            settings: the parsed JSON, written by any version of transformers or by `to_dict`. Settings that are missing
                or None have their defaults. Unknown keys are ignored with a warning.
            **overrides: parameters of the class that replace those in `settings`.

        Returns:
            The processor.

        Raises:
            ValueError: a setting is invalid or unsupported, or the settings belong to another image processor.
            TypeError: an override is not a parameter of the class.

        Examples:
            >>> LevitImageProcessor.from_dict({"size": {"shortest_edge": 160}, "crop_size": 160}).crop_size
            {'height': 160, 'width': 160}
        """
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"The settings have the wrong type: expected a mapping, found a {type(settings).__name__}."
            )
        name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or _PROCESSOR_TYPES[0]
        if name not in _PROCESSOR_TYPES:
            raise ValueError(f"The settings belong to another processor: expected LevitImageProcessor, found {name}.")
        known = vars(cls())
        given = {name: value for name, value in settings.items() if value is not None}
        _check_fixed(given)
        unknown = sorted(given.keys() - known.keys() - _HOUSEKEEPING_KEYS - _FIXED_KEYS.keys())
        if unknown:
            warnings.warn(f"LevitImageProcessor ignores unknown settings: {unknown}.", stacklevel=2)
        return cls(**{**{name: given[name] for name in known if name in given}, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, with the keys of transformers.

        Examples:
            >>> settings = LevitImageProcessor().to_dict()
            >>> settings["image_processor_type"], settings["size"]
            ('LevitImageProcessor', {'shortest_edge': 224})
        """
        return {"image_processor_type": _PROCESSOR_TYPES[0], **json.loads(json.dumps(vars(self)))}

    def to_json_string(self) -> str:
        """Return the settings as the text of a `preprocessor_config.json`.

        Examples:
            >>> json.loads(LevitImageProcessor(size=96).to_json_string())["size"]
            {'shortest_edge': 96}
        """
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write the settings as JSON.

        Args:
            path: the file to write.

        Raises:
            OSError: the file cannot be written.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     LevitImageProcessor(size=96).to_json_file(f"{folder}/processor.json")
            ...     LevitImageProcessor.from_json_file(f"{folder}/processor.json").size
            {'shortest_edge': 96}
        """
        files._write_text(Path(path), self.to_json_string())

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read the settings from a JSON file, as `from_dict` does from its content.

        Args:
            path: the file.

        Raises:
            ValueError: the file does not contain the settings of a LeViT image processor.
            OSError: the file cannot be read.

        Examples:
            >>> from levit_flax.hub import _EMBEDDED_DIRECTORY
            >>> LevitImageProcessor.from_json_file(_EMBEDDED_DIRECTORY / "preprocessor_config.json").crop_size
            {'height': 144, 'width': 144}
        """
        return cls._from_file(Path(path))

    @classmethod
    def _from_file(cls, path: Path, **overrides: Any) -> Self:
        try:
            return cls.from_dict(files._read_json(path), **overrides)
        except ValueError as error:
            if str(path) in str(error):
                raise
            raise ValueError(f"{path} cannot be used: {error}") from None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        **overrides: Any,
    ) -> Self:
        """Load a processor from a directory or a Hub repository.

        Args:
            source: a directory with a `preprocessor_config.json`, a Hub id such as "facebook/levit-128S", or "cifar10",
                the small model in the package.
            revision: branch, tag or commit of a Hub repository; None for its main branch.
            token: access token for the Hub; None for the one stored by `hf auth login` or in HF_TOKEN.
            cache_dir: directory for downloads; None for huggingface_hub's own cache.
            local_files_only: do not access the network.
            subfolder: folder of the directory or repository that contains the file.
            **overrides: parameters of the class that replace those in the file.

        Returns:
            The processor.

        Raises:
            FileNotFoundError: the directory does not exist, or has no `preprocessor_config.json`.
            HubError: the file cannot be downloaded.
            ValueError: the file does not contain the settings of a LeViT image processor.
            TypeError: an override is not a parameter of the class.

        Examples:
            >>> LevitImageProcessor.from_pretrained("cifar10").crop_size
            {'height': 144, 'width': 144}
        """
        options = _HubOptions(revision, token, cache_dir, local_files_only, subfolder)
        directory = _resolve(source, files=(_PROCESSOR_FILE,), options=options).directory
        return cls._from_file(directory / _PROCESSOR_FILE, **overrides)

    def save_pretrained(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> list[str]:
        """Write a `preprocessor_config.json`, which transformers can also read.

        Args:
            directory: the directory to write to; created if it does not exist.
            overwrite: replace an existing file.

        Returns:
            The path of the written file, as the only entry of a list.

        Raises:
            FileExistsError: the file exists and `overwrite` is False.
            NotADirectoryError: `directory` is a file.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     [path] = LevitImageProcessor(size=160, crop_size=160).save_pretrained(folder)
            ...     LevitImageProcessor.from_pretrained(folder).size
            {'shortest_edge': 160}
        """
        directory = Path(directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file: expected a directory for {_PROCESSOR_FILE}.")
        path = directory / _PROCESSOR_FILE
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} already exists. Pass overwrite=True to replace it.")
        self.to_json_file(path)
        return [str(path)]


# Other names of the same processor in transformers.
LevitImageProcessorFast = LevitImageProcessor
LevitFeatureExtractor = LevitImageProcessor


def _size_for_edge(edge: int) -> int:
    """Return the largest `size` with which the processor resizes the shorter edge to at most `edge` pixels.

    int(256 / 224 * size) reaches every edge except those of the form 8k + 7.
    """
    return (7 * edge + 6) // 8
