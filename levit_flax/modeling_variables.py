"""The paths, shapes and dtypes of a model's variables."""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

if TYPE_CHECKING:
    from .modeling import LevitBase


def _abstract_variables(model: "LevitBase") -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of every variable by path, such as "params/stem/conv_0/conv/kernel".

    Nothing is computed or allocated.
    """
    # Tracing a large model takes half a second, so the fields that do not affect the shapes are left out of its cache.
    traced = _trace_variables(model.clone(dtype=None, param_dtype=jnp.float32, precision=None, remat=False))
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, model.param_dtype) if leaf.dtype == jnp.float32 else leaf
        for path, leaf in traced.items()
    }


@functools.lru_cache(maxsize=8)
def _trace_variables(model: "LevitBase") -> dict[str, jax.ShapeDtypeStruct]:
    config = model.config
    pixel_values = jax.ShapeDtypeStruct((1, *config.image_height_width, config.num_channels), jnp.float32)
    traced: dict[str, jax.ShapeDtypeStruct] = flatten_dict(
        jax.eval_shape(model.init, jax.random.key(0), pixel_values), sep="/"
    )
    return traced
