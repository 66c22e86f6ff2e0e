"""The convolution that trains on CPU, against the one that does not."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import levit_flax as lf
from configs import SMALL, random_variables
from levit_flax.training_convolution import _convolve_patches

OPTIONS = ((2, 2), ((1, 1), (1, 1)))  # strides and padding of the stem


def convolve(x, kernel, strides, padding, precision):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (3, 7, 10, 4), (1, 5, 1, 2)])
def test_patches_do_what_the_convolution_does(shape):
    """In value, and in the derivative either way by images and by kernel; twice, too."""
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        point = rng.normal(size=shape), rng.normal(size=(3, 3, shape[-1], 6))
        step = tuple(rng.normal(size=part.shape) for part in point)
        (values, forward), (expected, expected_forward) = (
            jax.jvp(lambda *point, function=function: function(*point, *OPTIONS, precision="highest"), point, step)
            for function in (_convolve_patches, convolve)
        )
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(forward, expected_forward, rtol=1e-12, atol=1e-12)

        def loss(x, kernel, function):
            return jnp.square(function(x, kernel, *OPTIONS, precision="highest")).sum()

        def steepness(x, kernel, function):
            return sum(jnp.square(part).sum() for part in jax.grad(loss, (0, 1))(x, kernel, function))

        for scalar in (loss, steepness):
            for found, wanted in zip(
                *(jax.grad(scalar, (0, 1))(*point, function) for function in (_convolve_patches, convolve)), strict=True
            ):
                np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_only_training_on_cpu_takes_patches(monkeypatch):
    model = lf.LevitForImageClassification(lf.LevitConfig(**SMALL))
    variables = random_variables(model)

    def convolutions(train):
        program = jax.make_jaxpr(lambda variables, x: model.apply(variables, x, train=train, mutable=["batch_stats"]))
        return str(program(variables, np.zeros((2, 64, 64, 3), np.float32))).count("conv_general_dilated[")

    assert (convolutions(train=True), convolutions(train=False)) == (0, 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (convolutions(train=True), convolutions(train=False)) == (4, 4)


SHARED = """
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
assert not (found := re.findall(r"(?:all|collective)-\\w+", program.as_text())), found
"""


def test_devices_take_patches_of_their_own_images():
    """Nothing of a batch that four devices share goes from one to another."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", SHARED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
