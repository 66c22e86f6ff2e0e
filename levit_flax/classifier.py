"""Pictures in, labels out: processor, jitted model and label names in one object."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checkpoint import from_pretrained, load_processor, resize_processor, resolve
from .configuration import LevitConfig
from .image_processing import LevitImageProcessor
from .layers import at_least_float32
from .modeling import LevitBase, LevitForImageClassificationWithTeacher, LevitModel, Variables
from .surgery import fold_batch_norm, merge_heads


class ImageClassifier:
    """Classify pictures with a LeViT model.

    Args:
        model: a model with a classifier. Two heads are merged and batch norms folded, which computes the same faster.
        variables: its variables.
        processor: prepares the pictures; None for the usual one for the model's image size.
        batch_size: the most pictures that are computed at once. Smaller batches are filled up to a power of two, so
            that few shapes are ever compiled.

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
    ) -> None:
        if isinstance(model, LevitModel) or not model.config.num_labels:
            raise ValueError(
                "This model has no classifier: expected one with a head, such as LevitForImageClassification."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model, self.variables = prepare(model, variables)
        self.processor = processor or load_processor(None, model.config)
        self.batch_size = batch_size

        @jax.jit
        def compute(variables: Variables, pixel_values: jax.Array) -> jax.Array:
            output: Any = self.model.apply(variables, pixel_values)
            return scores(output.logits, self.model.config)

        self._scores = compute

    @classmethod
    def from_pretrained(cls, source: str | Path, *, batch_size: int = 32, **options: Any) -> "ImageClassifier":
        """Load a classifier from a directory or a Hub repository.

        Args:
            source: as in `levit_flax.from_pretrained`.
            batch_size: as in the class.
            **options: as in `levit_flax.from_pretrained`. With `image_size` the processor follows the model.

        Raises:
            ValueError: the files do not hold what they should.
            OSError: there is no such source, or it cannot be read or fetched.
        """
        of_the_model = {name: options.pop(name) for name in ("dtype", "image_size") if name in options}
        resolved = resolve(source, **options)
        model, variables = from_pretrained(resolved.directory, **of_the_model)
        processor = load_processor(resolved.directory, model.config)
        if "image_size" in of_the_model:
            processor = resize_processor(processor, model.config)
        return cls(model, variables, processor, batch_size)

    def __call__(self, images: Any, top_k: int = 5) -> list[list[dict[str, Any]]]:
        """Classify pictures.

        Args:
            images: what the processor takes: a path, a PIL image or an array, or a list of them.
            top_k: how many classes to name for each picture, the likeliest first; all of them where there are fewer.

        Returns:
            For each picture a list of {"label": str, "score": float}. Scores are in [0, 1]: softmax over the classes,
            or a sigmoid for each class of a multi-label model. A regression model's are its raw outputs.

        Raises:
            ImageError: a picture cannot be used; the message says which.
            OSError: a file cannot be read.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        pixels = self.processor(images, return_tensors="np")["pixel_values"]
        labels = self.model.config.id2label
        predictions = []
        for row in self.predict(pixels):
            best = np.argsort(-row, kind="stable")[:top_k]
            predictions.append([{"label": labels[i], "score": float(row[i])} for i in best])
        return predictions

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the scores [B num_labels] of prepared pictures [B H W C], a batch at a time."""
        parts = [pixels[i : i + self.batch_size] for i in range(0, len(pixels), self.batch_size)]
        return np.concatenate([self._predict_batch(part) for part in parts])

    def _predict_batch(self, pixels: np.ndarray) -> np.ndarray:
        size = min(self.batch_size, 1 << (len(pixels) - 1).bit_length())
        padded = np.concatenate([pixels, np.zeros((size - len(pixels), *pixels.shape[1:]), pixels.dtype)])
        return np.asarray(self._scores(self.variables, padded))[: len(pixels)]


def prepare(model: LevitBase, variables: Variables) -> tuple[LevitBase, Variables]:
    """Return the fastest model that computes the same: its heads merged, its batch norms folded."""
    variables = widen(variables, model.shared["dtype"])
    if isinstance(model, LevitForImageClassificationWithTeacher):
        model, variables = merge_heads(model, variables)
    return (model, variables) if model.folded else fold_batch_norm(model, variables)


def widen(variables: Variables, dtype: Any) -> Variables:
    """Return the variables, those of a narrower floating-point type in `dtype`: then no call has to convert them."""
    width = jnp.dtype(dtype).itemsize

    def is_narrow(leaf: jax.Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < width

    if not any(is_narrow(leaf) for leaf in jax.tree.leaves(variables)):
        return variables
    # Through NumPy, which converts without compiling.
    return jax.device_put(
        jax.tree.map(lambda leaf: np.asarray(leaf, dtype if is_narrow(leaf) else leaf.dtype), variables)
    )


def scores(logits: jax.Array, config: LevitConfig) -> jax.Array:
    """Turn logits [B num_labels] into what a user reads: softmax, sigmoid for multi-label, raw for regression."""
    logits = logits.astype(at_least_float32(logits.dtype))
    if config.problem_type == "regression" or config.num_labels == 1:
        return logits
    if config.problem_type == "multi_label_classification":
        return jax.nn.sigmoid(logits)
    return jax.nn.softmax(logits)
