"""Folding batch norms, merging heads, and changing the image size or the classes."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import levit_flax as lf
from configs import TINY, compiled, random_variables, unusual_config
from levit_flax.attention import _offset_index
from levit_flax.modeling import _MODEL_CLASSES
from levit_flax.modeling_variables import _abstract_variables

PROGRAMS = Path(__file__).parent / "programs"
FLOAT32_LIMIT = 1e-5  # of the largest logit
FLOAT64_LIMIT = 1e-10
SAME_RESULT = 1e-6  # of the largest entry: two orders of rounding to float32


@contextlib.contextmanager
def precision_of(dtype):
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def make(name, model_class=lf.LevitForImageClassificationWithTeacher, dtype="float32"):
    config = lf.LevitConfig(**TINY) if name == "tiny" else unusual_config(name)
    model = model_class(config, precision="highest", param_dtype=jnp.dtype(dtype))
    return model, random_variables(model)


def pixels(model, batch=3):
    shape = (batch, *model.config.image_height_width, model.config.num_channels)
    return np.random.default_rng(5).standard_normal(shape).astype(model.param_dtype)


def logits(model, variables):
    return np.asarray(compiled(model, return_dict=False)(variables, pixels(model))[0])


def difference(result, reference):
    return np.abs(result - reference).max() / np.abs(reference).max()


BOTH_PRECISIONS = pytest.mark.parametrize(
    ("dtype", "limit"),
    [pytest.param("float32", FLOAT32_LIMIT, marks=pytest.mark.slow), ("float64", FLOAT64_LIMIT)],
)


@BOTH_PRECISIONS
@pytest.mark.parametrize(
    "model_class",
    [
        pytest.param(model_class, marks=() if len(model_class.head_names) == 2 else pytest.mark.slow)
        for model_class in _MODEL_CLASSES
    ],
)
@pytest.mark.parametrize("name", ["tiny", pytest.param("odd grids", marks=pytest.mark.slow)])
def test_folding_keeps_the_outputs(model_class, dtype, limit, name):
    with precision_of(dtype):
        model, variables = make(name, model_class, dtype)
        folded, folded_variables = lf.fold_batch_norm(model, variables)
        assert difference(logits(folded, folded_variables), logits(model, variables)) < limit
        expected = _abstract_variables(folded)
    assert folded.folded and folded.config == model.config and list(folded_variables) == ["params"]
    flat = flatten_dict(folded_variables, sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == {path: leaf.shape for path, leaf in expected.items()}
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("odd grids", marks=pytest.mark.slow),
        pytest.param("stage without MLP", marks=pytest.mark.slow),
        pytest.param("other downsampling", marks=pytest.mark.slow),
        pytest.param("one channel", marks=pytest.mark.slow),
        "two stages",
    ],
)
def test_folding_and_merging_keep_the_logits_of_unusual_models(name):
    model, variables = make(name)
    result = lf.fold_batch_norm(*lf.merge_heads(model, variables))
    assert difference(logits(*result), logits(model, variables)) < FLOAT32_LIMIT


@BOTH_PRECISIONS
@pytest.mark.parametrize("folded", [False, True])
def test_merged_head_returns_the_average_of_both(folded, dtype, limit):
    with precision_of(dtype):
        model, variables = make("tiny", dtype=dtype)
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


def test_merged_model_trains_as_the_average_of_both_heads():
    """Its logits on batch statistics are the average, and its running statistics are updated like the first head's."""
    model, variables = make("tiny")
    # As in a trained model: both heads see the same vectors, so their statistics agree except for rounding.
    variables["batch_stats"]["head_dist"] = variables["batch_stats"]["head"]
    merged, merged_variables = lf.merge_heads(model, variables)

    def train(model, variables):
        return compiled(model, train=True, mutable=("batch_stats",))(variables, pixels(model, batch=8))

    wanted, wanted_updates = train(model, variables)
    out, updates = train(merged, merged_variables)
    assert difference(np.asarray(out.logits), np.asarray(wanted.logits)) < FLOAT32_LIMIT
    for name, leaf in wanted_updates["batch_stats"]["head"]["norm"].items():
        np.testing.assert_array_equal(updates["batch_stats"]["head"]["norm"][name], leaf)


