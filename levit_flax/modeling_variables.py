"""The paths, shapes and dtypes of a model's variables."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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


def _collections(model: "LevitBase") -> list[str]:
    """Return the names of the collections of a model's variables."""
    return ["params"] if model.folded else ["params", "batch_stats"]


def _differences(model: "LevitBase", variables: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the arrays whose paths, shapes or kinds are not those of the model's variables, and the number of arrays.

    Counters of batches are integers. All other arrays are floating point of any width.
    """
    expected = {path: _describe(leaf) for path, leaf in _abstract_variables(model).items()}
    found = {path: _describe(leaf) for path, leaf in flatten_dict(variables, sep="/").items()}
    paths = sorted(expected.keys() | found.keys(), key=lambda path: (not path.startswith("params/"), path))
    differing = [
        f"{path} (expected {expected.get(path, 'nothing')}, found {found.get(path, 'nothing')})"
        for path in paths
        if expected.get(path) != found.get(path)
    ]
    return differing, len(paths)


def _describe(leaf: Any) -> str:
    """Return the shape of an array, or its kind if it has no axes."""
    if leaf.shape:
        return str(tuple(leaf.shape))
    return "integer ()" if jnp.issubdtype(leaf.dtype, jnp.integer) else f"{leaf.dtype} ()"
