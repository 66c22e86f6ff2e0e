"""What training minimizes: the labels' loss by the kind of problem, and a teacher's.

Source: facebookresearch/LeViT losses.py (`DistillationLoss`) and timm's SoftTargetCrossEntropy.
"""

import jax
import jax.numpy as jnp
import optax

from levit_flax.configuration import SINGLE_LABEL
from levit_flax.modeling_outputs import classification_loss


def soft_targets(labels: jax.Array, num_labels: int, smoothing: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Turn class indices [B] into targets [B num_labels] of which `smoothing` is spread over all classes."""
    return jax.nn.one_hot(labels, num_labels, dtype=dtype) * (1 - smoothing) + smoothing / num_labels


def label_loss(logits: jax.Array, targets: jax.Array, problem_type: str) -> jax.Array:
    """Return the mean loss over a batch.

    Args:
        logits: [B L].
        targets: [B L]: shares that sum to 1 for single-label, in [0, 1] each for multi-label, values for regression.
        problem_type: one of `LevitConfig`'s.

    Returns:
        A scalar: cross entropy of the softmax, binary cross entropy of the sigmoids, or squared error.

    Example:
        >>> loss = label_loss(jnp.zeros((1, 2)), jnp.array([[0.9, 0.1]]), SINGLE_LABEL)
        >>> print(f"{loss:.4f}")
        0.6931
    """
    if problem_type == SINGLE_LABEL:
        return optax.softmax_cross_entropy(logits, targets).mean()
    return classification_loss(logits, targets, problem_type)


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array, kind: str, temperature: float = 1.0) -> jax.Array:
    """Return the mean loss of the head that learns from a teacher.

    Args:
        logits: [B L], of `head_dist`.
        teacher_logits: [B L]; no gradient flows into them.
        kind: "hard" for the cross entropy with the teacher's likeliest class; "soft" for the Kullback-Leibler
            divergence from its probabilities, times the temperature squared and, as in the reference, over the number
            of logits rather than of images.
        temperature: divides both logits of the soft loss.

    Source: Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention".
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(logits.dtype)
    if kind == "hard":
        return optax.softmax_cross_entropy_with_integer_labels(logits, teacher_logits.argmax(-1)).mean()
    student, teacher = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
    return jnp.sum(jnp.exp(teacher) * (teacher - student)) * temperature**2 / logits.size
