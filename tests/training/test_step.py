"""One training step, compared with PyTorch and with arithmetic by hand.

The models are tiny and compiled steps are shared, because compilation takes most of the time.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")

from timm.utils.agc import adaptive_clip_grad  # noqa: E402
from training_steps import (  # noqa: E402
    FLOAT32_ROUNDING,
    ONE_HEAD,
    RECIPE,
    SAME_SUM,
    STEPS,
    STEPS_PER_EPOCH,
    TINY,
    TWO_HEADS,
    compiled,
    make_task,
    random_batch,
    random_model,
    same_bits,
)

import levit_flax as lf  # noqa: E402
from configs import unusual_config  # noqa: E402
from levit_flax import convert  # noqa: E402
from levit_flax.training.optimizer import _learning_rate_schedule  # noqa: E402
from levit_flax.training.state import _Batch, _State, _Task  # noqa: E402
from oracles import state_dict, torch_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Float64, after five steps. AdamW divides a gradient by its own size. Some gradients are zero except for noise (those
# of biases that the next batch norm subtracts), and would become full steps of a random sign. In float64 the noise is
# 1e-17, far below AdamW's epsilon of 1e-8, so that every tensor can be compared.
PARAMETERS_LIMIT = 1e-8
LOSS_LIMIT = 1e-5  # float32, relative: rounding of the forward pass and of five steps
BFLOAT16_LIMIT = 0.05  # relative, of a loss: 8 bits of precision through a small model


def cross_entropy(logits, targets):
    logits = np.asarray(logits, np.float64)
    return -(targets * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1).mean()


# PyTorch


def teacher(weights, pixel_values):
    return pixel_values.mean((1, 2)) @ weights


def pytorch_loss(reference, batch, recipe, teacher_logits):
    out = reference(torch.from_numpy(batch.pixels[0]).permute(0, 3, 1, 2))
    labels = torch.from_numpy(batch.targets[0])
    if recipe.distillation == "none":
        return torch.nn.functional.cross_entropy(out.logits, labels, label_smoothing=recipe.label_smoothing)
    base = torch.nn.functional.cross_entropy(out.cls_logits, labels, label_smoothing=recipe.label_smoothing)
    taught = torch.nn.functional.cross_entropy(out.distillation_logits, torch.from_numpy(teacher_logits).argmax(1))
    return (1 - recipe.distillation_alpha) * base + recipe.distillation_alpha * taught


def pytorch_adamw(reference, recipe):
    """Return AdamW with the reference's groups, without and with weight decay."""
    groups = [], []
    for name, parameter in reference.named_parameters():
        spared = parameter.ndim == 1 or name.endswith((".bias", "attention_biases"))
        groups[not spared].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": recipe.weight_decay}],
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
    )


def clip_pytorch(reference, factor):
    """Clip the gradients with timm, and return the share of entries that changed."""
    before = [parameter.grad.clone() for parameter in reference.parameters()]
    adaptive_clip_grad(reference.parameters(), factor)
    changed = [(p.grad != grad).double().mean() for p, grad in zip(reference.parameters(), before, strict=True)]
    return float(sum(changed)) / len(changed)


class Trained(NamedTuple):
    """Five steps here and in PyTorch; index 0 of `states` is before the first."""

    task: _Task
    step: Any
    states: list[_State]
    metrics: list[Any]
    batches: list[_Batch]
    teacher_variables: Any
    reference: Any


def train(config, model_class, **changes):
    """Take five steps of AdamW in float64 from the same weights on the same batches, here and in PyTorch."""
    recipe = dataclasses.replace(RECIPE, distillation="hard" if model_class is TWO_HEADS else "none", **changes)
    distills = recipe.distillation != "none"
    reference = torch_model(config, model_class.__name__).train()
    start = state_dict(reference)
    weights = np.random.default_rng(9).standard_normal((3, config.num_labels)) if distills else None
    batches = [random_batch(seed, np.float64, config=config) for seed in range(STEPS)]

    with jax.enable_x64(True):
        model, variables = convert.from_torch(start, jnp.float64, config=config)
        task = _Task(
            model.clone(precision="highest"),
            recipe,
            lf.LevitImageProcessor(),
            variables["params"],
            STEPS_PER_EPOCH,
            teacher if distills else None,
        )
        step = compiled(task.train_step)
        states, metrics = [jax.device_get(task.init(variables))], []
        for batch in batches:
            state, seen = jax.device_get(step(states[-1], weights, batch))
            states.append(state)
            metrics.append(seen)

    optimizer, losses, clipped = pytorch_adamw(reference, recipe), [], []
    # The same numbers, not the same formula: optax computes them in float32, which five steps turn into 1e-7.
    schedule = _learning_rate_schedule(recipe, STEPS_PER_EPOCH)
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(number))
        optimizer.zero_grad()
        loss = pytorch_loss(reference, batch, recipe, distills and teacher(weights, batch.pixels[0]))
        loss.backward()
        if recipe.adaptive_clip:
            clipped.append(clip_pytorch(reference, recipe.adaptive_clip))
        optimizer.step()
        losses.append(loss.item())
    assert all(0.1 < share < 0.9 for share in clipped)
    np.testing.assert_allclose([seen.loss for seen in metrics], losses, rtol=PARAMETERS_LIMIT)
    return Trained(task, step, states, metrics, batches, weights, reference)


