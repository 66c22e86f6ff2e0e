"""The outputs of the three LeViT models, and the loss of a classifier.

Axes: B batch, H and W height and width, C channels, N tokens. In attention, H is the number of heads, and Q and K are
the numbers of queries and keys.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from .configuration import _MULTI_LABEL, _REGRESSION, _SINGLE_LABEL
from .layers import _at_least_float32

_IGNORED_LABEL = -100  # as in PyTorch


class _ModelOutput:
    """The base class of the model outputs.

    The fields that are not None can be accessed as in transformers: `output["logits"]`, `output[0]`, `output[:2]`, and
    iteration yields their names.
    """

    def keys(self) -> tuple[str, ...]:
        """Return the names of the fields that are not None.

        Examples:
            >>> LevitForImageClassificationOutput(logits=jnp.zeros((1, 3))).keys()
            ('logits',)
        """
        names = (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return tuple(name for name in names if getattr(self, name) is not None)

    def values(self) -> tuple[Any, ...]:
        """Return the fields that are not None, as `to_tuple` does."""
        return self.to_tuple()

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Return the names and values of the fields that are not None."""
        return tuple(zip(self.keys(), self.to_tuple(), strict=True))

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(f"The output has no {key}: it has {', '.join(self.keys())}.")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in transformers' order.

        Examples:
            >>> tokens = jnp.ones((1, 4, 8))
            >>> output = LevitModelOutput(last_hidden_state=tokens, pooler_output=tokens.mean(1))
            >>> [value.shape for value in output.to_tuple()]
            [(1, 4, 8), (1, 8)]
        """
        return tuple(getattr(self, name) for name in self.keys())


@struct.dataclass
class LevitModelOutput(_ModelOutput):
    """Output of `LevitModel`.

    All arrays are in the model's computation dtype.

    Attributes:
        last_hidden_state: [B N C], the tokens of the last stage; None if `output_features` leaves this stage out.
        pooler_output: [B C], the mean of these tokens; None like them.
        hidden_states: the tokens after the stem, then after each stage and its downsampling, each [B N C]; None unless
            `output_hidden_states=True`.
        attentions: the attention weights [B H Q K] of every block and downsampling, in order. The weights of each
            query sum to 1. None unless `output_attentions=True`.
        features: the feature map [B H W C] of each selected stage before its downsampling; None unless
            `output_features` is True or a tuple.

    Examples:
        >>> from levit_flax import LevitConfig, LevitModel
        >>> model = LevitModel(LevitConfig(image_size=64))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        >>> compute = lambda v, x: model.apply(v, x, output_attentions=True)
        >>> output = jax.eval_shape(compute, variables, jnp.zeros((1, 64, 64, 3)))
        >>> output.last_hidden_state.shape, len(output.attentions), output.attentions[0].shape, output.features
        ((1, 1, 384), 14, (1, 4, 16, 16), None)
    """

    last_hidden_state: jax.Array | None = None
    pooler_output: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    features: tuple[jax.Array, ...] | None = None


@struct.dataclass
class LevitForImageClassificationOutput(_ModelOutput):
    """Output of `LevitForImageClassification`.

    Attributes:
        loss: the mean loss over the batch, a scalar; None if no labels were passed.
        logits: [B num_labels], the unnormalized scores of the classes.
        hidden_states: as in `LevitModelOutput`.
        attentions: as in `LevitModelOutput`.
        features: as in `LevitModelOutput`.

    Examples:
        >>> output = LevitForImageClassificationOutput(logits=jnp.array([[0.0, 2.0, 1.0]]))
        >>> [logits] = output.to_tuple()  # without labels there is no loss
        >>> int(logits.argmax(-1)[0])
        1
    """

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    features: tuple[jax.Array, ...] | None = None


@struct.dataclass
class LevitForImageClassificationWithTeacherOutput(_ModelOutput):
    """Output of `LevitForImageClassificationWithTeacher`.

    Attributes:
        logits: [B num_labels], the mean of the two heads' logits. All published accuracies refer to these.
        cls_logits: [B num_labels], the logits of the head trained on the labels.
        distillation_logits: [B num_labels], the logits of the head trained on the teacher's predictions.
        hidden_states: as in `LevitModelOutput`.
        attentions: as in `LevitModelOutput`.
        features: as in `LevitModelOutput`.

    Examples:
        >>> first, second = jnp.array([[0.0, 2.0]]), jnp.array([[4.0, 0.0]])
        >>> output = LevitForImageClassificationWithTeacherOutput((first + second) / 2, first, second)
        >>> logits, cls_logits, distillation_logits = output.to_tuple()
        >>> logits.tolist()
        [[2.0, 1.0]]
    """

    logits: jax.Array
    cls_logits: jax.Array
    distillation_logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    features: tuple[jax.Array, ...] | None = None


def classification_loss(logits: jax.Array, labels: Any, problem_type: str | None = None) -> jax.Array:
    """Return the mean loss over a batch, as transformers computes it.

    Args:
        logits: float [B L] for L classes.
        labels: class indices [B] in [0, L) for single-label classification, or -100 for images to ignore; 0 or 1 per
            class [B L] for multi-label classification; targets [B] or [B L] for regression.
        problem_type: "single_label_classification", "multi_label_classification" or "regression". None infers it:
            regression if L is 1, single-label if the labels are integers, multi-label otherwise.

    Returns:
        A scalar, float32 or float64: softmax cross entropy for single-label, mean sigmoid binary cross entropy for
        multi-label, mean squared error for regression.

    Raises:
        ValueError: the number of labels does not fit the logits, or a class index is neither in [0, L) nor -100. Inside
            `jax.jit` values cannot be checked, and the result is then meaningless.

    Examples:
        >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0]])
        >>> round(float(classification_loss(logits, jnp.array([0, 1]))), 4)  # in nats
        0.1269
        >>> round(float(classification_loss(logits, jnp.array([[1.0, 0.0], [0.0, 1.0]]))), 4)  # a sigmoid per class
        0.41

    Source: `ForSequenceClassificationLoss` in transformers loss/loss_utils.py, except that an inferred problem type
        is not stored in the config.
    """
    logits = logits.astype(_at_least_float32(logits.dtype))
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = _REGRESSION
        elif jnp.issubdtype(labels.dtype, jnp.integer):
            problem_type = _SINGLE_LABEL
        else:
            problem_type = _MULTI_LABEL
    expected = logits.shape[:1] if problem_type == _SINGLE_LABEL else logits.shape
    if labels.size != math.prod(expected):
        raise ValueError(
            f"The labels do not fit logits of the shape {list(logits.shape)}: expected {list(expected)} for"
            f" {problem_type}, found {list(labels.shape)}."
        )
    loss: jax.Array
    if problem_type == _SINGLE_LABEL:
        labels = labels.reshape(-1)
        _check_class_indices(labels, logits.shape[-1])
        valid = labels != _IGNORED_LABEL
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
        total: jax.Array = jnp.where(valid, loss, 0).sum()
        count: jax.Array = valid.sum()
        return total / count.astype(loss.dtype)
    if problem_type == _REGRESSION:
        loss = jnp.square(logits - labels.reshape(logits.shape).astype(logits.dtype))
    else:
        loss = optax.sigmoid_binary_cross_entropy(logits, labels.reshape(logits.shape).astype(logits.dtype))
    mean: jax.Array = loss.mean()
    return mean


def _check_class_indices(labels: jax.Array, num_labels: int) -> None:
    """Raise ValueError if a known class index is out of range."""
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)  # NumPy computes now, even for constants inside jax.jit
    outside = np.flatnonzero(((values < 0) | (values >= num_labels)) & (values != _IGNORED_LABEL))
    if outside.size:
        raise ValueError(
            f"{outside.size} of {values.size} labels are not class indices: expected values in [0, {num_labels}), or"
            f" {_IGNORED_LABEL} to ignore an image, found {values[outside[0]]} at index {outside[0]}."
        )
