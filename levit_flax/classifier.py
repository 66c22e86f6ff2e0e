"""Images in, labels out: processor, jitted model and label names in one object."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .hub import HubOptions
from .image_processing import LevitImageProcessor
from .images import ImageError, flatten_images
from .inference import normalize, prepare, scores
from .loading import load_model, load_processor
from .modeling import LevitBase, Variables

T = TypeVar("T")

# Images that are read ahead, as a multiple of the batch: enough to keep the device busy, and no more in memory.
READ_AHEAD = 2


class ImageClassifier:
    """Classify images with a LeViT model, on all local devices.

    Images are read by threads while the devices compute. They travel as bytes and are normalized on the device, which
    comes to the same as the processor's arithmetic but for rounding in float32. Batches are filled up to a power of two
    per device, so that few shapes are ever compiled.

    Args:
        model: a model with a classifier. Two heads are merged and batch norms folded, which computes the same faster.
        variables: its variables; they are copied to every device.
        processor: prepares the images; None for the usual one for the model's image size.
        batch_size: the most images that are computed at once, rounded up to a multiple of the number of devices.
        devices: where to compute; None for all local devices.

    Raises:
        ValueError: the model has no classifier.

    Example:
        >>> classifier = ImageClassifier.from_pretrained("cifar10")
        >>> [best] = classifier(np.zeros((32, 32, 3), np.uint8), top_k=1)[0]
        >>> sorted(best)
        ['label', 'score']
    """

    def __init__(
        self,
        model: LevitBase,
        variables: Variables,
        processor: LevitImageProcessor | None = None,
        batch_size: int = 32,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model, variables = prepare(model, variables)
        self.processor = processor or load_processor(None, model.config)
        mesh = Mesh(np.array(devices or jax.local_devices()), ("batch",))
        self._sharding = NamedSharding(mesh, PartitionSpec("batch"))
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self.variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))

        @jax.jit
        def compute(variables: Variables, pixels: jax.Array) -> jax.Array:
            if pixels.dtype == jnp.uint8:
                pixels = normalize(pixels, self.processor)
            output: Any = self.model.apply(variables, pixels)
            return output.logits.astype(jnp.promote_types(output.logits.dtype, jnp.float32))

        self._logits = compute

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        batch_size: int = 32,
        dtype: Any = None,
        image_size: int | tuple[int, int] | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "ImageClassifier":
        """Load a classifier from a directory or a Hub repository.

        Args:
            source: as in `levit_flax.from_pretrained`.
            batch_size: as in the class.
            dtype: as in `levit_flax.from_pretrained`.
            image_size: as in `levit_flax.from_pretrained`; the processor is resized with the model.
            revision: branch, tag or commit of a Hub repository.
            token: access token for the Hub.
            cache_dir: directory for downloads; None for huggingface_hub's own cache.
            local_files_only: do not access the network.

        Raises:
            ValueError: a file is malformed, or weights do not fit the config.
            OSError: the source does not exist, or cannot be read or downloaded.

        Example:
            >>> classifier = ImageClassifier.from_pretrained("cifar10", batch_size=8, image_size=96)
            >>> classifier.model.config.image_size, classifier.processor.crop_size
            (96, {'height': 96, 'width': 96})
        """
        options = HubOptions(revision, token, cache_dir, local_files_only)
        model, variables, processor, _ = load_model(source, options, dtype=dtype, image_size=image_size)
        return cls(model, variables, processor, batch_size)

    def __call__(self, images: Any, top_k: int = 5) -> list[list[dict[str, Any]]]:
        """Classify images.

        Args:
            images: what the processor takes: a path, a PIL image or an array, or a list of them.
            top_k: how many classes to name for each image, the likeliest first; all of them where there are fewer.

        Returns:
            For each image a list of {"label": str, "score": float}. Scores are in [0, 1]: softmax over the classes,
            or a sigmoid for each class of a multi-label model. A regression model's are its raw outputs.

        Raises:
            ImageError: an image cannot be used; the message says which.
            OSError: a file cannot be read.

        Example:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> answers = classifier([np.zeros((32, 32, 3), np.uint8)] * 3, top_k=2)
            >>> len(answers), len(answers[0]), sorted(answers[0][0])
            (3, 2, ['label', 'score'])
        """
        return list(self.stream(flatten_images(images), top_k))

    def stream(self, images: Iterable[Any], top_k: int = 5) -> Iterator[list[dict[str, Any]]]:
        """Classify any number of images, one after the other as they come, in constant memory.

        Args:
            images: paths, PIL images or arrays, one image each; taken from as needed.
            top_k: as in a call.

        Yields:
            For each image, in order, what a call returns.

        Raises:
            ImageError: an image cannot be used; the message says which.
            OSError: a file cannot be read.

        Example:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> images = (np.full((32, 32, 3), level, np.uint8) for level in range(256))  # made as they are needed
            >>> sum(len(answer) for answer in classifier.stream(images, top_k=1))
            256
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        for i, logits in enumerate(self.stream_logits(images)):
            if isinstance(logits, ImageError):
                raise ImageError(f"Image {i} (counted from 0): {logits}") from logits
            if isinstance(logits, Exception):
                raise logits
            yield self.name(logits, top_k)

    def stream_logits(self, images: Iterable[Any]) -> Iterator[np.ndarray | ImageError | OSError]:
        """Compute the logits of any number of images, in constant memory.

        Args:
            images: as in `stream`.

        Yields:
            For each image, in order, its logits [num_labels], or the error that says why it cannot be used.

        Example:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> for result in classifier.stream_logits([np.zeros((32, 32, 3), np.uint8), "nowhere.jpg"]):
            ...     print(result if isinstance(result, Exception) else result.shape)
            (10,)
            There is no image at nowhere.jpg.
        """
        waiting: tuple[list[Any], Any] | None = None
        for batch in self._read_batches(images):
            # The devices compute this batch while the results of the one before are handed out, and the next is read.
            computing = self._start([pixels for pixels in batch if not isinstance(pixels, Exception)])
            if waiting:
                yield from self._finish(*waiting)
            waiting = batch, computing
        if waiting:
            yield from self._finish(*waiting)

    def name(self, logits: np.ndarray, top_k: int) -> list[dict[str, Any]]:
        """Turn the logits [num_labels] of one image into its likeliest classes, as a call returns them.

        Example:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> classifier.name(np.eye(10)[3] * 100, top_k=1)
            [{'label': 'cat', 'score': 1.0}]
        """
        row = scores(logits, self.model.config)
        labels = self.model.config.id2label
        return [{"label": labels[i], "score": float(row[i])} for i in np.argsort(-row, kind="stable")[:top_k]]

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the logits [B num_labels] of images of the model's size, a batch at a time.

        Args:
            pixels: [B H W C], either uint8 levels or prepared by the processor.

        Example:
            >>> classifier = ImageClassifier.from_pretrained("cifar10")
            >>> classifier.logits(np.zeros((3, 144, 144, 3), np.uint8)).shape
            (3, 10)
        """
        parts = [pixels[i : i + self.batch_size] for i in range(0, len(pixels), self.batch_size)]
        return np.concatenate([np.asarray(self._dispatch(part))[: len(part)] for part in parts])

    def _read(self, image: Any) -> np.ndarray | ImageError | OSError:
        try:
            pixels = self.processor.resize_and_crop(image)
            expected = (*self.model.config.image_height_width, self.model.config.num_channels)
            if pixels.shape != expected:
                raise ImageError(
                    f"the processor makes [H W C] = {list(pixels.shape)} of it, but the model takes {list(expected)}:"
                    " give the processor the model's size as its crop_size"
                )
        except (ImageError, OSError) as error:
            return error
        return pixels

    def _read_batches(self, images: Iterable[Any]) -> Iterator[list[Any]]:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            batch = []
            for pixels in map_ahead(pool, self._read, images, READ_AHEAD * self.batch_size):
                batch.append(pixels)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch

    def _start(self, images: list[np.ndarray]) -> Any:
        if not images:
            return None
        if any(pixels.dtype != np.uint8 for pixels in images):  # arrays of floats: the processor knows their range
            images = [self.processor.rescale_and_normalize(pixels) for pixels in images]
        return self._dispatch(np.stack(images))

    def _finish(self, batch: list[Any], computing: Any) -> Iterator[Any]:
        rows = iter(() if computing is None else np.asarray(computing))
        for pixels in batch:
            yield pixels if isinstance(pixels, Exception) else next(rows)

    def _dispatch(self, pixels: np.ndarray) -> jax.Array:
        """Start computing one batch, filled up with black images; the logits of these come last."""
        devices = self._sharding.num_devices
        per_device = -(-len(pixels) // devices)
        size = min(self.batch_size, devices << (per_device - 1).bit_length())
        padded = np.concatenate([pixels, np.zeros((size - len(pixels), *pixels.shape[1:]), pixels.dtype)])
        return self._logits(self.variables, jax.device_put(padded, self._sharding))


def map_ahead(pool: ThreadPoolExecutor, function: Any, items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Yield what a function makes of each item, in order, computing at most `ahead` items before they are taken."""
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