def check_parity(trained):
    before, after = (convert.to_torch(trained.task.model, trained.states[i].variables, layout="hf") for i in (0, STEPS))
    wanted = state_dict(trained.reference)
    assert after.keys() == wanted.keys()
    parameters = [name for name, _ in trained.reference.named_parameters()]
    for name, tensor in wanted.items():
        assert np.abs(after[name] - tensor).max() < PARAMETERS_LIMIT, name
    moved = [np.abs(after[name] - before[name]).max() for name in parameters]
    assert np.median(moved) > 1e5 * PARAMETERS_LIMIT  # otherwise the comparison would prove little


@pytest.fixture(scope="module")
def trained(standard_promotion):
    # Not 0.5, with which swapped losses would go unnoticed.
    return train(TINY, TWO_HEADS, adaptive_clip=0.03, ema_decay=0.2, distillation_alpha=0.3)


def test_five_steps_with_hard_distillation_and_clipping_equal_pytorch(trained):
    check_parity(trained)


@pytest.mark.slow
def test_five_steps_with_one_head_equal_pytorch():
    check_parity(train(TINY, ONE_HEAD))


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.0, 0.03])
@pytest.mark.parametrize("model_class", [ONE_HEAD, TWO_HEADS])
def test_five_steps_of_a_larger_model_equal_pytorch(model_class, clip):
    check_parity(train(unusual_config("odd grids"), model_class, adaptive_clip=clip))


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [ONE_HEAD, TWO_HEADS])
def test_losses_of_five_float32_steps_of_gradient_descent_equal_pytorch(model_class):
    # Not AdamW: in float32 it would make steps of noise, see above.
    rate, distills = 0.02, model_class is TWO_HEADS
    reference = torch_model(TINY, model_class.__name__).float().train()
    model, variables = convert.from_torch(state_dict(reference), jnp.float32, config=TINY)
    model = model.clone(precision="highest")
    task = make_task(model, variables, distillation="hard" if distills else "none", distillation_alpha=0.3)
    trained, statistics = flatten_dict(variables["params"], sep="/"), variables["batch_stats"]

    @compiled
    def step(trained, statistics, batch):
        (loss, (statistics, _)), gradients = jax.value_and_grad(task._loss, has_aux=True)(
            trained, {}, statistics, None, batch, jax.random.key(0)
        )
        return jax.tree.map(lambda x, gradient: x - rate * gradient, trained, gradients), statistics, loss

    optimizer, found, wanted = torch.optim.SGD(reference.parameters(), rate), [], []
    for seed in range(STEPS):
        batch = random_batch(seed % 2, teacher_logits=distills)
        trained, statistics, loss = step(trained, statistics, jax.tree.map(lambda x: x[0], batch))
        found.append(float(loss))
        optimizer.zero_grad()
        loss = pytorch_loss(reference, batch, task.recipe, distills and batch.teacher_logits[0])
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    np.testing.assert_allclose(found, wanted, rtol=LOSS_LIMIT)
    assert wanted[4] < 0.9 * wanted[0]


# State after the steps


def test_all_running_statistics_move(trained):
    before, after = (flatten_dict(trained.states[i].variables["batch_stats"], sep="/") for i in (0, 1))
    for path in before:
        assert (after[path] != before[path]).all(), path
        if path.endswith("/count"):
            assert after[path] == before[path] + 1


