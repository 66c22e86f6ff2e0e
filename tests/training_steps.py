"""A tiny model, a recipe, batches and compiled steps that the tests of single training steps share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import levit_flax as lf
from configs import random_variables
from levit_flax import LevitConfig
from levit_flax.training.recipe import Recipe
from levit_flax.training.state import _Batch, _Task

SAME_SUM = 1e-12  # float64: the same terms added in another order
FLOAT32_ROUNDING = 1e-6  # a few operations

ONE_HEAD, TWO_HEADS = lf.LevitForImageClassification, lf.LevitForImageClassificationWithTeacher
STEPS, STEPS_PER_EPOCH, BATCH = 5, 2, 6

TINY = LevitConfig(
    image_size=48,
    hidden_sizes=(16, 24),
    num_attention_heads=(1, 2),
    depths=(0, 1),
    key_dim=(8, 8),
    mlp_ratio=(0, 2),
    attention_ratio=(2, 2),
    down_ops=(("Subsample", 8, 2, 2, 0, 2),),
    num_labels=5,
)
# Values so large that each of them matters after five steps.
RECIPE = Recipe(
    epochs=4,
    batch_size=BATCH,
    learning_rate=3e-3,
    warmup_epochs=1,
    warmup_learning_rate=1e-3,
    min_learning_rate=1e-4,
    weight_decay=0.2,
    adaptive_clip=0.0,
    label_smoothing=0.1,
)
# Optimizing takes longer than these models take to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(function):
    return jax.jit(function, compiler_options=QUICK)


def make_task(model, variables, teacher=None, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return _Task(model, recipe, lf.LevitImageProcessor(), variables["params"], STEPS_PER_EPOCH, teacher)


def random_model(model_class=ONE_HEAD, dtype=jnp.float32, **changes):
    model = model_class(dataclasses.replace(TINY, **changes), param_dtype=dtype, precision="highest")
    return model, random_variables(model)


def random_batch(seed=0, dtype=np.float32, parts=1, config=TINY, teacher_logits=False):
    """Return a batch of normalized images."""
    generator = np.random.default_rng(seed)
    shape = (parts, BATCH // parts)
    return _Batch(
        generator.standard_normal((*shape, *config.image_height_width, 3)).astype(dtype),
        generator.integers(0, config.num_labels, shape),
        generator.standard_normal((*shape, config.num_labels)).astype(dtype) if teacher_logits else None,
    )


def same_bits(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))
