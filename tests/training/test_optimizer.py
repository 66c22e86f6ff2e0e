"""The schedule of the learning rate, clipping, weight decay, and recipes for the optimizer that are refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")

from training_steps import (
    RECIPE,
    SAME_SUM,
    STEPS_PER_EPOCH,
    TINY,
    TWO_HEADS,
    compiled,
    make_task,
    random_model,
    same_bits,
)

from levit_flax.convert.layouts import _LAYOUTS, _Structure
from levit_flax.training.optimizer import (
    _clip_adaptively,
    _decays,
    _learning_rate_schedule,
    _make_optimizer,
    _match_patterns,
)
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


def test_factors_scale_the_whole_update():
    generator = np.random.default_rng(1)
    names = ("stem/kernel", "stem/bias", "stage_0/kernel", "head/kernel")
    params, gradients = (
        {name: generator.standard_normal((2, 3) if "kernel" in name else 3).astype(np.float32) for name in names}
        for _ in range(2)
    )
    table = {"stem/.*": 0.25, "stage_0/.*": 0.5, ".*": 1.0}
    factors = _match_patterns(table, params, "learning_rates")
    updates = []
    for given in (factors, dict.fromkeys(params, 1.0)):
        optimizer = _make_optimizer(RECIPE, given, STEPS_PER_EPOCH)
        updates.append(jax.device_get(optimizer.update(gradients, optimizer.init(params), params)[0]))
    for path in params:
        factor = 0.25 if path.startswith("stem") else 0.5 if path.startswith("stage_0") else 1.0
        np.testing.assert_array_equal(updates[0][path], np.float32(factor) * updates[1][path], err_msg=path)
        assert (updates[1][path] != 0).all()


def test_weight_decay_applies_to_kernels_alone():
    _, variables = random_model(TWO_HEADS)
    params = flatten_dict(variables["params"], sep="/")
    decayed = {path for path, x in params.items() if _decays(path, x)}
    assert decayed == {path for path in params if path.endswith("/kernel")}
    assert not _decays("stage_0/block_0/attention/attention_biases", np.zeros((9, 2)))
    assert not _decays("downsample_0/attention/attention_biases", np.zeros((1, 2)))
    assert not _decays("head/linear/bias", np.zeros(5))


def test_clipping_equals_timm_on_every_tensor():
    torch = pytest.importorskip("torch")
    adaptive_clip_grad = pytest.importorskip("timm.utils.agc").adaptive_clip_grad
    pytest.importorskip("transformers")
    from oracles import torch_model

    config, factor = dataclasses.replace(TINY, image_size=32), 0.02  # one token in the second stage
    reference = torch_model(config, TWO_HEADS.__name__)
    generator = torch.Generator().manual_seed(1)

    def unit_norm(x):
        return x.norm() if x.ndim == 1 else x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))

    with torch.no_grad():
        dict(reference.named_parameters())["classifier.linear.bias"].zero_()  # taken for CLIP_EPSILON
        dict(reference.named_parameters())["classifier.linear.weight"][0] = 0
        for parameter in reference.parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            norm = unit_norm(gradient)
            size = 10 ** (2 * torch.rand(norm.shape, generator=generator, dtype=torch.float64) - 1)
            parameter.grad = gradient / norm * size * factor * unit_norm(parameter).clamp(min=1e-3)
        dict(reference.named_parameters())["classifier.linear.weight"].grad[1] = 0
    rows = {
        row.torch: row
        for row in _LAYOUTS["hf"].rows(_Structure.of(config, TWO_HEADS.head_names))
        if row.flax.startswith("params/")
    }
    parameters = dict(reference.named_parameters())
    assert rows.keys() == parameters.keys()
    before = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    adaptive_clip_grad(parameters.values(), factor)

    with jax.enable_x64(True):
        params, gradients = (
            {name: jnp.asarray(row.permutation.to_flax(tensors[name].detach().numpy())) for name, row in rows.items()}
            for tensors in (parameters, before)
        )
        clip = compiled(lambda given, params: _clip_adaptively(factor).update(given, None, params)[0])
        found = jax.device_get(clip(gradients, params))
    shapes = set()
    for name, row in rows.items():
        wanted = parameters[name].grad
        np.testing.assert_allclose(
            found[name], row.permutation.to_flax(wanted.numpy()), rtol=SAME_SUM, atol=0, err_msg=name
        )
        if wanted.ndim > 1 and len(wanted) > 4:
            clipped = (wanted != before[name]).flatten(1).any(1)
            assert clipped.any() and not clipped.all(), name
        if name.endswith("attention_biases"):
            shapes.add(tuple(wanted.shape))
    assert shapes == {(2, 1), (2, 4)}
    assert not all(same_bits(x.grad, before[name]) for name, x in parameters.items() if x.ndim == 1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"head/.*": 1.0},
            r'learning_rates does not cover .*/attention_biases: expected a pattern for every parameter. Add "\.\*" at',
        ),
        (
            {".*": 1.0, "head/.*": 2.0},
            r"learning_rates: 'head/\.\*' matches no parameter, or only those of earlier patterns",
        ),
        ({"(": 1.0, ".*": 1.0}, r"learning_rates: '\(' is not a valid regular expression \(missing \)"),
        ({"head": 0.0, ".*": 1.0}, r"learning_rates: 'head' matches no parameter"),  # the whole path must match
    ],
)
def test_learning_rate_tables_that_do_not_fit_are_refused(table, message):
    model, variables = random_model()
    with pytest.raises(RecipeError, match=message):
        make_task(model, variables, learning_rates=table)
