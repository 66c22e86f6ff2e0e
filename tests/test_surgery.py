"""Folding batch norms and merging heads: the same logits, from fewer arrays."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import levit_flax as lf
from configs import SMALL, random_variables, unusual_config
from levit_flax.attention import offset_index
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
    with pytest.raises(ValueError, match="already folded: expected a model with folded=False"):
        lf.fold_batch_norm(*folded)
    merged = lf.merge_heads(model, variables)
    with pytest.raises(ValueError, match=r"does not have two heads to merge: .* found a LevitForImageClassification"):
        lf.merge_heads(*merged)
    with pytest.raises(ValueError, match="A folded model cannot be trained"):
        folded[0].apply(folded[1], np.zeros((2, 64, 64, 3), np.float32), train=True)


def test_folded_and_merged_models_are_saved_and_loaded(tmp_path):
    model, variables = lf.fold_batch_norm(*lf.merge_heads(*make("small")))
    lf.save_pretrained(tmp_path / "model", model, variables)
    loaded, loaded_variables = lf.from_pretrained(tmp_path / "model")
    assert loaded.folded and type(loaded) is lf.LevitForImageClassification
    jax.tree.map(np.testing.assert_array_equal, loaded_variables, variables)
    classifier = lf.ImageClassifier.from_pretrained(tmp_path / "model")
    assert len(classifier(np.zeros((64, 64, 3), np.uint8))[0]) == 5


# Other image sizes.


def hermite(values, place):
    """Read a curve through values at 0, 1, 2, ... that goes on evenly below 0 and is held at the end."""
    last = len(values) - 1
    place = min(place, last)
    left = min(int(place), last - 1) if last else 0

    def at(i):
        return values[min(abs(i), last)]

    t = place - left
    slopes = (at(left + 1) - at(left - 1)) / 2, (at(left + 2) - at(left)) / 2
    return (
        (2 * t**3 - 3 * t**2 + 1) * at(left)
        + (t**3 - 2 * t**2 + t) * slopes[0]
        + (3 * t**2 - 2 * t**3) * at(left + 1)
        + (t**3 - t**2) * slopes[1]
    )


def bias_between(table, grid, new_grid, query, key):
    """Return the bias [H] between two tokens of the new grid, each (y, x), by walking the old table by hand."""
    dy, dx = abs(query[0] - key[0]), abs(query[1] - key[1])
    old = [[table[y * grid[1] + x] for x in range(grid[1])] for y in range(grid[0])]
    column = [hermite(row, dx * grid[1] / new_grid[1]) for row in old]
    return hermite(column, dy * grid[0] / new_grid[0])


@pytest.mark.parametrize("image_size", [96, 48, (64, 112), (80, 50), 200, 17])
def test_resized_biases_are_those_of_the_geometry(image_size):
    model, variables = make("small", dtype="float32")
    resized, resized_variables = lf.resize_image(model, variables, image_size)
    assert resized.config.image_height_width == (image_size if isinstance(image_size, tuple) else (image_size,) * 2)
    places = {"stage_0/block_1": (0, 1), "stage_1/block_0": (1, 1), "downsample_0": (0, 2), "downsample_1": (1, 2)}
    generator = np.random.default_rng(3)
    for path, (stage, stride) in places.items():
        grid, new_grid = model.config.grids[stage], resized.config.grids[stage]
        table, new_table = (
            flatten_dict(tree, sep="/")[f"params/{path}/attention/attention_biases"]
            for tree in (variables, resized_variables)
        )
        assert new_table.shape == (new_grid[0] * new_grid[1], table.shape[1])
        index = offset_index(new_grid, stride)
        keys = [(y, x) for y in range(new_grid[0]) for x in range(new_grid[1])]
        queries = [(y, x) for y, x in keys if y % stride == 0 and x % stride == 0]
        for _ in range(30):
            q, k = generator.integers(len(queries)), generator.integers(len(keys))
            wanted = bias_between(table.astype(np.float64), grid, new_grid, queries[q], keys[k])
            np.testing.assert_allclose(new_table[index[q, k]], wanted, rtol=1e-6, atol=1e-6)
    assert logits(resized, resized_variables).shape == (3, 5)


def test_the_same_size_changes_nothing():
    for folded in (False, True):
        model, variables = make("odd grids")
        if folded:
            model, variables = lf.fold_batch_norm(model, variables)
        same, same_variables = lf.resize_image(model, variables, 80)
        assert same == model
        jax.tree.map(np.testing.assert_array_equal, same_variables, variables)
    # 72 pixels are five tokens too, since the stem rounds up.
    jax.tree.map(np.testing.assert_array_equal, lf.resize_image(model, variables, 72)[1], variables)


def test_a_smooth_bias_stays_that_bias():
    """A bias that is a parabola of the distance, even at zero, is met to rounding wherever it is not held."""
    model, variables = make("small")
    model, variables = lf.resize_image(model, variables, 320)
    flat = flatten_dict(variables, sep="/")
    path = "params/stage_0/block_0/attention/attention_biases"
    distances = np.divmod(np.arange(400), 20)
    flat[path] = ((distances[0] / 20) ** 2 - 0.5 * (distances[1] / 20) ** 2)[:, None].astype(np.float32)
    _, resized = lf.resize_image(model, unflatten_dict(flat, sep="/"), (480, 256))
    found = resized["params"]["stage_0"]["block_0"]["attention"]["attention_biases"].reshape(30, 16)
    wanted = (np.arange(30)[:, None] / 30) ** 2 - 0.5 * (np.arange(16)[None] / 16) ** 2
    np.testing.assert_allclose(found[:27, :14], wanted[:27, :14], atol=1e-6)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="image_size must be an integer of at least 1, found 0"):
        lf.resize_image(*make("small"), 0)


# Other classes.


@pytest.mark.parametrize("model_class", MODEL_CLASSES[1:])
def test_fresh_heads(model_class):
    model, variables = make("small", model_class)
    renewed, renewed_variables = lf.replace_head(model, variables, num_labels=9, key=jax.random.key(0))
    assert renewed.config.num_labels == 9 and renewed.config.id2label[8] == "LABEL_8"
    expected = abstract_variables(renewed)
    flat, before = (flatten_dict(tree, sep="/") for tree in (renewed_variables, variables))
    assert {path: leaf.shape for path, leaf in flat.items()} == {path: leaf.shape for path, leaf in expected.items()}
    for path, leaf in flat.items():
        if path.split("/")[1] not in model.head_names:
            assert leaf is before[path], path
    head = renewed_variables["params"]["head"]
    assert 0.01 < np.std(head["linear"]["kernel"]) < 0.03 and not head["linear"]["bias"].any()
    assert (head["norm"]["scale"] == 1).all() and renewed_variables["batch_stats"]["head"]["norm"]["count"] == 0
    if len(model.head_names) == 2:
        assert (head["linear"]["kernel"] != renewed_variables["params"]["head_dist"]["linear"]["kernel"]).any()


def test_where_no_head_can_be_replaced():
    model, variables = make("small")
    with pytest.raises(ValueError, match="num_labels must be at least 1, found 0"):
        lf.replace_head(model, variables, num_labels=0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="found a folded LevitForImageClassificationWithTeacher"):
        lf.replace_head(*lf.fold_batch_norm(model, variables), num_labels=3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="found a LevitModel"):
        lf.replace_head(*make("small", lf.LevitModel), num_labels=3, key=jax.random.key(0))