def test_folding_and_merging_commute():
    model, variables = make("other ratios")
    one = lf.merge_heads(*lf.fold_batch_norm(model, variables))
    other = lf.fold_batch_norm(*lf.merge_heads(model, variables))
    assert one[0] == other[0]
    flat, other_flat = (flatten_dict(tree, sep="/") for tree in (one[1], other[1]))
    assert flat.keys() == other_flat.keys()
    for path, leaf in flat.items():
        assert difference(leaf, other_flat[path]) < SAME_RESULT, path


def test_operations_keep_their_arguments_and_the_types():
    model, variables = make("tiny", dtype="float16")
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


def test_folding_or_merging_twice_raises():
    model, variables = make("tiny")
    folded = lf.fold_batch_norm(model, variables)
    with pytest.raises(ValueError, match="already folded: expected a model with folded=False"):
        lf.fold_batch_norm(*folded)
    merged = lf.merge_heads(model, variables)
    with pytest.raises(ValueError, match=r"does not have two heads to merge: .* found a LevitForImageClassification"):
        lf.merge_heads(*merged)
    with pytest.raises(ValueError, match="A folded model cannot be trained"):
        folded[0].apply(folded[1], pixels(model), train=True)


def test_folded_and_merged_models_are_saved_and_loaded(tmp_path):
    model, variables = lf.fold_batch_norm(*lf.merge_heads(*make("tiny")))
    lf.save_pretrained(tmp_path / "model", model, variables)
    loaded, loaded_variables = lf.from_pretrained(tmp_path / "model")
    assert loaded.folded and type(loaded) is lf.LevitForImageClassification
    jax.tree.map(np.testing.assert_array_equal, loaded_variables, variables)
    classifier = lf.ImageClassifier.from_pretrained(tmp_path / "model")
    assert len(classifier(np.zeros((64, 64, 3), np.uint8))) == 5


# Other image sizes.


def hermite(values, place):
    """Interpolate values at 0, 1, 2, ..., extended as an even function below 0 and as a constant past the end."""
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
    """Return the bias [H] between two tokens (y, x) of the new grid, interpolated in the old table."""
    dy, dx = abs(query[0] - key[0]), abs(query[1] - key[1])
    old = [[table[y * grid[1] + x] for x in range(grid[1])] for y in range(grid[0])]
    column = [hermite(row, dx * grid[1] / new_grid[1]) for row in old]
    return hermite(column, dy * grid[0] / new_grid[0])


@pytest.mark.parametrize("image_size", [96, 48, (64, 112), (80, 50), pytest.param(200, marks=pytest.mark.slow), 17])
def test_resized_biases_interpolate_the_old_distances(image_size):
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
        index = _offset_index(new_grid, stride)
        keys = [(y, x) for y in range(new_grid[0]) for x in range(new_grid[1])]
        queries = [(y, x) for y, x in keys if y % stride == 0 and x % stride == 0]
        for _ in range(30):
            q, k = generator.integers(len(queries)), generator.integers(len(keys))
            wanted = bias_between(table.astype(np.float64), grid, new_grid, queries[q], keys[k])
            np.testing.assert_allclose(new_table[index[q, k]], wanted, rtol=1e-6, atol=1e-6)
    assert logits(resized, resized_variables).shape == (3, 5)


def test_resizing_to_the_same_size_changes_nothing():
    for folded in (False, True):
        model, variables = make("odd grids")
        if folded:
            model, variables = lf.fold_batch_norm(model, variables)
        same, same_variables = lf.resize_image(model, variables, 80)
        assert same == model
        jax.tree.map(np.testing.assert_array_equal, same_variables, variables)
    # The stem rounds up, so 72 pixels are five tokens too.
    jax.tree.map(np.testing.assert_array_equal, lf.resize_image(model, variables, 72)[1], variables)


def test_quadratic_bias_is_resized_exactly():
    """A quadratic function of the distance is reproduced up to rounding, except past the end of the old grid."""
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


def test_resizing_to_zero_pixels_raises():
    with pytest.raises(ValueError, match="image_size must be an integer from 1 to 4096, found 0"):
        lf.resize_image(*make("tiny"), 0)


# Other classes.


