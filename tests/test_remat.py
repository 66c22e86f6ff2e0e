"""The field `remat`: the same outputs and gradients with less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import levit_flax as lf
from configs import TINY, random_variables

SAME_OPERATIONS = 1e-12  # float64, relative to the largest gradient; XLA may fuse them differently


def make(dtype=jnp.float32, remat=False, **fields):
    config = lf.LevitConfig(**{**TINY, "image_size": 32, **fields})
    model = lf.LevitForImageClassification(config, param_dtype=dtype, precision="highest", remat=remat)
    pixel_values = np.random.default_rng(0).standard_normal((4, *config.image_height_width, 3))
    return model, jax.device_put(random_variables(model)), jnp.asarray(pixel_values, dtype)


def test_rematerialization_changes_neither_outputs_nor_gradients():
    with jax.enable_x64(True):
        model, variables, pixel_values = make(dtype=jnp.float64, drop_path_rate=0.3)

        def train(model):
            def loss(params):
                given, rngs = {**variables, "params": params}, {"drop_path": jax.random.key(1)}
                output, updates = model.apply(given, pixel_values, train=True, rngs=rngs, mutable=["batch_stats"])
                return (output.logits**2).mean(), updates

            return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

        found, wanted = jax.device_get((train(model.clone(remat=True)), train(model)))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(wanted[1]))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=SAME_OPERATIONS, atol=SAME_OPERATIONS * largest)


@pytest.mark.parametrize("remat", [False, True])
def test_each_block_and_downsampling_is_rematerialized(remat):
    model, variables, pixel_values = make(remat=remat)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    names = [equation.primitive.name for equation in jax.make_jaxpr(apply)(variables, pixel_values).eqns]
    blocks_and_downsamplings = 2 + 1
    assert sum(name in ("checkpoint", "remat", "remat2") for name in names) == remat * blocks_and_downsamplings


@pytest.mark.measurement  # older versions of XLA save nothing in a model this small
def test_rematerialization_stores_fewer_activations():
    # In evaluation mode, because the stem of such a small model would dominate a training step.
    model, variables, pixel_values = make(depths=(6, 2), image_size=64)

    def size(model):
        gradient = jax.grad(lambda variables: model.apply(variables, pixel_values).logits.sum(), allow_int=True)
        return jax.jit(gradient).lower(variables).compile().memory_analysis().temp_size_in_bytes

    assert size(model.clone(remat=True)) < 0.7 * size(model)


def test_initialization_does_not_depend_on_rematerialization():
    model, _, pixel_values = make()
    found, wanted = (jax.jit(m.init)(jax.random.key(0), pixel_values) for m in (model.clone(remat=True), model))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, wanted))
