"""The NNX module computes, trains, splits and stores like the Linen model that it wraps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import levit_flax as lf
from configs import TINY, random_variables
from levit_flax import convert

STEPS = 5
# Both run the same operations, but in programs that XLA may fuse differently.
SAME_OPERATIONS = 1e-12  # float64, relative to the largest entry
PARAMETERS_LIMIT = 1e-8  # float64, after five steps; AdamW divides a gradient by its own size

ONE_HEAD, TWO_HEADS = lf.LevitForImageClassification, lf.LevitForImageClassificationWithTeacher


def make(model_class=ONE_HEAD, dtype=jnp.float32, folded=False, **changes):
    config = lf.LevitConfig(**{**TINY, "image_size": 32, **changes})
    model = model_class(config, folded=folded, param_dtype=dtype, precision="highest")
    generator = np.random.default_rng(1)
    pixel_values = generator.standard_normal((4, 32, 32, 3)).astype(jnp.dtype(dtype))
    return model, jax.device_put(random_variables(model)), jnp.asarray(pixel_values), jnp.array([0, 1, 2, 4])


def equal(one, other):
    """Return whether two trees have the same structure and bits."""
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(np.array_equal, one, other)
    )


def assert_close(found, wanted, limit):
    found, wanted = flatten_dict(found, sep="/"), flatten_dict(wanted, sep="/")
    assert found.keys() == wanted.keys()
    largest = max(float(abs(leaf).max()) for leaf in wanted.values())
    for path, leaf in wanted.items():
        assert float(abs(found[path] - leaf).max()) <= limit * largest, path


@nnx.jit
def classify(module, pixel_values):
    return module(pixel_values).logits


def count_batches(module):
    return int(module.head["norm"]["count"][...])


def test_training_in_float64_equals_training_the_linen_model():
    optimizer = optax.adamw(1e-2)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model, variables, pixel_values, labels = make(dtype=jnp.float64, depths=(1, 0), drop_path_rate=0.3)
        module = lf.to_nnx(model, variables, rngs=nnx.Rngs(drop_path=7))
        keys = nnx.Rngs(drop_path=7)["drop_path"].fork()

        @jax.jit
        def step(variables, opt_state, key):
            def loss(params):
                given, rngs = {**variables, "params": params}, {"drop_path": key}
                output, updates = model.apply(
                    given, pixel_values, labels, train=True, rngs=rngs, mutable=["batch_stats"]
                )
                return output.loss, (output.logits, updates)

            (_, (logits, updates)), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            changes, opt_state = optimizer.update(gradients, opt_state, variables["params"])
            params = optax.apply_updates(variables["params"], changes)
            return {"params": params, **updates}, opt_state, logits, gradients

        @nnx.jit
        def nnx_step(module, optimizer):
            def loss(module):
                output = module(pixel_values, labels=labels)
                return output.loss, output.logits

            (_, logits), gradients = nnx.value_and_grad(loss, has_aux=True)(module)
            optimizer.update(module, gradients)
            return logits, gradients

        module.train()
        nnx_optimizer = nnx.Optimizer(module, optimizer, wrt=nnx.Param)
        opt_state = optimizer.init(variables["params"])
        seen = []
        for _ in range(STEPS):
            variables, opt_state, logits, gradients = step(variables, opt_state, keys())
            found_logits, found_gradients = nnx_step(module, nnx_optimizer)
            if not seen:  # later steps start from parameters that already differ by rounding
                assert_close({"logits": found_logits}, {"logits": logits}, SAME_OPERATIONS)
                assert_close(nnx.to_pure_dict(found_gradients), gradients, SAME_OPERATIONS)
                assert_close(lf.from_nnx(module)[1]["batch_stats"], variables["batch_stats"], SAME_OPERATIONS)
            seen.append(logits)
        assert float(abs(seen[-1] - seen[0]).max()) > 1e-3  # the steps change the model
        found_model, found = lf.from_nnx(module)
        assert found_model is model
        assert_close(found["params"], variables["params"], PARAMETERS_LIMIT)
        assert_close(found["batch_stats"], variables["batch_stats"], PARAMETERS_LIMIT)
        module.eval()
        wanted = jax.jit(model.apply)(variables, pixel_values).logits
        assert_close({"logits": classify(module, pixel_values)}, {"logits": wanted}, PARAMETERS_LIMIT)


@pytest.mark.parametrize("folded", [False, True])
def test_evaluation_returns_the_output_of_the_linen_model_and_changes_nothing(folded):
    model, variables, pixel_values, _ = make(TWO_HEADS, folded=folded, drop_path_rate=0.3)
    module = lf.to_nnx(model, variables)
    options = {"output_features": True}
    found = nnx.jit(lambda module, x: module(x, **options))(module, pixel_values)
    wanted = jax.jit(lambda variables, x: model.apply(variables, x, **options))(variables, pixel_values)
    assert equal(found, wanted)
    assert equal(lf.from_nnx(module)[1], variables)
    assert int(module.rngs.count[...]) == 0


@pytest.mark.parametrize("graph", [True, False])
def test_training_mode_updates_statistics_in_place(graph):
    model, variables, pixel_values, _ = make()
    module = lf.to_nnx(model, variables)
    counter, before = module.head["norm"]["count"], count_batches(module)
    module.train()
    nnx.jit(lambda module, x: module(x).logits, graph=graph)(module, pixel_values)
    assert count_batches(module) == before + 1
    assert module.head["norm"]["count"] is counter and counter[...].dtype == jnp.int32
    module.eval()
    classify(module, pixel_values)
    assert count_batches(module) == before + 1


def test_each_training_call_draws_another_drop_path_key():
    model, variables, pixel_values, _ = make(drop_path_rate=0.5)
    module = lf.to_nnx(model, variables)
    module.train()
    first, second = classify(module, pixel_values), classify(module, pixel_values)
    assert not np.array_equal(first, second)
    again = lf.to_nnx(model, variables)
    again.train()
    assert np.array_equal(first, classify(again, pixel_values))


def test_module_without_stochastic_depth_draws_no_keys():
    model, variables, pixel_values, _ = make()
    module = lf.to_nnx(model, variables)
    module.train()
    classify(module, pixel_values)
    assert int(module.rngs.count[...]) == 0


def test_view_selects_the_mode_and_shares_the_variables():
    model, variables, pixel_values, _ = make()
    module = lf.to_nnx(model, variables)
    training = nnx.view(module, deterministic=False)
    before = count_batches(module)
    classify(training, pixel_values)
    assert module.deterministic and not training.deterministic
    assert count_batches(module) == before + 1


def test_part_of_another_module_follows_its_mode():
    class Detector(nnx.Module):
        def __init__(self, backbone):
            self.backbone = backbone

    model, variables, _, _ = make(lf.LevitModel)
    detector = Detector(lf.to_nnx(model, variables))
    detector.train()
    assert not detector.backbone.deterministic
    assert equal(lf.from_nnx(detector.backbone)[1], variables)


def test_split_and_merge_keep_the_module():
    model, variables, pixel_values, _ = make()
    module = lf.to_nnx(model, variables)
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)
    assert set(flatten_dict(nnx.to_pure_dict(parameters))) == set(flatten_dict(variables["params"]))
    merged = nnx.merge(graph, parameters, rest)
    assert np.array_equal(classify(merged, pixel_values), classify(module, pixel_values))


def test_trained_module_can_be_folded_saved_and_converted(tmp_path):
    model, variables, pixel_values, _ = make()
    module = lf.to_nnx(model, variables)
    module.train()
    classify(module, pixel_values)
    module.eval()
    wanted = classify(module, pixel_values)
    model, variables = lf.from_nnx(module)
    lf.save_pretrained(tmp_path / "levit", model, variables)
    back = lf.to_nnx(*lf.from_pretrained(tmp_path / "levit"))
    np.testing.assert_allclose(classify(back, pixel_values), wanted, rtol=1e-4, atol=1e-5)
    exported = convert.to_torch(model, variables)
    assert exported["classifier.batch_norm.num_batches_tracked"] == count_batches(module)
    folded = lf.to_nnx(*lf.fold_batch_norm(model, variables))
    np.testing.assert_allclose(classify(folded, pixel_values), wanted, rtol=1e-4, atol=1e-5)
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))


def test_orbax_restores_a_module_from_its_abstract_state(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    model, variables, _, _ = make(drop_path_rate=0.3)
    module = lf.to_nnx(model, variables, rngs=nnx.Rngs(drop_path=5))
    module.rngs()
    abstract = nnx.eval_shape(lambda: lf.to_nnx(model, variables))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(module))
        checkpointer.wait_until_finished()
        nnx.update(abstract, checkpointer.restore(tmp_path / "state", nnx.state(abstract)))
    assert equal(lf.from_nnx(abstract)[1], variables)
    assert jnp.array_equal(abstract.rngs(), module.rngs())


def test_variables_of_another_model_raise():
    model, variables, _, _ = make()
    with pytest.raises(ValueError, match=r"does not fit LevitForImageClassificationWithTeacher.*params/head_dist"):
        lf.to_nnx(TWO_HEADS(model.config), variables)


def test_module_of_another_kind_raises():
    model, _, _, _ = make()
    bridged = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"expected a module made by to_nnx, found ToNNX"):
        lf.from_nnx(bridged)


def test_folded_module_in_training_mode_raises():
    model, variables, pixel_values, _ = make(folded=True)
    module = lf.to_nnx(model, variables)
    module.train()
    with pytest.raises(ValueError, match="A folded model cannot be trained"):
        classify(module, pixel_values)