def test_attention_biases_are_trained(trained):
    # The reference's fine-tuning runs in evaluation mode, where a cache keeps them as they were.
    before, after = (flatten_dict(trained.states[i].variables["params"], sep="/") for i in (0, STEPS))
    biases = [path for path in before if path.endswith("/attention_biases")]
    assert len(biases) == 2
    for path in biases:
        assert (np.abs(after[path] - before[path]) > 1e-6).all(), path


def test_averaged_weights_follow_the_recurrence(trained):
    averages = [flatten_dict(state.average, sep="/") for state in trained.states]
    variables = [flatten_dict(state.variables, sep="/") for state in trained.states]
    assert same_bits(averages[0], variables[0])
    for step in range(STEPS):
        decay = min(0.2, (1 + step) / (10 + step))
        for path, average in averages[step + 1].items():
            if path.endswith("/count"):
                assert average.dtype == np.int32 and average == variables[step + 1][path]
            else:
                wanted = decay * averages[step][path] + (1 - decay) * variables[step + 1][path]
                np.testing.assert_allclose(average, wanted, rtol=FLOAT32_ROUNDING, atol=1e-7, err_msg=path)
    assert min(0.2, 3 / 12) == 0.2 > 2 / 11  # both branches were taken


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_infinite_step_changes_nothing_and_blocks_later_ones(trained, bad):
    state, batch = trained.states[2], trained.batches[2]
    pixels = batch.pixels.copy()
    pixels[0, 0, 0, 0, 0] = bad
    with jax.enable_x64(True):
        broken, seen = jax.device_get(trained.step(state, trained.teacher_variables, batch._replace(pixels=pixels)))
        later, finite = jax.device_get(trained.step(broken, trained.teacher_variables, batch))
    assert not np.isfinite(seen.loss) and np.isfinite(finite.loss)
    for after in (broken, later):
        assert after.broken and not state.broken
        assert same_bits(dataclasses.replace(after, broken=state.broken), state)
    assert not same_bits(trained.states[3].variables, state.variables)


HEADS_ONLY = {"(head|head_dist)/.*": 1.0, ".*": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("table", [HEADS_ONLY, {".*": 1.0}], ids=["heads", "all"])
def test_bfloat16_computes_nearly_the_same_loss_and_keeps_float32(trained, table):
    start = convert.to_torch(trained.task.model, trained.states[0].variables, layout="hf")
    model, variables = convert.from_torch(start, jnp.float32, config=TINY)
    recipe = dataclasses.replace(trained.task.recipe, learning_rates=table)
    task = _Task(
        model.clone(dtype=jnp.bfloat16), recipe, lf.LevitImageProcessor(), variables["params"], STEPS_PER_EPOCH
    )
    batch = random_batch(0)
    stored = teacher(trained.teacher_variables, batch.pixels[0]).astype(np.float32)[None]
    before = task.init(variables)
    state, seen = compiled(task.train_step)(before, None, batch._replace(teacher_logits=stored))
    assert float(seen.loss) == pytest.approx(float(trained.metrics[0].loss), rel=BFLOAT16_LIMIT)
    assert float(seen.loss) != pytest.approx(float(trained.metrics[0].loss), rel=LOSS_LIMIT)
    assert seen.loss.dtype == jnp.float32
    for path, leaf in flatten_dict(state.variables, sep="/").items():
        assert leaf.dtype == (jnp.int32 if path.endswith("/count") else jnp.float32), path
        assert np.isfinite(leaf).all(), path
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, before)
    assert not same_bits(state.variables["params"]["head"], before.variables["params"]["head"])


def test_step_in_bfloat16_keeps_the_state_in_float32():
    model, variables = random_model()
    task = make_task(model.clone(dtype=jnp.bfloat16), variables, ema_decay=0.9)
    before = jax.eval_shape(task.init, variables)
    after, seen = jax.eval_shape(task.train_step, before, None, random_batch())
    assert seen.loss.dtype == jnp.float32
    for path, leaf in flatten_dict(after.variables, sep="/").items():
        assert leaf.dtype == (jnp.int32 if path.endswith("/count") else jnp.float32), path
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)


# Freezing


def test_frozen_backbone_keeps_every_bit():
    model, variables = random_model()
    task = make_task(
        model, variables, learning_rates={"head/.*": 1.0, ".*": 0.0}, batch_norm="freeze_with_parameters", ema_decay=0.9
    )
    step, start = compiled(task.train_step), task.init(variables)
    state = start
    for seed in range(3):
        state, _ = step(state, None, random_batch(seed))
    for before, after in ((start.variables, state.variables), (start.average, state.average)):
        before, after = (jax.device_get(flatten_dict(tree, sep="/")) for tree in (before, after))
        for path in before:
            if path.split("/")[1] == "head":
                assert (before[path] != after[path]).any(), path
            else:
                np.testing.assert_array_equal(after[path], before[path], err_msg=path)


