"""Small and unusual configs, random variables, compiled models and state dicts that the tests share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from levit_flax import LevitConfig
from levit_flax.modeling import LevitBase, Variables
from levit_flax.modeling_variables import _abstract_variables

SMALL = {
    "image_size": 64,
    "hidden_sizes": (16, 32, 48),
    "num_attention_heads": (1, 2, 3),
    "depths": (2, 1, 2),
    "key_dim": (8, 8, 8),
    "num_labels": 5,
}

# The smallest model with every kind of layer, for tests that compile it. Its grids are not square.
TINY = {
    "image_size": (32, 48),
    "hidden_sizes": (8, 16),
    "num_attention_heads": (1, 2),
    "depths": (1, 1),
    "key_dim": (4, 8),
    "mlp_ratio": (2, 2),
    "attention_ratio": (2, 2),
    "num_labels": 5,
}

# Changes to SMALL with one block per stage, except where a config sets the depths itself.
UNUSUAL = {
    "small": {"depths": (2, 1, 2)},
    "odd grids": {"image_size": 80},
    "one token at the end": {"image_size": 32},
    "one channel": {"num_channels": 1},
    "four channels": {"num_channels": 4},
    "two stages": {
        "hidden_sizes": (24, 40),
        "num_attention_heads": (3, 5),
        "depths": (1, 2),
        "key_dim": (8, 4),
        "mlp_ratio": (2, 2),
        "attention_ratio": (2, 2),
    },
    "four stages": {
        "image_size": 128,
        "hidden_sizes": (16, 24, 32, 40),
        "num_attention_heads": (2, 3, 4, 5),
        "depths": (1, 1, 1, 1),
        "key_dim": (8, 8, 8, 8),
        "mlp_ratio": (2, 2, 2, 2),
        "attention_ratio": (2, 2, 2, 2),
    },
    "other ratios": {"mlp_ratio": (3, 1, 4), "attention_ratio": (1, 3, 4)},
    "stage without MLP": {"mlp_ratio": (2, 0, 2)},
    "other key dimensions": {"key_dim": (8, 16, 4)},
    "other downsampling": {"down_ops": (("Subsample", 4, 3, 2, 3, 2), ("Subsample", 16, 1, 1, 0, 3))},
    "wide kernel": {"kernel_size": 5, "padding": 2},
    "one class": {"num_labels": 1},
}


def unusual_config(name: str, deep: bool = False) -> LevitConfig:
    """Return an unusual config, with one block per stage unless `deep`."""
    depths = {} if deep else {"depths": (1, 1, 1)}
    return LevitConfig(**{**SMALL, **depths, **UNUSUAL[name]})


@functools.cache
def compiled(model: LevitBase, **options: Any) -> Callable[..., Any]:
    """Return `model.apply` with these options under `jax.jit`: tests of equal models share the compiled programs."""
    return jax.jit(functools.partial(model.apply, **options))


def in_another_order(tensors: dict[str, np.ndarray], tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a state dict whose index tables order the offsets differently, with biases permuted to match."""
    generator = np.random.default_rng(0)
    result = dict(tensors)
    for name, table in tables.items():
        biases = name.replace("attention_bias_idxs", "attention_biases")
        order = generator.permutation(tensors[biases].shape[1])
        result[name] = order[table]
        result[biases] = np.ascontiguousarray(tensors[biases][:, np.argsort(order)])  # as safetensors needs them
    return result


def random_variables(model: LevitBase, seed: int = 0) -> Variables:
    """Return random variables of the magnitude that trained weights have, without compiling anything."""
    generator = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path.rpartition("/")[2]
        if name == "count":
            return np.array(generator.integers(1, 1000), np.int32)
        if name in ("scale", "var"):
            values = generator.uniform(0.5, 1.5, leaf.shape)
        elif name == "kernel":
            values = generator.standard_normal(leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1])
        else:
            values = generator.standard_normal(leaf.shape) * (1.0 if name == "attention_biases" else 0.1)
        return values.astype(leaf.dtype)

    return unflatten_dict({path: draw(path, leaf) for path, leaf in _abstract_variables(model).items()}, sep="/")
