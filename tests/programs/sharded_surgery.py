"""Assert that surgery keeps or derives the shardings of variables, and leaves uncommitted arrays uncommitted."""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(__import__("pathlib").Path(__file__).parents[1]))
import levit_flax as lf
from configs import SMALL, random_variables

assert jax.local_device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("model",))
model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL))
variables = random_variables(model)


def last_axis(leaf):
    axis = "model" if leaf.ndim and not leaf.shape[-1] % 8 else None
    spec = PartitionSpec(*(None,) * (leaf.ndim - 1), axis) if leaf.ndim else PartitionSpec()
    return NamedSharding(mesh, spec)


sharded = jax.tree.map(lambda leaf: jax.device_put(leaf, last_axis(leaf)), variables)
uncommitted = jax.device_put(variables)
for change in (
    lf.fold_batch_norm,
    lf.merge_heads,
    lambda model, variables: lf.resize_image(model, variables, 96),
    lambda model, variables: lf.replace_head(model, variables, 3, jax.random.key(0)),
):
    _, expected = change(model, variables)
    _, found = change(model, sharded)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    kernel = found["params"]["stem"]["conv_3"]["conv"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, None, None, "model"), kernel.sharding
    if "bias" in found["params"]["stem"]["conv_3"]["conv"]:
        assert found["params"]["stem"]["conv_3"]["conv"]["bias"].sharding.spec == PartitionSpec("model")
    _, found = change(model, uncommitted)
    assert not any(leaf.committed for leaf in jax.tree.leaves(found) if isinstance(leaf, jax.Array))
