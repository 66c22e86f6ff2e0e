"""Assert that taking patches of a batch on four devices moves no data between the devices."""

import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from levit_flax.training_convolution import _take_patches

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
shared = NamedSharding(mesh, PartitionSpec("data"))
x = jax.ShapeDtypeStruct((8, 32, 32, 3), np.float32, sharding=shared)
program = jax.jit(_take_patches, static_argnums=(1, 2, 3)).lower(x, 3, 2, 1).compile()
assert program.output_shardings.is_equivalent_to(shared, 6), program.output_shardings
assert not (found := re.findall(r"(?:all|collective)-\w+", program.as_text())), found
