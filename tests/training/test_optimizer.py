"""The schedule of the learning rate, and recipes for the optimizer that are refused."""

import math

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")

from levit_flax.training.optimizer import _learning_rate_schedule
from levit_flax.training.recipe import Recipe, RecipeError

pytestmark = pytest.mark.usefixtures("standard_promotion")

SCHEDULE_LIMIT = 1e-5  # float32: optax takes the start as a difference from the peak


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    recipe = Recipe(
        epochs=10,
        warmup_epochs=2,
        learning_rate=4e-3,
        warmup_learning_rate=1e-5,
        min_learning_rate=1e-4,
        batch_size=64,
        learning_rate_batch=512,
    )
    peak = 4e-3 * 64 / 512
    schedule = _learning_rate_schedule(recipe, 7)
    rates = [float(schedule(step)) for step in range(71)]
    line = [1e-5 + (peak - 1e-5) * step / 14 for step in range(14)]
    cosine = [1e-4 + (peak - 1e-4) * (1 + math.cos(math.pi * step / 56)) / 2 for step in range(57)]
    np.testing.assert_allclose(rates, line + cosine, rtol=SCHEDULE_LIMIT)
    assert (rates[14], rates[70]) == (pytest.approx(peak), pytest.approx(1e-4))


def test_learning_rate_without_warmup_begins_at_the_peak():
    schedule = _learning_rate_schedule(Recipe(warmup_epochs=0, learning_rate=1e-3), 5)
    assert float(schedule(0)) == pytest.approx(1e-3)
    assert float(schedule(1)) < 1e-3


def test_warmup_is_rounded_to_steps():
    schedule = _learning_rate_schedule(Recipe(epochs=2, warmup_epochs=0.5, learning_rate=1e-3), 3)
    assert float(schedule(1)) < 1e-3 == pytest.approx(float(schedule(2)))


@pytest.mark.parametrize("factor", [-0.1, float("nan"), "fast", True])
def test_factors_that_are_no_numbers_are_refused(factor):
    with pytest.raises(RecipeError, match=r"learning_rates gives '\.\*' the factor .*: expected a non-negative number"):
        Recipe(learning_rates={".*": factor})


@pytest.mark.parametrize("name", ["learning_rate", "epsilon"])
def test_zero_divisors_are_refused(name):
    with pytest.raises(RecipeError, match=rf"{name} is 0\.0: expected more than 0"):
        Recipe(**{name: 0.0})
