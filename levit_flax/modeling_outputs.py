"""The outputs of the three LeViT models."""

import dataclasses
from typing import Any

import jax
from flax import struct


class ModelOutput:
    """What the output classes share."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in transformers' order.

        Example:
            >>> tokens = jax.numpy.ones((1, 4, 8))
            >>> output = LevitModelOutput(last_hidden_state=tokens, pooler_output=tokens.mean(1))
            >>> [value.shape for value in output.to_tuple()]
            [(1, 4, 8), (1, 8)]
        """
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)


@struct.dataclass
class LevitModelOutput(ModelOutput):
    """Hold what `LevitModel` computes.

    Attributes:
        last_hidden_state: [B N C], the tokens of the last stage.
        pooler_output: [B C], their mean.
        hidden_states: the stem's tokens, then those after each stage and its downsampling, each [B N C]; or None.
        attentions: one [B H Q K] per attention in order, downsampling included, rows summing to 1; or None.
        features: the map [B H W C] of each stage before its downsampling; or None.

    Example:
        >>> from levit_flax import LevitConfig, LevitModel
        >>> model = LevitModel(LevitConfig(image_size=64))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, 64, 64, 3)))
        >>> compute = lambda v, x: model.apply(v, x, output_attentions=True)
        >>> output = jax.eval_shape(compute, variables, jax.numpy.zeros((1, 64, 64, 3)))
        >>> output.last_hidden_state.shape, len(output.attentions), output.attentions[0].shape, output.features
        ((1, 1, 384), 14, (1, 4, 16, 16), None)
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    features: tuple[jax.Array, ...] | None = None


@struct.dataclass
class LevitForImageClassificationOutput(ModelOutput):
    """Hold what `LevitForImageClassification` computes.

    Attributes:
        loss: the mean loss over the batch, a scalar; None without labels.
        logits: [B num_labels], unbounded scores before softmax.
        hidden_states: as in `LevitModelOutput`.
        attentions: as in `LevitModelOutput`.
        features: as in `LevitModelOutput`.

    Example:
        >>> output = LevitForImageClassificationOutput(logits=jax.numpy.array([[0.0, 2.0, 1.0]]))
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
class LevitForImageClassificationWithTeacherOutput(ModelOutput):
    """Hold what `LevitForImageClassificationWithTeacher` computes.

    Attributes:
        logits: [B num_labels], the mean of the two heads' logits, which all published accuracies are for.
        cls_logits: [B num_labels], of the head that learned the labels.
        distillation_logits: [B num_labels], of the head that learned from the teacher.
        hidden_states: as in `LevitModelOutput`.
        attentions: as in `LevitModelOutput`.
        features: as in `LevitModelOutput`.

    Example:
        >>> first, second = jax.numpy.array([[0.0, 2.0]]), jax.numpy.array([[4.0, 0.0]])
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
