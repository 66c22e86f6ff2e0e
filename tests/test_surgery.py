"""Folding batch norms and merging heads: the same logits, from fewer arrays."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import levit_flax as lf
from configs import SMALL, random_variables, unusual_config
from levit_flax.modeling import MODEL_CLASSES, abstract_variables

FLOAT32_LIMIT = 1e-5  # of the largest logit
FLOAT64_LIMIT = 1e-10
SAME_RESULT = 1e-6  # of the largest entry: two orders of rounding to float32

# Parameters with one head, fused. Source: counted on the original code after `replace_batchnorm`.
FUSED_PARAMETERS = {
    "levit-128S": 7_371_466,
    "levit-128": 8_803_864,
    "levit-192": 10_533_613,
    "levit-256": 18_343_276,
    "levit-384": 38_305_100,
}


@contextlib.contextmanager
def precision_of(dtype):
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def make(name, model_class=lf.LevitForImageClassificationWithTeacher, dtype="float32"):
    model = model_class(unusual_config(name), precision="highest", param_dtype=jnp.dtype(dtype))
    return model, random_variables(model)


def logits(model, variables):
    shape = (3, *model.config.image_height_width, model.config.num_channels)
    pixel_values = np.random.default_rng(5).standard_normal(shape).astype(model.param_dtype)
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, return_dict=False)[0])(variables, pixel_values))


def difference(result, reference):
    return np.abs(result - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", FLOAT32_LIMIT), ("float64", FLOAT64_LIMIT)])
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_folding_changes_nothing(model_class, dtype, limit):
    with precision_of(dtype):
        model, variables = make("odd grids", model_class, dtype)
        folded, folded_variables = lf.fold_batch_norm(model, variables)
        assert difference(logits(folded, folded_variables), logits(model, variables)) < limit
        expected = abstract_variables(folded)
    assert folded.folded and folded.config == model.config and list(folded_variables) == ["params"]
    flat = flatten_dict(folded_variables, sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == {path: leaf.shape for path, leaf in expected.items()}
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", ["one channel", "two stages", "stage without MLP", "other downsampling"])
def test_unusual_models_fold_and_merge(name):
    model, variables = make(name)
    result = lf.fold_batch_norm(*lf.merge_heads(model, variables))
    assert difference(logits(*result), logits(model, variables)) < FLOAT32_LIMIT


@pytest.mark.parametrize(("dtype", "limit"), [("float32", FLOAT32_LIMIT), ("float64", FLOAT64_LIMIT)])
@pytest.mark.parametrize("folded", [False, True])
def test_merging_gives_the_average(folded, dtype, limit):
    with precision_of(dtype):
        model, variables = make("odd grids", dtype=dtype)
        if folded:
            model, variables = lf.fold_batch_norm(model, variables)
        merged, merged_variables = lf.merge_heads(model, variables)
        assert difference(logits(merged, merged_variables), logits(model, variables)) < limit
    assert type(merged) is lf.LevitForImageClassification and merged.folded is folded
    assert (merged.config, merged.precision, merged.param_dtype) == (model.config, "highest", np.dtype(dtype))
    if not folded:
        norm = merged_variables["params"]["head"]["norm"]
        assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
        for name, leaf in variables["batch_stats"]["head"]["norm"].items():
            np.testing.assert_array_equal(merged_variables["batch_stats"]["head"]["norm"][name], leaf)


def test_a_merged_model_goes_on_training_as_the_average():
    """On batch statistics too its logits are the average, and its running statistics move like the first head's."""
    model, variables = make("small")
    # As in life: both heads see the same vectors, so that their statistics agree but for rounding.
    variables["batch_stats"]["head_dist"] = variables["batch_stats"]["head"]
    merged, merged_variables = lf.merge_heads(model, variables)
    pixel_values = np.random.default_rng(6).standard_normal((8, 64, 64, 3), np.float32)

    def train(model, variables):
        return jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, pixel_values)

    wanted, wanted_updates = train(model, variables)
    out, updates = train(merged, merged_variables)
    assert difference(np.asarray(out.logits), np.asarray(wanted.logits)) < FLOAT32_LIMIT
    for name, leaf in wanted_updates["batch_stats"]["head"]["norm"].items():
        np.testing.assert_array_equal(updates["batch_stats"]["head"]["norm"][name], leaf)


def test_either_order_gives_the_same():
    model, variables = make("other ratios")
    one = lf.merge_heads(*lf.fold_batch_norm(model, variables))
    other = lf.fold_batch_norm(*lf.merge_heads(model, variables))
    assert one[0] == other[0]
    flat, other_flat = (flatten_dict(tree, sep="/") for tree in (one[1], other[1]))
    assert flat.keys() == other_flat.keys()
    for path, leaf in flat.items():
        assert difference(leaf, other_flat[path]) < SAME_RESULT, path


@pytest.mark.parametrize("name", lf.VARIANTS)
def test_parameters_of_the_published_variants(name):
    model = lf.LevitForImageClassification(lf.VARIANTS[name], folded=True)
    assert sum(leaf.size for leaf in abstract_variables(model).values()) == FUSED_PARAMETERS[name]


def test_nothing_is_changed_in_place_and_types_are_kept():
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL), param_dtype=jnp.float16)
    variables = random_variables(model)
    before = jax.tree.map(np.copy, variables)
    on_device = jax.device_put(variables)
    for operate in (lf.fold_batch_norm, lf.merge_heads):
        result = operate(model, variables)[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} <= {np.dtype(np.float16), np.dtype(np.int32)}
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(result))
        moved = operate(model, on_device)[1]
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(moved))
        jax.tree.map(np.testing.assert_array_equal, moved, result)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_what_cannot_be_done_is_said():
    model, variables = make("small")
    folded = lf.fold_batch_norm(model, variables)
    with pytest.raises(ValueError, match="batch norms are folded already: expected a model with folded=False"):
        lf.fold_batch_norm(*folded)
    merged = lf.merge_heads(model, variables)
    with pytest.raises(ValueError, match=r"no two heads to merge: .* found a LevitForImageClassification"):
        lf.merge_heads(*merged)
    with pytest.raises(ValueError, match="no batch norm left to train"):
        folded[0].apply(folded[1], np.zeros((2, 64, 64, 3), np.float32), train=True)


def test_folded_and_merged_models_are_saved_and_loaded(tmp_path):
    model, variables = lf.fold_batch_norm(*lf.merge_heads(*make("small")))
    lf.save_pretrained(tmp_path / "model", model, variables)
    loaded, loaded_variables = lf.from_pretrained(tmp_path / "model")
    assert loaded.folded and type(loaded) is lf.LevitForImageClassification
    jax.tree.map(np.testing.assert_array_equal, loaded_variables, variables)
    classifier = lf.ImageClassifier.from_pretrained(tmp_path / "model")
    assert len(classifier(np.zeros((64, 64, 3), np.uint8))[0]) == 5
