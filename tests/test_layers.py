"""The convolution for training on a CPU against the usual one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import levit_flax as lf
from configs import TINY, random_variables
from levit_flax.training_convolution import _convolve_patches

PROGRAMS = Path(__file__).parent / "programs"
OPTIONS = ((2, 2), ((1, 1), (1, 1)))  # strides and padding of the stem


def convolve(x, kernel, strides, padding, precision):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (3, 7, 10, 4), (1, 5, 1, 2)])
def test_patches_equal_the_convolution(shape):
    """In value and in the first and second derivatives by images and kernel, in forward and reverse mode."""
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        point = rng.normal(size=shape), rng.normal(size=(3, 3, shape[-1], 6))
        step = tuple(rng.normal(size=part.shape) for part in point)

        @jax.jit
        def push_forward(point, step):
            return [
                jax.jvp(lambda *point, function=function: function(*point, *OPTIONS, precision="highest"), point, step)
                for function in (_convolve_patches, convolve)
            ]

        (values, forward), (expected, expected_forward) = push_forward(point, step)
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(forward, expected_forward, rtol=1e-12, atol=1e-12)

        def loss(x, kernel, function):
            return jnp.square(function(x, kernel, *OPTIONS, precision="highest")).sum()

        def steepness(x, kernel, function):
            return sum(jnp.square(part).sum() for part in jax.grad(loss, (0, 1))(x, kernel, function))

        for scalar in (loss, steepness):
            gradient = jax.jit(jax.grad(scalar, (0, 1)), static_argnums=2)
            for found, wanted in zip(gradient(*point, _convolve_patches), gradient(*point, convolve), strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_only_training_on_a_cpu_takes_patches(monkeypatch):
    model = lf.LevitForImageClassification(lf.LevitConfig(**TINY))
    variables = random_variables(model)

    def convolutions(train):
        program = jax.make_jaxpr(lambda variables, x: model.apply(variables, x, train=train, mutable=["batch_stats"]))
        return str(program(variables, np.zeros((2, 32, 48, 3), np.float32))).count("conv_general_dilated[")

    assert (convolutions(train=True), convolutions(train=False)) == (0, 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (convolutions(train=True), convolutions(train=False)) == (4, 4)


def test_taking_patches_moves_no_data_between_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, PROGRAMS / "patches_on_four_devices.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