@pytest.mark.parametrize("model_class", _MODEL_CLASSES[1:])
def test_replaced_heads_are_newly_initialized(model_class):
    model, variables = make("small", model_class)
    renewed, renewed_variables = lf.replace_head(model, variables, num_labels=9, key=jax.random.key(0))
    assert renewed.config.num_labels == 9 and renewed.config.id2label[8] == "LABEL_8"
    expected = _abstract_variables(renewed)
    flat, before = (flatten_dict(tree, sep="/") for tree in (renewed_variables, variables))
    assert {path: leaf.shape for path, leaf in flat.items()} == {path: leaf.shape for path, leaf in expected.items()}
    for path, leaf in flat.items():
        if path.split("/")[1] not in model.head_names:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    head = renewed_variables["params"]["head"]
    assert 0.01 < np.std(head["linear"]["kernel"]) < 0.03 and not head["linear"]["bias"].any()
    assert (head["norm"]["scale"] == 1).all() and renewed_variables["batch_stats"]["head"]["norm"]["count"] == 0
    if len(model.head_names) == 2:
        assert (head["linear"]["kernel"] != renewed_variables["params"]["head_dist"]["linear"]["kernel"]).any()


def test_replacing_the_head_of_an_unsuitable_model_raises():
    model, variables = make("tiny")
    with pytest.raises(ValueError, match="num_labels must be an integer from 0 to 1000000, found -1"):
        lf.replace_head(model, variables, num_labels=-1)
    with pytest.raises(ValueError, match="found a folded LevitForImageClassificationWithTeacher"):
        lf.replace_head(*lf.fold_batch_norm(model, variables), num_labels=3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="found a LevitModel"):
        lf.replace_head(*make("tiny", lf.LevitModel), num_labels=3, key=jax.random.key(0))


@pytest.mark.parametrize("model_class", _MODEL_CLASSES[1:])
def test_replacing_heads_by_none_leaves_the_pooled_features(model_class):
    model, variables = make("tiny", model_class)
    headless, rest = lf.replace_head(model, variables, num_labels=0)
    pixels = np.ones((1, 32, 48, 3), np.float32)
    backbone = lf.LevitModel(model.config)
    pooled = compiled(backbone)(rest, pixels).pooler_output
    np.testing.assert_allclose(compiled(headless)(rest, pixels).logits, pooled, rtol=1e-6)


def test_heads_are_replaced_without_a_key():
    model, variables = make("tiny")
    _, default = lf.replace_head(model, variables, 3)
    _, keyed = lf.replace_head(model, variables, 3, jax.random.key(0))
    np.testing.assert_array_equal(
        default["params"]["head"]["linear"]["kernel"], keyed["params"]["head"]["linear"]["kernel"]
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_changed_channels_equal_those_of_timm(channels):
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    model, variables = make("tiny")
    changed, new = lf.change_channels(model, variables, channels)
    kernel = variables["params"]["stem"]["conv_0"]["conv"]["kernel"]
    expected = timm.models.adapt_input_conv(channels, torch.from_numpy(np.array(kernel).transpose(3, 2, 0, 1)))
    found = new["params"]["stem"]["conv_0"]["conv"]["kernel"]
    np.testing.assert_allclose(found, expected.numpy().transpose(2, 3, 1, 0), rtol=1e-6, atol=1e-7)
    assert changed.config.num_channels == channels
    assert compiled(changed)(new, np.ones((1, 32, 48, channels), np.float32)).logits.shape == (1, 5)


def test_grey_model_computes_what_the_color_model_does_for_grey_images():
    model, variables = make("tiny")
    grey, new = lf.change_channels(model, variables, 1)
    pixels = np.random.default_rng(0).standard_normal((1, 32, 48, 1)).astype(np.float32)
    found, expected = compiled(grey)(new, pixels).logits, compiled(model)(variables, pixels.repeat(3, 3)).logits
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_changing_to_no_channels_raises():
    with pytest.raises(ValueError, match="num_channels must be an integer from 1 to 1024, found 0"):
        lf.change_channels(*make("tiny"), 0)


def test_surgery_keeps_or_derives_shardings():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, PROGRAMS / "sharded_surgery.py"], env=environment, check=True)