def test_rematerialized_step_freezes_the_same_statistics():
    with jax.enable_x64(True):
        model, variables = random_model(dtype=jnp.float64, drop_path_rate=0.3)
        table = {"(head|stage_1)/.*": 1.0, ".*": 0.0}
        results = []
        for remat in (False, True):
            task = make_task(
                model.clone(remat=remat), variables, batch_norm="freeze_with_parameters", learning_rates=table
            )
            state, _ = compiled(task.train_step)(task.init(variables), None, random_batch(0, np.float64))
            results.append(jax.device_get(flatten_dict(state.variables, sep="/")))
    moved = set()
    for path, wanted in results[0].items():
        np.testing.assert_allclose(results[1][path], wanted, rtol=0, atol=PARAMETERS_LIMIT, err_msg=path)
        if not np.array_equal(wanted, flatten_dict(variables, sep="/")[path]):
            moved.add(path.split("/")[1])
    assert moved == {"head", "stage_1"}


@pytest.mark.slow
def test_frozen_statistics_are_used_and_kept_and_parts_of_a_batch_add_up_to_it():
    with jax.enable_x64(True):
        model, variables = random_model(TWO_HEADS, jnp.float64)
        batch, results = random_batch(0, np.float64), []
        for parts in (1, 3):
            task = make_task(
                model,
                variables,
                batch_norm="freeze",
                accumulation=parts,
                learning_rates=HEADS_ONLY,
            )
            split = _Batch(*(x.reshape(parts, -1, *x.shape[2:]) for x in batch[:2]))
            results.append(jax.device_get(compiled(task.train_step)(task.init(variables), None, split)))
        out = jax.device_get(compiled(model.apply)(variables, batch.pixels[0]))
    (whole, seen), (parted, seen_in_parts) = results

    targets = np.eye(5)[batch.targets[0]] * 0.9 + 0.1 / 5
    wanted = (cross_entropy(out.cls_logits, targets) + cross_entropy(out.distillation_logits, targets)) / 2
    assert seen.loss == pytest.approx(wanted, rel=SAME_SUM)
    assert seen.correct == (out.logits.argmax(-1) == batch.targets[0]).sum()
    assert same_bits(whole.variables["batch_stats"], variables["batch_stats"])
    assert same_bits(parted.variables["batch_stats"], variables["batch_stats"])

    assert (seen_in_parts.loss, seen_in_parts.correct) == (pytest.approx(seen.loss, rel=SAME_SUM), seen.correct)
    assert seen_in_parts.gradient == pytest.approx(seen.gradient, rel=SAME_SUM)
    start, once, parts = (
        flatten_dict(tree, sep="/")
        for tree in (variables["params"], whole.variables["params"], parted.variables["params"])
    )
    for path in start:
        np.testing.assert_allclose(parts[path], once[path], rtol=0, atol=SAME_SUM, err_msg=path)
        assert not path.startswith("head") or (once[path] != start[path]).any(), path


def test_each_part_of_a_batch_updates_the_statistics_and_drops_other_branches():
    model, variables = random_model(drop_path_rate=0.5)
    task = make_task(model, variables, learning_rates={"head/.*": 1.0, ".*": 0.0}, accumulation=3, weight_decay=0.0)
    step, start = compiled(task.train_step), task.init(variables)
    batch = random_batch(0, parts=3)
    state, seen = step(start, None, batch)
    before, after = (
        jax.device_get(flatten_dict(tree["batch_stats"], sep="/")) for tree in (start.variables, state.variables)
    )
    for path in before:
        if path.endswith("/count"):
            assert after[path] == before[path] + 3, path
    assert same_bits(step(start, None, batch), (state, seen))
    # Without drop path neither the step's number nor the order of the parts would matter.
    in_another_order = _Batch(*(np.roll(x, 1, axis=0) for x in batch[:2]))
    for given, images in ((dataclasses.replace(start, step=jnp.int32(1)), batch), (start, in_another_order)):
        _, other = step(given, None, images)
        assert abs(float(other.loss - seen.loss)) > LOSS_LIMIT
