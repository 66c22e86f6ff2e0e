"""The training state, and the training and evaluation steps as pure functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from levit_flax.configuration import _MULTI_LABEL, _SINGLE_LABEL
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.inference import _normalize
from levit_flax.layers import _BatchNorm
from levit_flax.modeling import LevitBase, LevitForImageClassificationWithTeacher, Variables

from .augmentation import _erase, _mix
from .losses import _distillation_loss, _label_loss, _soft_targets
from .optimizer import _make_optimizer, _match_patterns
from .recipe import Recipe


@struct.dataclass
class _State:
    """The training state.

    Attributes:
        step: int32, number of steps done.
        variables: the model's variables, {"params": ..., "batch_stats": ...}.
        average: the moving average of the variables, or None.
        opt_state: the optimizer's state.
        broken: bool, whether the loss or a gradient was NaN or infinite. That step and later ones are not applied.
    """

    step: jax.Array
    variables: Variables
    average: Variables | None
    opt_state: Any
    broken: jax.Array


@struct.dataclass
class _Metrics:
    """The metrics of a step, as scalars.

    Attributes:
        loss: mean over the batch.
        correct: number of images classified correctly; the class of a mixed image is that of its larger share.
        gradient: global norm of the gradients, before clipping.
    """

    loss: jax.Array
    correct: jax.Array
    gradient: jax.Array


class _Batch(NamedTuple):
    """The images of one step, in A parts (`accumulation`).

    Attributes:
        pixels: [A B H W C], uint8 levels, or floating-point values normalized by the processor.
        targets: class indices [A B], or floating-point targets [A B L].
        teacher_logits: stored logits [A B L], or None.
    """

    pixels: Any
    targets: Any
    teacher_logits: Any = None


_Teacher = Callable[[Any, jax.Array], jax.Array]  # (its variables, pixel_values [B H W C]) -> logits [B L]


class _Task:
    """The initial state and the steps of a recipe for one model.

    Args:
        model: a model with one head, or with two for distillation; not folded.
        recipe: how to train.
        processor: normalizes uint8 pixels.
        params: the model's parameters, or their shapes.
        steps_per_epoch: number of steps in one epoch.
        teacher: returns the logits that `head_dist` learns from; None without distillation, or if the
            batches contain them.

    Raises:
        RecipeError: `learning_rates` does not fit the parameters.
    """

    def __init__(
        self,
        model: LevitBase,
        recipe: Recipe,
        processor: LevitImageProcessor,
        params: Mapping[str, Any],
        steps_per_epoch: int,
        teacher: _Teacher | None = None,
    ) -> None:
        self.model, self.recipe, self.processor, self.teacher = model, recipe, processor, teacher
        self.problem_type = model.config.problem_type or _SINGLE_LABEL
        factors = _match_patterns(recipe.learning_rates, params, "learning_rates")
        self.trained = {path: factor for path, factor in factors.items() if factor}
        self.optimizer = _make_optimizer(recipe, self.trained, steps_per_epoch)

    def init(self, variables: Variables) -> _State:
        """Return the state before the first step."""
        variables = jax.tree.map(jnp.copy, variables)  # because the state is donated
        flat = flatten_dict(variables["params"], sep="/")
        return _State(
            step=jnp.zeros((), jnp.int32),
            variables=variables,
            average=jax.tree.map(jnp.copy, variables) if self.recipe.ema_decay else None,
            opt_state=self.optimizer.init({path: flat[path] for path in self.trained}),
            broken=jnp.zeros((), bool),
        )

    def train_step(self, state: _State, teacher_variables: Any, batch: _Batch) -> tuple[_State, _Metrics]:
        """Return the state after one step of the optimizer, and the metrics.

        `teacher_variables` is the first argument of the teacher; None without a teacher.
        """
        flat = flatten_dict(state.variables["params"], sep="/")
        trained = {path: flat[path] for path in self.trained}
        differentiate = jax.value_and_grad(self._loss, has_aux=True)

        def compute(statistics: Any, part: _Batch, key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
            (loss, (statistics, correct)), gradients = differentiate(
                trained, flat, statistics, teacher_variables, part, key
            )
            return statistics, (gradients, loss, correct)

        parts = batch.targets.shape[0]
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), state.step)
        keys = jax.random.split(key, parts)
        statistics, totals = _compute_parts(compute, state.variables["batch_stats"], batch, keys)
        gradients, loss = jax.tree.map(lambda x: x / parts, totals[:2])

        updates, opt_state = self.optimizer.update(gradients, state.opt_state, trained)
        params = unflatten_dict({**flat, **optax.apply_updates(trained, updates)}, sep="/")
        variables = {"params": params, "batch_stats": statistics}
        metrics = _Metrics(loss=loss, correct=totals[2], gradient=optax.tree.norm(gradients))
        broken = state.broken | ~jnp.isfinite(metrics.loss) | ~jnp.isfinite(metrics.gradient)
        before = dataclasses.replace(state, broken=broken)
        after = _State(state.step + 1, variables, self._averaged(state, variables), opt_state, broken)
        return jax.tree.map(lambda old, new: jnp.where(broken, old, new), before, after), metrics

    def _loss(
        self,
        trained: Mapping[str, jax.Array],
        flat: Mapping[str, jax.Array],
        statistics: Any,
        teacher_variables: Any,
        batch: _Batch,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        recipe = self.recipe
        erase_key, mix_key, drop_key = jax.random.split(key, 3)
        pixel_values, targets = self.prepare(batch)
        if recipe.erase:
            pixel_values = _erase(erase_key, pixel_values, recipe.erase)
        if recipe.mixup or recipe.cutmix:
            pixel_values, targets = _mix(mix_key, pixel_values, targets, recipe)

        variables = {"params": unflatten_dict({**flat, **trained}, sep="/"), "batch_stats": statistics}
        with nn.intercept_methods(self._freeze_statistics):
            output, updates = self.model.apply(
                variables, pixel_values, train=True, rngs={"drop_path": drop_key}, mutable=["batch_stats"]
            )
        two_heads = isinstance(self.model, LevitForImageClassificationWithTeacher)
        given = (output.cls_logits, output.distillation_logits) if two_heads else (output.logits,)
        heads = [head.astype(targets.dtype) for head in given]
        loss = _label_loss(heads[0], targets, self.problem_type)
        if recipe.distillation != "none":
            logits = batch.teacher_logits
            if self.teacher is not None:
                logits = self.teacher(teacher_variables, pixel_values)
            distilled = _distillation_loss(heads[1], logits, recipe.distillation, recipe.distillation_temperature)
            loss = (1 - recipe.distillation_alpha) * loss + recipe.distillation_alpha * distilled
        elif two_heads:
            loss = (loss + _label_loss(heads[1], targets, self.problem_type)) / 2
        correct = _count_correct(sum(heads[1:], heads[0]), targets, self.problem_type)
        return loss, (updates["batch_stats"], correct)

    def prepare(self, batch: _Batch, smoothing: float | None = None) -> tuple[jax.Array, jax.Array]:
        """Return pixel values [B H W C] and smoothed targets [B L] of a part; None is the recipe's smoothing."""
        dtype = jnp.promote_types(jnp.float32, self.model.param_dtype)
        pixels = batch.pixels
        pixel_values = _normalize(pixels, self.processor, dtype) if pixels.dtype == jnp.uint8 else pixels
        targets = batch.targets
        if self.problem_type == _SINGLE_LABEL:
            smoothing = self.recipe.label_smoothing if smoothing is None else smoothing
            targets = _soft_targets(targets, self.model.config.num_labels, smoothing, dtype)
        return pixel_values.astype(dtype), targets.astype(dtype)

    def _freeze_statistics(self, method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """Make batch norms use their running statistics if the recipe freezes them."""
        module = context.module
        if not isinstance(module, _BatchNorm) or self.recipe.batch_norm == "train":
            return method(*args, **kwargs)
        frozen = self.recipe.batch_norm == "freeze" or "/".join((*module.path, "scale")) not in self.trained
        return method(args[0], False) if frozen else method(*args, **kwargs)

    def _averaged(self, state: _State, variables: Variables) -> Variables | None:
        if state.average is None:
            return None
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(self.recipe.ema_decay, (1 + step) / (10 + step))

        def blend(old: jax.Array, new: jax.Array) -> jax.Array:
            if jnp.issubdtype(new.dtype, jnp.integer):
                return new
            # The rounding of decay * old + (1 - decay) * new would change frozen parameters.
            return (old + (1 - decay) * (new - old)).astype(old.dtype)

        average: Variables = jax.tree.map(blend, state.average, variables)
        return average

    def evaluate_step(self, variables: Variables, batch: _Batch, weights: jax.Array) -> dict[str, jax.Array]:
        """Return the sums "loss", "correct" and "images" over one validation batch with A = 1.

        `weights` [1 B] is 1 for an image and 0 for padding.
        """
        pixel_values, targets = self.prepare(jax.tree.map(lambda x: x[0], batch), smoothing=0.0)
        output: Any = self.model.apply(variables, pixel_values, return_dict=True)
        logits = output.logits.astype(targets.dtype)
        losses = jax.vmap(lambda row, target: _label_loss(row[None], target[None], self.problem_type))(logits, targets)
        hits = _count_correct(logits, targets, self.problem_type, weights[0])
        return {"loss": jnp.sum(losses * weights[0]), "correct": hits, "images": weights.sum()}


def _compute_parts(compute: Any, statistics: Any, batch: _Batch, keys: jax.Array) -> tuple[Any, Any]:
    """Sum the results of `compute(statistics, part, key)` over the parts, passing the statistics from part to part."""
    first = jax.tree.map(lambda x: x[0], (batch, keys))
    if len(keys) == 1:
        result: tuple[Any, Any] = compute(statistics, *first)
        return result
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, statistics, *first)[1])

    def add(carry: Any, given: Any) -> Any:
        statistics, totals = carry
        statistics, more = compute(statistics, *given)
        return (statistics, jax.tree.map(jnp.add, totals, more)), None

    return jax.lax.scan(add, (statistics, zeros), (batch, keys))[0]


def _count_correct(logits: jax.Array, targets: jax.Array, problem_type: str, weights: Any = 1.0) -> jax.Array:
    """Return the number of images whose class, or all of whose labels, are predicted correctly; 0 for regression."""
    if problem_type == _SINGLE_LABEL:
        right = logits.argmax(-1) == targets.argmax(-1)
    elif problem_type == _MULTI_LABEL:
        right = ((logits > 0) == (targets > 0.5)).all(-1)
    else:
        right = jnp.zeros(len(logits), bool)
    return jnp.sum(right * jnp.asarray(weights, jnp.float32))
