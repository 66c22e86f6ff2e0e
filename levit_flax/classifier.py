"""Classify images with a processor, a compiled model and class names."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from .arguments import _check_types
from .choices import _RUNTIMES
from .hub import _HubOptions
from .image_processing import LevitImageProcessor
from .image_settings import _check_choice
from .images import ImageError, _flatten_images, _is_one_image
from .inference import _InferenceFunction, _scores
from .loading import _load_model, _load_processor
from .modeling import LevitBase, Variables

# Compiling a model for the fastest inference pays off for more images than this.
_FEW_IMAGES = 256
_READ_AHEAD = 2  # images decoded ahead, in batches: enough to keep the device busy


_T = TypeVar("_T")


class ImageClassifier:
    """Classify images with a LeViT model on all local devices.

    Threads decode images while the devices compute. Images are transferred as uint8 and normalized on the device, which
    equals the processor's arithmetic up to float32 rounding. `make_inference_fn` describes how the model is compiled.

    Args:
        model: a model with a classifier. Its heads are merged and its batch norms folded for speed.
        variables: its variables, which are copied to every device.
        processor: image processor; None for the default one with the model's image size.
        batch_size: maximum number of images per batch, rounded up to a multiple of the number of devices.
        devices: devices to compute on; None for all local devices. For the runtime "jax" only.
        runtime: the library that computes: "jax", or on CPUs "openvino" or "onnxruntime", for which the model is
            exported in memory. They require the extras `openvino` and `onnx`.
        fast_start: start sooner and compute more slowly, as described for `make_inference_fn`; for "jax" only.

    Raises:
        ImportError: the runtime is not installed.
        ValueError: the model has no classifier.

    Examples:
        >>> classifier = ImageClassifier.from_pretrained("cifar10")
        >>> [best] = classifier(np.zeros((32, 32, 3), np.uint8), top_k=1)
        >>> sorted(best)
        ['label', 'score']
    """

    @_check_types
    def __init__(
        self,
        model: LevitBase,
        variables: Variables,
        processor: LevitImageProcessor | None = None,
        batch_size: int = 32,
        devices: Sequence[jax.Device] | None = None,
        *,
        runtime: str = "jax",
        fast_start: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}.")
        processor = processor or _load_processor(None, model.config)
        _check_choice("runtime", runtime, _RUNTIMES)
        if runtime == "jax":
            self._function = _InferenceFunction(model, variables, batch_size, processor, devices, fast_start)
        else:
            if devices is not None:
                raise ValueError(f"The runtime {runtime} computes on the CPU: expected devices=None, found {devices}.")
            from .runtimes import _RuntimeFunction

            self._function = _RuntimeFunction(model, variables, batch_size, processor, runtime)
        self.model, self.variables, self.processor = self._function.model, self._function.variables, processor
        self.batch_size: int = self._function.batch_size or 1

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        batch_size: int = 32,
        runtime: str = "jax",
        fast_start: bool = False,
        dtype: Any = None,
        image_size: int | tuple[int, int] | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "ImageClassifier":
        """Load a classifier from a directory or a Hub repository.

        Args:
            source: a directory, a Hub id such as "facebook/levit-128S", or "cifar10", the small model in the package.
            batch_size: maximum number of images per batch, rounded up to a multiple of the number of devices.
            runtime: the library that computes: "jax", "openvino" or "onnxruntime".
            fast_start: start sooner and compute more slowly, as described for `make_inference_fn`.
            dtype: dtype of the weights; None keeps the checkpoint's.
            image_size: input size in pixels, one side or (height, width), for both the model and the processor; None
                keeps the checkpoint's.
            revision: branch, tag or commit of a Hub repository; None for its main branch.
            token: access token for the Hub; None for the one stored by `hf auth login` or in HF_TOKEN.
            cache_dir: directory for downloads; None for huggingface_hub's own cache.
            local_files_only: do not access the network.

        Returns:
            The classifier.

        Raises:
            ValueError: a file is malformed, or weights do not fit the config.
            OSError: the source does not exist, or cannot be read or downloaded.

        Examples:
            >>> classifier = ImageClassifier.from_pretrained("cifar10", batch_size=8, image_size=96)
            >>> classifier.model.config.image_size, classifier.processor.crop_size
            (96, {'height': 96, 'width': 96})
        """
        options = _HubOptions(revision, token, cache_dir, local_files_only)
        model, variables, processor, _ = _load_model(source, options, dtype=dtype, image_size=image_size)
        return cls(model, variables, processor, batch_size, runtime=runtime, fast_start=fast_start)

    def __call__(self, images: Any, top_k: int = 5, *, function_to_apply: str | None = None) -> list[Any]:
        """Classify one image or several.

        Args:
            images: a path, a URL, bytes, an open file, a PIL image or an array, or a list or a batch of these, as in
                `LevitImageProcessor.preprocess`.
            top_k: maximum number of classes to return for each image, at least 1.
            function_to_apply: "softmax" over the classes, "sigmoid" per class, or "none" for the logits; None chooses
                the sigmoid for a multi-label model, the logits for a regression model, and the softmax otherwise.

        Returns:
            For one image, a list of {"label": str, "score": float} in descending order of the score. For a list or a
            batch, one such list per image.

        Raises:
            ImageError: an image cannot be used.
            OSError: a file cannot be read.

        Examples:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> answers = classifier([np.zeros((32, 32, 3), np.uint8)] * 3, top_k=2)
            >>> len(answers), len(answers[0]), sorted(answers[0][0])
            (3, 2, ['label', 'score'])
        """
        answers = list(self.stream(_flatten_images(images), top_k, function_to_apply=function_to_apply))
        return answers[0] if _is_one_image(images) else answers

    def stream(
        self, images: Iterable[Any], top_k: int = 5, *, function_to_apply: str | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """Classify any number of images in constant memory.

        Args:
            images: an iterable of single images, as in `__call__`. It is consumed lazily.
            top_k: maximum number of classes to return for each image, at least 1.
            function_to_apply: as in `__call__`.

        Yields:
            For each image, in order, a list of {"label": str, "score": float} in descending order of the score.

        Raises:
            ImageError: an image cannot be used.
            OSError: a file cannot be read.

        Examples:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> images = (np.full((32, 32, 3), level, np.uint8) for level in range(256))
            >>> sum(len(answer) for answer in classifier.stream(images, top_k=1))
            256
        """
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be an integer of at least 1, found {top_k!r}.")
        _check_choice("function_to_apply", function_to_apply, (None, "softmax", "sigmoid", "none"))
        for i, logits in enumerate(self.stream_logits(images)):
            if isinstance(logits, ImageError):
                raise ImageError(f"Image {i} (counted from 0): {logits}") from logits
            if isinstance(logits, Exception):
                raise logits
            yield self.name(logits, top_k, function_to_apply=function_to_apply)

    def stream_logits(self, images: Iterable[Any]) -> Iterator[np.ndarray | ImageError | OSError]:
        """Compute the logits of any number of images, in constant memory.

        Args:
            images: as in `stream`.

        Yields:
            For each image, in order, its logits float [num_labels], or the exception if the image cannot be used.

        Examples:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> for result in classifier.stream_logits([np.zeros((32, 32, 3), np.uint8), "nowhere.jpg"]):
            ...     print(result if isinstance(result, Exception) else result.shape)
            (10,)
            The image nowhere.jpg does not exist.
        """
        waiting: tuple[list[Any], Any] | None = None
        for batch in self._read_batches(images):
            # The devices compute this batch while the previous one is yielded and the next one is decoded.
            computing = self._start([pixels for pixels in batch if not isinstance(pixels, Exception)])
            if waiting:
                yield from self._finish(*waiting)
            waiting = batch, computing
        if waiting:
            yield from self._finish(*waiting)

    def name(self, logits: np.ndarray, top_k: int, *, function_to_apply: str | None = None) -> list[dict[str, Any]]:
        """Return the classes with the highest scores for the logits of one image.

        Args:
            logits: float [num_labels].
            top_k: maximum number of classes to return.
            function_to_apply: as in `__call__`.

        Returns:
            A list of {"label": str, "score": float} in descending order of the score.

        Examples:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> classifier.name(np.eye(10)[3] * 100, top_k=1)
            [{'label': 'cat', 'score': 1.0}]
        """
        row = _scores(logits, self.model.config, function_to_apply)
        labels = self.model.config.id2label
        return [{"label": labels[i], "score": float(row[i])} for i in np.argsort(-row, kind="stable")[:top_k]]

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the logits of images that have the model's image size.

        Args:
            pixels: [B H W C], either uint8 levels or normalized by the processor.

        Returns:
            float [B num_labels].

        Examples:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> classifier.logits(np.zeros((3, 144, 144, 3), np.uint8)).shape
            (3, 10)
        """
        return self._function.finish(self._function.start(pixels))

    def _read(self, image: Any) -> np.ndarray | ImageError | OSError:
        try:
            pixels = self.processor.resize_and_crop(image)
            if self.processor.do_rescale and pixels.dtype.kind == "f" and pixels.max() <= 1:
                # Unlike transformers' processor, which would scale these values again.
                pixels = np.round(pixels * np.float32(255)).astype(np.uint8)
            expected = (*self.model.config.image_height_width, self.model.config.num_channels)
            if pixels.shape != expected:
                raise ImageError(
                    f"The processed image does not fit the model: expected [H W C] = {list(expected)}, found"
                    f" {list(pixels.shape)}. Set the processor's crop_size to the model's image size, and image_mean to"
                    " one number per channel."
                )
        except (ImageError, OSError) as error:
            return error
        return pixels

    def _read_batches(self, images: Iterable[Any]) -> Iterator[list[Any]]:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            batch = []
            for pixels in _map_ahead(pool, self._read, images, _READ_AHEAD * self.batch_size):
                batch.append(pixels)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch

    def _start(self, images: list[np.ndarray]) -> Any:
        if not images:
            return None
        if any(pixels.dtype != np.uint8 for pixels in images):  # only the processor knows the range of float images
            images = [self.processor.rescale_and_normalize(pixels) for pixels in images]
        return self._function.start(np.stack(images))

    def _finish(self, batch: list[Any], computing: Any) -> Iterator[Any]:
        rows = iter(() if computing is None else self._function.finish(computing))
        for pixels in batch:
            yield pixels if isinstance(pixels, Exception) else next(rows)


def _classify_rows(
    classifier: ImageClassifier, rows: Iterable[tuple[_T, Any]]
) -> Iterator[tuple[_T, np.ndarray | ImageError | OSError]]:
    """Yield the first entry of each row with the result of `stream_logits` for the second, which is an image."""
    waiting: deque[_T] = deque()

    def images() -> Iterator[Any]:
        for value, image in rows:
            waiting.append(value)
            yield image

    for logits in classifier.stream_logits(images()):
        yield waiting.popleft(), logits


def _map_ahead(pool: ThreadPoolExecutor, function: Any, items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Yield `function(item)` for each item, in order, computed by the pool for at most `ahead` items in advance."""
    futures: deque[Any] = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) == ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()
