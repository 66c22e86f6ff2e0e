"""Training losses: one per problem type for labels, and one for a teacher.

Source: facebookresearch/LeViT losses.py (`DistillationLoss`) and timm's SoftTargetCrossEntropy.
"""

import jax
import jax.numpy as jnp
import optax

from levit_flax.configuration import _SINGLE_LABEL
from levit_flax.modeling_outputs import classification_loss


def _soft_targets(labels: jax.Array, num_labels: int, smoothing: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return targets [B num_labels] for class indices [B], with the share `smoothing` spread over all classes."""
    return jax.nn.one_hot(labels, num_labels, dtype=dtype) * (1 - smoothing) + smoothing / num_labels


def _label_loss(logits: jax.Array, targets: jax.Array, problem_type: str) -> jax.Array:
    """Return the mean loss over a batch.

    Args:
        logits: [B L].
        targets: [B L]; probabilities that sum to 1 for single-label, values in [0, 1] for multi-label, any values for
            regression.
        problem_type: as in `LevitConfig`.

    Returns:
        A scalar: softmax cross entropy for single-label, sigmoid binary cross entropy for multi-label, mean squared
        error for regression.
    """
    if problem_type == _SINGLE_LABEL:
        return jnp.mean(optax.softmax_cross_entropy(logits, targets))
    return classification_loss(logits, targets, problem_type)


def _distillation_loss(logits: jax.Array, teacher_logits: jax.Array, kind: str, temperature: float = 1.0) -> jax.Array:
    """Return the mean loss of the distillation head against a teacher.

    Args:
        logits: [B L], from `head_dist`.
        teacher_logits: [B L]; no gradient flows through them.
        kind: "hard" or "soft".
        temperature: T of the soft loss.

    With student logits s and teacher logits t, the losses are

        hard: mean over B of cross_entropy(s, argmax(t))
        soft: T^2 / (B L) * sum over B of KL(softmax(t / T) || softmax(s / T))

    As in the reference, the soft loss is divided by the number of logits, not by the number of images.

    Source: Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention".
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(logits.dtype)
    if kind == "hard":
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, teacher_logits.argmax(-1)))
    student, teacher = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
    return jnp.sum(jnp.exp(teacher) * (teacher - student)) * temperature**2 / logits.size
