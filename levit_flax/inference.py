"""Prepare a model for inference: merge heads, fold batch norms, and normalize on the device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .configuration import MULTI_LABEL, REGRESSION, LevitConfig
from .image_processing import LevitImageProcessor
from .modeling import LevitBase, LevitForImageClassificationWithTeacher, LevitModel, Variables
from .surgery import fold_batch_norm, merge_heads


def normalize(pixels: jax.Array, processor: LevitImageProcessor, dtype: Any = jnp.float32) -> jax.Array:
    """Do on the device, in `dtype`, what `LevitImageProcessor.rescale_and_normalize` does with levels [... C]."""
    values = pixels.astype(dtype)
    if processor.do_rescale:
        values = values * np.asarray(processor.rescale_factor, dtype)
    if processor.do_normalize:
        shape = (1,) * (pixels.ndim - 1) + (-1,)
        mean, std = (np.asarray(value, dtype).reshape(shape) for value in (processor.image_mean, processor.image_std))
        values = (values - mean) / std
    return values


def prepare(model: LevitBase, variables: Variables) -> tuple[LevitBase, Variables]:
    """Return the fastest model that computes the same logits: its heads merged, its batch norms folded.

    Raises:
        ValueError: the model has no classifier.
    """
    if isinstance(model, LevitModel) or not model.config.num_labels:
        raise ValueError("This model has no classifier: expected one with a head, such as LevitForImageClassification.")
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


def scores(logits: np.ndarray, config: LevitConfig) -> np.ndarray:
    """Turn logits [... num_labels] into what a user reads: softmax, sigmoid for multi-label, raw for regression."""
    if config.problem_type == REGRESSION or config.num_labels == 1:
        return logits
    if config.problem_type == MULTI_LABEL:
        return np.asarray(1 / (1 + np.exp(-logits)))
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))
