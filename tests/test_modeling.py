"""The models: parameter counts, outputs, training mode and the errors for wrong calls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import levit_flax as lf
from configs import SMALL, TINY, UNUSUAL, compiled, random_variables, unusual_config
from levit_flax.attention import _offset_index
from levit_flax.modeling import _MODEL_CLASSES, classification_loss
from levit_flax.modeling_variables import _abstract_variables

# Counted on the reference implementations: parameters with two heads and with one, the same two folded, and the entries
# of all running means and variances.
SIZES = {
    "levit-128S": (7_777_058, 7_391_290, 7_756_466, 7_371_466, 39_648),
    "levit-128": (9_213_936, 8_828_168, 9_188_864, 8_803_864, 48_608),
    "levit-192": (10_947_069, 10_561_301, 10_918_613, 10_533_613, 55_376),
    "levit-256": (18_893_876, 18_379_852, 18_856_276, 18_343_276, 73_152),
    "levit-384": (39_128_836, 38_358_300, 39_074_100, 38_305_100, 106_400),
}

THREE_STAGES = {**SMALL, "mlp_ratio": (2, 2, 2), "attention_ratio": (2, 2, 2)}

ONE_HEAD, TWO_HEADS = lf.LevitForImageClassification, lf.LevitForImageClassificationWithTeacher


def make(model_class=ONE_HEAD, batch=2, seed=0, **fields):
    config = lf.LevitConfig(**{**TINY, **fields})
    model = model_class(config, precision="highest")
    shape = (batch, *config.image_height_width, config.num_channels)
    pixel_values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return model, jax.device_put(random_variables(model, seed)), jnp.asarray(pixel_values)


def count(model, collection):
    leaves = {path: leaf for path, leaf in _abstract_variables(model).items() if path.startswith(collection)}
    return sum(leaf.size for path, leaf in leaves.items() if not path.endswith("count"))


def test_every_variant_has_its_sizes_listed():
    assert set(SIZES) == set(lf.VARIANTS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("levit-128S", "levit-384") else pytest.mark.slow) for name in SIZES],
)
def test_variant_has_the_parameter_counts_of_the_reference(name):
    config = lf.VARIANTS[name]
    two, one, two_folded, one_folded, statistics = SIZES[name]
    assert count(TWO_HEADS(config), "params") == two
    assert count(ONE_HEAD(config), "params") == one
    assert count(TWO_HEADS(config, folded=True), "params") == two_folded
    assert count(ONE_HEAD(config, folded=True), "params") == one_folded
    assert count(TWO_HEADS(config), "batch_stats") == statistics


@pytest.mark.parametrize("depths", [(1, 1, 1), pytest.param((2, 3, 4), marks=pytest.mark.slow, id="levit-128S")])
def test_initialization_follows_the_original_code(depths):
    config = dataclasses.replace(lf.VARIANTS["levit-128S"], depths=depths)
    variables = jax.jit(TWO_HEADS(config).init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    params = {path: np.asarray(leaf) for path, leaf in flatten_dict(variables["params"], sep="/").items()}
    zeros = [path for path, leaf in params.items() if path.endswith("norm/scale") and not leaf.any()]
    assert len(zeros) == 2 * sum(depths) + 2  # two per block and one per downsampling
    assert all(path.endswith(("attention/proj/norm/scale", "mlp/down/norm/scale")) for path in zeros)
    assert not any(path.startswith("downsample") and "attention" in path for path in zeros)
    kernel = params["stage_0/block_0/attention/qkv/linear/kernel"]
    assert abs(kernel).max() <= 128**-0.5
    assert kernel.std() == pytest.approx(0.0510, rel=0.02)  # of U(-1, 1) / sqrt(128)
    conv = params["stem/conv_1/conv/kernel"]
    assert abs(conv).max() <= (9 * 16) ** -0.5
    head = params["head/linear/kernel"]
    assert head.std() == pytest.approx(0.02, rel=0.02)
    assert abs(head).max() > 0.06  # not cut at two standard deviations
    assert not params["stage_1/block_0/attention/attention_biases"].any()


def test_parameter_tree_follows_the_architecture():
    paths = _abstract_variables(TWO_HEADS(lf.LevitConfig(**SMALL)))
    top = {path.split("/")[1] for path in paths}
    stages = {f"stage_{i}" for i in range(3)}
    assert top == {"stem", "downsample_0", "downsample_1", "head", "head_dist", *stages}
    assert "params/stage_0/block_1/mlp/up/linear/kernel" in paths
    assert paths["params/stage_0/block_0/attention/attention_biases"].shape == (16, 1)


@pytest.mark.parametrize("side", range(1, 29))
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_offset_index_equals_first_seen_enumeration(side, stride):
    """The original code numbers the offsets in the order in which it first sees them."""
    points = [(y, x) for y in range(side) for x in range(side)]
    seen = {}
    if side > 14:
        points = points[: 3 * side]  # the other rows repeat these
    expected = [
        [
            seen.setdefault((abs(qy - ky), abs(qx - kx)), len(seen))
            for ky, kx in ((y, x) for y in range(side) for x in range(side))
        ]
        for qy, qx in points
        if qy % stride == 0 and qx % stride == 0
    ]
    np.testing.assert_array_equal(_offset_index((side, side), stride)[: len(expected)], expected)


def test_offset_index_of_a_wide_grid():
    index = _offset_index((2, 3))
    np.testing.assert_array_equal(index[0], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(index[4], [4, 3, 4, 1, 0, 1])
    assert _offset_index((5, 8), 2).shape == (12, 40)
    with pytest.raises(ValueError, match="read-only"):
        index[0, 0] = 1


def test_outputs_have_transformers_names_and_order():
    model, variables, pixel_values = make(TWO_HEADS, **THREE_STAGES)

    @jax.jit
    def both(variables, pixel_values):
        everything = model.apply(
            variables, pixel_values, output_hidden_states=True, output_attentions=True, output_features=True
        )
        return everything, model.apply(variables, pixel_values, return_dict=False)

    out, flat = both(variables, pixel_values)
    assert out.logits.shape == out.cls_logits.shape == (2, 5)
    np.testing.assert_allclose(out.logits, (out.cls_logits + out.distillation_logits) / 2, rtol=1e-6)
    assert [h.shape for h in out.hidden_states] == [(2, 16, 16), (2, 4, 32), (2, 1, 48), (2, 1, 48)]
    assert [f.shape for f in out.features] == [(2, 4, 4, 16), (2, 2, 2, 32), (2, 1, 1, 48)]
    shapes = [a.shape for a in out.attentions]
    assert shapes == [(2, 1, 16, 16)] * 2 + [(2, 2, 4, 16), (2, 2, 4, 4), (2, 4, 1, 4)] + [(2, 3, 1, 1)] * 2
    for attention in out.attentions:
        np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert len(flat) == 3
    np.testing.assert_array_equal(flat[0], out.logits)

    base, variables, pixel_values = make(lf.LevitModel)
    out = compiled(base, output_hidden_states=True)(variables, pixel_values)
    last, pooled, hidden = out.to_tuple()
    assert last is out.last_hidden_state and hidden is out.hidden_states
    np.testing.assert_allclose(pooled, last.mean(1), rtol=1e-6)


@pytest.mark.parametrize("selected", [(0,), (1, 0), (-1,), (0, 2), [1]])
def test_selected_features_equal_those_of_all_stages(selected):
    model, variables, pixel_values = make(lf.LevitModel, **THREE_STAGES)

    @jax.jit
    def both(variables, pixel_values):
        everything = model.apply(variables, pixel_values, output_features=True, output_hidden_states=True)
        return everything, model.apply(
            variables, pixel_values, output_features=selected, output_hidden_states=True, output_attentions=True
        )

    everything, found = both(variables, pixel_values)
    assert len(found.features) == len(selected)
    for i, feature in zip(selected, found.features, strict=True):
        np.testing.assert_array_equal(feature, everything.features[i])
        info = model.config.feature_info[i]
        assert feature.shape == (2, *info.grid, info.channels)
    last = max(i % 3 for i in selected)
    assert (found.last_hidden_state is None) == (found.pooler_output is None) == (last < 2)
    assert len(found.hidden_states) == (4 if last == 2 else 1 + last)
    for hidden, wanted in zip(found.hidden_states, everything.hidden_states, strict=False):
        np.testing.assert_array_equal(hidden, wanted)
    assert len(found.attentions) == (2, 4, 7)[last]  # one per block and downsampling


def test_stages_after_the_selected_ones_are_not_computed():
    model, variables, pixel_values = make(lf.LevitModel, **THREE_STAGES)
    needed = {name: tree for name, tree in variables["params"].items() if name in ("stem", "stage_0")}
    apply = functools.partial(model.apply, output_features=(0,))
    jax.eval_shape(apply, {**variables, "params": needed}, pixel_values)  # would raise if it read another parameter
    _, updates = compiled(model, output_features=(0,), train=True, mutable=("batch_stats",))(variables, pixel_values)
    before, after = (tree["batch_stats"] for tree in (variables, updates))
    changed = [name for name in before if not jax.tree.all(jax.tree.map(np.array_equal, before[name], after[name]))]
    assert sorted(changed) == ["stage_0", "stem"]


def test_classifier_computes_its_logits_with_selected_features():
    model, variables, pixel_values = make(TWO_HEADS)
    found = compiled(model, output_features=(0,))(variables, pixel_values)
    assert [feature.shape for feature in found.features] == [(2, 2, 3, 8)]
    np.testing.assert_array_equal(found.logits, compiled(model)(variables, pixel_values).logits)


def test_initialization_with_selected_features_returns_all_variables():
    model, variables, pixel_values = make(lf.LevitModel)
    found = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, output_features=(0,)), pixel_values)
    assert jax.tree.structure(found) == jax.tree.structure(variables)


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        (0, "is invalid: expected True, False, or a tuple of stage indices from 0 to 1, found 0"),
        ((), r"is invalid: .*found \(\)"),
        ((True, False), "is invalid"),
        ("01", "is invalid"),
        (None, "is invalid"),
        ((0, 2), r"has an index out of range: .*found \(0, 2\). The model has 2 stages"),
        ((-3,), "has an index out of range"),
    ],
)
def test_wrong_feature_indices_raise(selected, message):
    model, variables, pixel_values = make(lf.LevitModel)
    with pytest.raises(ValueError, match=message):
        model.apply(variables, pixel_values, output_features=selected)


def test_model_without_classes_returns_pooled_features():
    model, variables, pixel_values = make(num_labels=0)
    assert "head" not in variables["params"]
    assert jax.eval_shape(model.apply, variables, pixel_values).logits.shape == (2, TINY["hidden_sizes"][-1])


def test_logits_of_an_image_do_not_depend_on_its_batch():
    model, variables, pixel_values = make(batch=4)
    apply = compiled(model)
    alone = apply(variables, pixel_values[:1]).logits
    np.testing.assert_allclose(apply(variables, pixel_values).logits[:1], alone, atol=1e-5 * float(abs(alone).max()))


@pytest.mark.slow
def test_jit_returns_the_same_logits_and_traces_once_per_shape():
    model, variables, pixel_values = make()
    traces = []

    @jax.jit
    def apply(variables, pixel_values):
        traces.append(pixel_values.shape)
        return model.apply(variables, pixel_values).logits

    expected = model.apply(variables, pixel_values).logits
    for _ in range(3):
        np.testing.assert_allclose(apply(variables, pixel_values), expected, rtol=1e-4, atol=1e-6)
    apply(variables, pixel_values[:1])
    assert len(traces) == 2


def test_equal_models_share_a_compiled_function():
    model, variables, pixel_values = make()
    apply = jax.jit(lambda m, v, x: m.apply(v, x).logits, static_argnums=0)
    twin = ONE_HEAD(lf.LevitConfig(**TINY), precision="highest")
    assert hash(model) == hash(twin) and model == twin
    apply(model, variables, pixel_values)
    apply(twin, variables, pixel_values)
    assert apply._cache_size() == 1


def test_new_weights_take_effect_in_evaluation():
    """The PyTorch implementations cache the attention biases of earlier weights."""
    model, variables, pixel_values = make()
    table = variables["params"]["stage_0"]["block_0"]["attention"]["attention_biases"]
    before = compiled(model)(variables, pixel_values).logits
    changed = jax.tree.map(lambda leaf: leaf * 5 if leaf is table else leaf, variables)
    assert float(abs(compiled(model)(changed, pixel_values).logits - before).max()) > 1e-3


@pytest.mark.slow  # the parity tests compare every gradient in evaluation mode
def test_second_gradient_in_evaluation_mode_reaches_every_parameter():
    model, variables, pixel_values = make(image_size=32)

    @jax.jit
    @jax.grad
    def gradient(params):
        return (model.apply({**variables, "params": params}, pixel_values).logits ** 2).sum()

    for _ in range(2):  # PyTorch's implementations break on the second call
        gradients = flatten_dict(gradient(variables["params"]), sep="/")
    # With one query and one key the softmax is 1 for every bias, so these gradients are rounding errors.
    constant = {"stage_1/block_0/attention/attention_biases"}
    largest = {path: float(abs(leaf).max()) for path, leaf in gradients.items()}
    assert {path for path, value in largest.items() if value < 1e-6 * max(largest.values())} == constant


def test_training_updates_statistics_and_counts():
    model, variables, pixel_values = make()
    before = variables["batch_stats"]["head"]["norm"]
    _, updates = compiled(model, train=True, mutable=("batch_stats",))(variables, pixel_values)
    after = updates["batch_stats"]["head"]["norm"]
    assert after["count"] == before["count"] + 1 and after["count"].dtype == jnp.int32
    assert (after["mean"] != before["mean"]).all() and (after["var"] != before["var"]).all()


def test_drop_path_drops_whole_branches_of_single_images():
    rate, batch = 0.4, 512
    model, variables, _ = make(lf.LevitModel, drop_path_rate=rate, depths=(1, 0), image_size=32, mlp_ratio=(0, 0))
    proj = variables["params"]["stage_0"]["block_0"]["attention"]["proj"]["norm"]
    proj["scale"], proj["bias"] = jnp.zeros_like(proj["scale"]), jnp.ones_like(proj["bias"])  # the branch is 1
    stem = variables["params"]["stem"]["conv_3"]["norm"]
    stem["scale"], stem["bias"] = jnp.zeros_like(stem["scale"]), jnp.zeros_like(stem["bias"])  # the residual is 0
    train = compiled(model, train=True, output_features=True, mutable=("batch_stats",))
    out, _ = train(variables, jnp.zeros((batch, 32, 32, 3)), rngs={"drop_path": jax.random.key(3)})
    values = np.asarray(out.features[0]).reshape(batch, -1)
    assert all(len(np.unique(row)) == 1 for row in values)
    kept = values[:, 0] > 0
    np.testing.assert_allclose(values[kept, 0], 1 / (1 - rate), rtol=1e-6)
    assert kept.mean() == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / batch) ** 0.5)
    evaluated = compiled(model, output_features=True)(variables, jnp.zeros((2, 32, 32, 3))).features[0]
    np.testing.assert_allclose(evaluated, 1)


def test_bfloat16_computes_norms_and_softmax_in_float32():
    model, variables, pixel_values = make()
    low = model.clone(dtype=jnp.bfloat16)
    logits = compiled(low)(variables, pixel_values).logits
    assert logits.dtype == jnp.bfloat16
    wanted = compiled(model)(variables, pixel_values).logits
    np.testing.assert_allclose(logits.astype(jnp.float32), wanted, atol=0.05, rtol=0.05)
    text = str(jax.make_jaxpr(lambda v, x: low.apply(v, x).logits)(variables, pixel_values))
    assert "exp" in text and not [line for line in text.splitlines() if " exp " in line and "bf16" in line]


def test_half_precision_parameters_are_computed_in_float32():
    model, variables, pixel_values = make()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16) if leaf.dtype.kind == "f" else leaf, variables)
    out = jax.eval_shape(model.clone(param_dtype=jnp.float16).apply, half, pixel_values)
    assert out.logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 3, 64, 64), "float32", r"pixel_values is channels first: .* channels last, found .*jnp\.transpose"),
        ((64, 64, 3), "float32", "found 3 axes.*batch axis"),
        ((2, 64, 64, 4), "float32", "found 4 channels.*num_channels, which is 3"),
        ((2, 56, 64, 3), "float32", "found 56x64 pixels. Resize"),
        ((2, 64, 64, 3), "uint8", "wrong dtype: expected float .*, found uint8.*LevitImageProcessor"),
    ],
)
def test_wrong_pixel_values_raise(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        ONE_HEAD(lf.LevitConfig(**SMALL)).init(jax.random.key(0), jnp.zeros(shape, dtype))


def test_training_on_one_image_raises():
    model, variables, pixel_values = make(batch=1, image_size=32)  # one token in the last stage
    with pytest.raises(ValueError, match=r"more than one value per channel.*two images or more"):
        compiled(model, train=True, mutable=("batch_stats",))(variables, pixel_values)


def test_training_a_folded_model_raises():
    model, _, pixel_values = make()
    folded = model.clone(folded=True)
    with pytest.raises(ValueError, match="A folded model cannot be trained"):
        folded.init(jax.random.key(0), pixel_values, train=True)


def test_classification_loss_follows_the_targets():
    logits = jnp.array([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]])
    classes, several = jnp.array([0, 2]), jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    log_softmax = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    assert classification_loss(logits, classes) == pytest.approx(-(log_softmax[0, 0] + log_softmax[1, 2]) / 2, rel=1e-5)
    sigmoid = 1 / (1 + np.exp(-np.asarray(logits)))
    binary = -np.where(several == 1, np.log(sigmoid), np.log(1 - sigmoid)).mean()
    assert classification_loss(logits, several) == pytest.approx(binary, rel=1e-5)
    assert classification_loss(logits[:, :1], jnp.array([1, 0])) == pytest.approx((1 + 0.01) / 2, rel=1e-5)


def test_the_model_returns_the_loss_of_its_labels():
    model, variables, pixel_values = make()
    labels = jnp.array([1, 4])

    @jax.jit  # both losses, so that they have the same bits
    def losses(variables, labels):
        out = model.apply(variables, pixel_values, labels)
        return out.loss, classification_loss(out.logits, labels)

    found, wanted = losses(variables, labels)
    assert found.shape == () and found == wanted
    assert jax.eval_shape(model.apply, variables, pixel_values).loss is None


@pytest.mark.slow  # the parity tests build each of these with two heads
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_config_builds_every_model(name):
    for model_class in _MODEL_CLASSES:
        assert _abstract_variables(model_class(unusual_config(name)))


def test_ignored_labels_do_not_count_and_others_out_of_range_raise():
    logits = jnp.array([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [1.0, 1.0, 3.0]])
    expected = classification_loss(logits[::2], jnp.array([0, 1]))
    ignoring = classification_loss(logits, jnp.array([0, -100, 1]))
    np.testing.assert_allclose(ignoring, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(classification_loss)(logits, jnp.array([0, -100, 1])), expected, rtol=1e-6)
    labels = jnp.array([0, -100, 1])  # a constant inside jit
    np.testing.assert_allclose(jax.jit(lambda logits: classification_loss(logits, labels))(logits), expected, rtol=1e-6)
    for label in (-1, 3):
        with pytest.raises(ValueError, match=rf"1 of 3 labels .* \[0, 3\), or -100 .* found {label} at index 2"):
            classification_loss(logits, jnp.array([0, -100, label]))


def test_loss_of_narrow_logits_is_float32():
    assert classification_loss(jnp.zeros((2, 3), jnp.bfloat16), jnp.array([0, 1])).dtype == jnp.float32


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, r"pixel_values is an empty batch: .* found \(0, \d+, \d+, 3\)"),
        (None, TypeError, "pixel_values must be an array, found list"),
    ],
)
def test_empty_batches_and_lists_raise(size, error, message):
    model, variables, pixel_values = make()
    with pytest.raises(error, match=message):
        model.apply(variables, [[1.0]] if size is None else pixel_values[:size])


def test_labels_are_converted_and_their_number_is_checked():
    logits = jnp.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    assert classification_loss(logits, [2, 0]) == classification_loss(logits, jnp.array([2, 0]))
    with pytest.raises(ValueError, match=r"expected \[2\] for single_label_classification, found \[3\]"):
        classification_loss(logits, [2, 0, 1])
    with pytest.raises(ValueError, match=r"expected \[2, 3\] for multi_label_classification, found \[2\]"):
        classification_loss(logits, [1.0, 0.0])
    with pytest.raises(ValueError, match="1 of 2 labels are not class indices"):
        classification_loss(logits, [2, 3])


def test_labels_for_two_heads_raise():
    model, variables, pixel_values = make(lf.LevitForImageClassificationWithTeacher)
    with pytest.raises(TypeError, match="A model with two heads takes no labels"):
        model.apply(variables, pixel_values, jnp.array([0, 1]))


def test_config_sets_the_defaults_of_the_outputs():
    settings = {"output_hidden_states": True, "output_attentions": True}
    model, variables, pixel_values = make(lf.LevitModel, **settings)
    out = model.apply(variables, pixel_values)
    assert out.hidden_states is not None and out.attentions is not None
    out = model.apply(variables, pixel_values, output_hidden_states=None, output_attentions=False)
    assert out.hidden_states is not None and out.attentions is None
    tuples = model.clone(config=model.config.replace(return_dict=False))
    assert isinstance(tuples.apply(variables, pixel_values), tuple)
    assert isinstance(tuples.apply(variables, pixel_values, return_dict=None), tuple)
    assert not isinstance(tuples.apply(variables, pixel_values, return_dict=True), tuple)


def test_library_works_with_configs_that_return_tuples():
    model, variables, pixel_values = make(return_dict=False, output_hidden_states=True)
    assert lf.make_inference_fn(model, variables)(pixel_values).shape == (2, 5)


def test_outputs_are_indexed_like_those_of_transformers():
    model, variables, pixel_values = make(lf.LevitForImageClassificationWithTeacher)
    out = model.apply(variables, pixel_values)
    assert list(out) == list(out.keys()) == ["logits", "cls_logits", "distillation_logits"] and len(out) == 3
    assert out["logits"] is out.logits is out[0] and out[1:] == out.to_tuple()[1:]
    assert dict(out.items())["cls_logits"] is out.values()[1] and "logits" in out and "hidden_states" not in out
    with pytest.raises(KeyError, match="has no hidden_states: it has logits, cls_logits, distillation_logits"):
        out["hidden_states"]
    with pytest.raises(IndexError):
        out[3]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, out)
    assert isinstance(doubled, type(out)) and (doubled.logits == 2 * out.logits).all()
