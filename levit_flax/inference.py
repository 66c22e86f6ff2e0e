"""Prepare models for inference: merge heads, fold batch norms, normalize images."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .configuration import _MULTI_LABEL, _REGRESSION, LevitConfig
from .image_processing import LevitImageProcessor
from .modeling import LevitBase, LevitForImageClassificationWithTeacher, LevitModel, Variables
from .surgery import _copy, fold_batch_norm, merge_heads


def _normalize(pixels: jax.Array, processor: LevitImageProcessor, dtype: Any = jnp.float32) -> jax.Array:
    """Compute `LevitImageProcessor.rescale_and_normalize` of levels [... C] on the device, in `dtype`."""
    values = pixels.astype(dtype)
    if processor.do_rescale:
        values = values * np.asarray(processor.rescale_factor, dtype)
    if processor.do_normalize:
        shape = (1,) * (pixels.ndim - 1) + (-1,)
        mean, std = (np.asarray(value, dtype).reshape(shape) for value in (processor.image_mean, processor.image_std))
        values = (values - mean) / std
    return values


def _prepare(model: LevitBase, variables: Variables) -> tuple[LevitBase, Variables]:
    """Return an equivalent model for inference, with merged heads and folded batch norms."""
    if isinstance(model, LevitModel) or not model.config.num_labels:
        raise ValueError(
            "The model has no classifier: expected a LevitForImageClassification or a"
            f" LevitForImageClassificationWithTeacher with classes, found a {type(model).__name__} with"
            f" num_labels={model.config.num_labels}."
        )
    variables = _upcast(variables, model._shared["dtype"])
    if isinstance(model, LevitForImageClassificationWithTeacher):
        model, variables = merge_heads(model, variables)
    if not model.folded:
        return fold_batch_norm(model, variables)
    return model, jax.tree.map(_copy, variables)  # the caller may donate or change them; folding copies by itself


def _upcast(variables: Variables, dtype: Any) -> Variables:
    """Return the variables with narrower floating-point arrays converted to `dtype`, once instead of in every call."""
    width = jnp.dtype(dtype).itemsize

    def is_narrow(leaf: jax.Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < width

    if not any(is_narrow(leaf) for leaf in jax.tree.leaves(variables)):
        return variables
    # NumPy converts without compiling.
    upcast: Variables = jax.tree.map(lambda leaf: np.asarray(leaf, dtype if is_narrow(leaf) else leaf.dtype), variables)
    arrays: Variables = jax.device_put(upcast)
    return arrays


def _scores(logits: np.ndarray, config: LevitConfig) -> np.ndarray:
    """Return the scores for logits [... L]: softmax, sigmoid for multi-label, the logits for regression."""
    if config.problem_type == _REGRESSION or config.num_labels == 1:
        return logits
    if config.problem_type == _MULTI_LABEL:
        return np.asarray(1 / (1 + np.exp(-logits)))
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))
