"""AdamW with adaptive gradient clipping and learning rates by parameter path."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from .recipe import Recipe, RecipeError

_CLIP_EPSILON = 1e-3  # lower bound of a unit's weight norm
_GRADIENT_EPSILON = 1e-6


def _match_patterns(table: Mapping[str, float], params: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return each parameter's value, which is that of the first pattern in `table` that matches its whole path.

    Raise RecipeError if a pattern is invalid or unused, or if a parameter matches no pattern; `name` is the table's.
    """
    try:
        patterns = {pattern: re.compile(pattern) for pattern in table}
    except re.error as error:
        raise RecipeError(f"{name}: {error.pattern!r} is not a valid regular expression ({error}).") from None
    values, used = {}, set()
    for path in flatten_dict(params, sep="/"):
        match = next((pattern for pattern, compiled in patterns.items() if compiled.fullmatch(path)), None)
        if match is None:
            raise RecipeError(
                f'{name} does not cover {path}: expected a pattern for every parameter. Add ".*" at the end.'
            )
        values[path] = float(table[match])
        used.add(match)
    unused = [pattern for pattern in table if pattern not in used]
    if unused:
        raise RecipeError(
            f"{name}: {unused[0]!r} matches no parameter, or only those of earlier patterns. Remove it, or move it up."
        )
    return values


def _decays(path: str, parameter: Any) -> bool:
    """Return whether weight decay applies to a parameter: not to 1-D tensors, biases and attention biases."""
    return parameter.ndim > 1 and not path.endswith(("/bias", "/attention_biases"))


def _learning_rate_schedule(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate schedule: linear warm-up to the peak, then cosine decay."""
    total, warmup = recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)
    peak = recipe.peak_learning_rate
    cosine = optax.cosine_decay_schedule(peak, max(1, total - warmup), alpha=min(1.0, recipe.min_learning_rate / peak))
    if not warmup:
        return cosine
    return optax.join_schedules([optax.linear_schedule(recipe.warmup_learning_rate, peak, warmup), cosine], [warmup])


def _clip_adaptively(factor: float) -> optax.GradientTransformation:
    """Clip the norm of each unit's gradient to `factor` times the norm of the unit's weights.

    The last axis counts the units: the outputs of a kernel [I O] or [H W I O], the heads of attention biases [N H]. A
    1-D tensor is one unit. (optax.adaptive_grad_clip treats a tensor with an axis of length 1, such as the attention
    biases of a single token, as one unit.)

    Source: Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization"; timm's
        `adaptive_clip_grad`.
    """

    def unit_norm(x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - 1)) if x.ndim > 1 else None
        return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))

    def clip(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
        norm, max_norm = unit_norm(gradient), factor * jnp.maximum(unit_norm(parameter), _CLIP_EPSILON)
        return jnp.where(norm < max_norm, gradient, gradient * (max_norm / jnp.maximum(norm, _GRADIENT_EPSILON)))

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates, params))


def _make_optimizer(recipe: Recipe, factors: Mapping[str, float], steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the optimizer of a recipe, for a flat dictionary of the trained parameters.

    `factors` contains the factor of the learning rate for each parameter path.
    """

    def scale_each(updates: Mapping[str, jax.Array], _: Any) -> dict[str, jax.Array]:
        return {path: update * factors[path] for path, update in updates.items()}

    clip = [_clip_adaptively(recipe.adaptive_clip)] if recipe.adaptive_clip else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.epsilon),
        optax.add_decayed_weights(
            recipe.weight_decay, lambda flat: {path: _decays(path, x) for path, x in flat.items()}
        ),
        optax.stateless(scale_each),
        optax.scale_by_learning_rate(_learning_rate_schedule(recipe, steps_per_epoch)),
    )
