"""Wrong calls of a model raise one sentence that explains them, also inside another module and under `jax.jit`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import levit_flax as lf
from configs import TINY, random_variables

ONE_HEAD, TWO_HEADS = lf.LevitForImageClassification, lf.LevitForImageClassificationWithTeacher
CONFIG = lf.LevitConfig(**TINY, drop_path_rate=0.2)
MODEL = ONE_HEAD(CONFIG)
PIXEL_VALUES = np.zeros((2, 32, 48, 3), np.float32)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL)


def changed(**changes):
    return ONE_HEAD(dataclasses.replace(CONFIG, **changes))


def test_variables_without_the_second_head_raise(variables):
    message = (
        r"^The variables do not fit LevitForImageClassificationWithTeacher: 7 of 119 arrays differ,"
        r" params/head_dist/linear/bias \(expected \(5,\), found nothing\), .* and 4 more\. Use the model and the"
    )
    with pytest.raises(ValueError, match=message):
        TWO_HEADS(CONFIG).apply(variables, PIXEL_VALUES)


def test_variables_of_an_unfolded_model_raise(variables):
    message = r"do not fit .* params/downsample_0/attention/kv/linear/bias \(expected \(40,\), found nothing\)"
    with pytest.raises(ValueError, match=message):
        MODEL.clone(folded=True).apply(variables, PIXEL_VALUES)


def test_variables_of_a_folded_model_raise(variables):
    _, folded = lf.fold_batch_norm(MODEL, variables)
    message = r"have no batch_stats: expected .*params and batch_stats, found params\. .* that fold_batch_norm returned"
    with pytest.raises(ValueError, match=message):
        MODEL.apply(folded, PIXEL_VALUES)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_labels": 7}, r"2 of 112 .* params/head/linear/kernel \(expected \(16, 7\), found \(16, 5\)\)\. Use"),
        ({"hidden_sizes": (8, 24)}, r"params/downsample_0/attention/proj/linear/kernel \(expected"),
        ({"depths": (1, 2)}, r"params/stage_1/block_1/attention/attention_biases \(expected \(2, 2\), found nothing"),
        ({"image_size": 32}, r"3 of 112 .* params/downsample_0/attention/attention_biases"),
    ],
)
def test_variables_of_another_architecture_raise(variables, changes, difference):
    model = changed(**changes)
    pixel_values = np.zeros((2, *model.config.image_height_width, 3), np.float32)
    with pytest.raises(ValueError, match=difference):
        jax.eval_shape(model.apply, variables, pixel_values)


@pytest.mark.parametrize("name", ["params", "batch_stats"])
def test_missing_collection_raises(variables, name):
    given = {collection: tree for collection, tree in variables.items() if collection != name}
    with pytest.raises(ValueError, match=rf"have no {name}: expected the collections params and batch_stats, found"):
        MODEL.apply(given, PIXEL_VALUES)


def test_parameters_instead_of_variables_raise(variables):
    with pytest.raises(ValueError, match=r"have no params and no batch_stats: .* found .*head.*Pass the whole tree"):
        MODEL.apply(variables["params"], PIXEL_VALUES)


def test_error_in_a_backbone_names_the_arrays_of_the_backbone():
    class Detector(nn.Module):
        backbone: lf.LevitModel

        @nn.compact
        def __call__(self, pixel_values):
            return self.backbone(pixel_values, output_features=(0,)).features

    backbone = lf.LevitModel(CONFIG)
    given = {name: {"backbone": tree} for name, tree in random_variables(backbone).items()}
    wider = Detector(backbone.clone(config=dataclasses.replace(CONFIG, key_dim=(8, 8))))
    message = r"^The variables do not fit LevitModel: .* params/stage_0/block_0/attention/proj/linear/kernel \(expected"
    with pytest.raises(ValueError, match=message):
        wider.apply(given, PIXEL_VALUES)


def test_training_without_mutable_statistics_raises(variables):
    with pytest.raises(ValueError, match=r'running statistics: expected mutable=\["batch_stats"\] with train=True'):
        MODEL.apply(variables, PIXEL_VALUES, train=True, rngs={"drop_path": KEY})


@pytest.mark.parametrize("remat", [False, True])
def test_training_without_a_drop_path_key_raises(variables, remat):
    message = r'drop_path_rate=0\.2 draws random numbers: expected a key for "drop_path", found none\. Pass rngs='
    with pytest.raises(ValueError, match=message):
        MODEL.clone(remat=remat).apply(variables, PIXEL_VALUES, train=True, mutable=["batch_stats"])


def test_initialization_without_a_key_for_parameters_keeps_the_error_of_flax():
    with pytest.raises(Exception, match='needs PRNG for "params"'):
        MODEL.init({"drop_path": KEY}, PIXEL_VALUES)


@pytest.mark.parametrize("method", ["apply", "init"])
def test_unknown_argument_raises(variables, method):
    given = variables if method == "apply" else KEY
    message = (
        r"^LevitForImageClassification has no argument training: expected pixel_values, labels, train, .*, found"
        r" training=True\. Pass train=True for training mode\."
    )
    with pytest.raises(TypeError, match=message):
        getattr(MODEL, method)(given, PIXEL_VALUES, training=True)
    with pytest.raises(TypeError, match=r"no argument output_feature: .*Correct or remove it\."):
        getattr(MODEL, method)(given, PIXEL_VALUES, output_feature=True)


@pytest.mark.parametrize("model", [lf.LevitModel(CONFIG), MODEL, TWO_HEADS(CONFIG)])
def test_train_by_position_raises(model):
    given = random_variables(model)
    message = r"takes only pixel_values.* by position: .*, found True\. Pass train=True for training mode"
    with pytest.raises(TypeError, match=message):
        model.apply(given, PIXEL_VALUES, True)
    with pytest.raises(TypeError, match=message):
        model.apply(given, PIXEL_VALUES, None, True)


def test_counter_that_an_average_turned_to_float_is_not_saved(variables, tmp_path):
    average = jax.tree.map(lambda leaf: leaf * 0.9, variables)
    message = r"count \(expected integer \(\), found float64 \(\)\).* average only floating-point arrays\.$"
    with pytest.raises(ValueError, match=message):
        lf.save_pretrained(tmp_path / "model", MODEL, average)
    assert not (tmp_path / "model").exists()


def test_other_errors_pass_unchanged(variables):
    with pytest.raises(ValueError, match="pixel_values has the wrong image size"):
        MODEL.apply(variables, jnp.zeros((2, 32, 32, 3)))
