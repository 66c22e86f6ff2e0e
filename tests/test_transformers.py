"""The features that transformers documents for LeViT, one test per row of docs/from_transformers.md.

Logits, hidden states and gradients are compared in test_parity, the image processor in test_image_processing, saving in
test_workflow.
"""

import json

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import levit_flax as lf  # noqa: E402
from configs import SMALL, TINY, compiled  # noqa: E402
from levit_flax import convert  # noqa: E402
from levit_flax.hub import _EMBEDDED_DIRECTORY  # noqa: E402
from oracles import pixels, state_dict, torch_model  # noqa: E402

LOSS_LIMIT = 1e-5

CLASSES = ("LevitModel", "LevitForImageClassification", "LevitForImageClassificationWithTeacher")


def both(class_name, **fields):
    """Return transformers' model and ours with its weights, in float32, and images for each."""
    config = lf.LevitConfig(**{**TINY, "image_size": 32, **fields})
    reference = torch_model(config, class_name).float()
    model, variables = convert.from_torch(state_dict(reference), config=config)
    pixel_values = pixels(config).astype(np.float32)
    return (
        reference,
        torch.from_numpy(pixel_values).permute(0, 3, 1, 2),
        model.clone(precision="highest"),
        variables,
        pixel_values,
    )


def test_every_field_of_the_config_has_transformers_default():
    theirs = transformers.LevitConfig().to_dict()
    ours = lf.LevitConfig().to_dict()
    fields = set(ours) - {"model_type"}
    assert fields >= {"image_size", "hidden_sizes", "depths", "down_ops", "initializer_range", "id2label", "label2id"}
    for name in fields - {"id2label"}:
        assert json.loads(json.dumps(theirs[name])) == ours[name], name
    assert {str(key): value for key, value in theirs["id2label"].items()} == ours["id2label"]


@pytest.mark.parametrize(
    "fields", [{}, {"image_size": 160, "key_dim": (8, 8, 8)}, {"id2label": {0: "a", 1: "b", 2: "c"}}]
)
def test_configs_go_both_ways_through_json(fields, tmp_path):
    theirs = transformers.LevitConfig(**fields)
    theirs.save_pretrained(tmp_path)
    ours = lf.LevitConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    back = transformers.LevitConfig.from_dict(json.loads(json.dumps(ours.to_dict())))
    for name in ours.to_dict():
        # transformers appends empty entries to down_ops, and does not let label2id follow id2label.
        if name not in ("down_ops", "label2id"):
            assert json.dumps(getattr(back, name)) == json.dumps(getattr(theirs, name)), name
    assert [op for op in back.down_ops if op != [""]] == [list(op) for op in ours.down_ops]
    assert ours.num_labels == theirs.num_labels


@pytest.mark.parametrize(
    ("class_name", "hidden"),
    [
        (CLASSES[0], True),
        pytest.param(CLASSES[1], True, marks=pytest.mark.slow),
        (CLASSES[2], True),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in CLASSES),
    ],
)
def test_tuples_have_transformers_order(class_name, hidden):
    reference, theirs, model, variables, ours = both(class_name)
    with torch.inference_mode():
        wanted = reference(theirs, output_hidden_states=hidden, return_dict=False)
        named = reference(theirs, output_hidden_states=hidden)
    found = compiled(model, output_hidden_states=hidden, return_dict=False)(variables, ours)
    assert len(found) == len(wanted)
    for one, other in zip(found[:-1] if hidden else found, wanted, strict=False):
        assert one.shape == tuple(other.shape)
        assert np.abs(np.asarray(one) - other.numpy()).max() < 1e-4 * np.abs(other.numpy()).max()
    if hidden:
        assert [state.shape for state in found[-1]] == [tuple(state.shape) for state in wanted[-1]]
    out = jax.eval_shape(lambda v, x: model.apply(v, x, output_hidden_states=hidden), variables, ours)
    assert all(getattr(out, name) is not None for name in named)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        (None, 5, np.array([3, 1])),
        pytest.param("single_label_classification", 5, np.array([0, 4]), marks=pytest.mark.slow),
        (None, 5, np.array([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]], np.float32)),
        pytest.param(
            "multi_label_classification",
            5,
            np.array([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], np.float32),
            marks=pytest.mark.slow,
        ),
        (None, 1, np.array([0.3, -2.0], np.float32)),
        pytest.param("regression", 1, np.array([0.3, -2.0], np.float32), marks=pytest.mark.slow),
        ("regression", 5, np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)),
    ],
)
def test_losses_match_transformers(problem_type, num_labels, labels):
    reference, theirs, model, variables, ours = both(CLASSES[1], num_labels=num_labels, problem_type=problem_type)
    with torch.inference_mode():
        wanted = reference(theirs, labels=torch.from_numpy(labels))
    narrow = labels.astype(np.int32) if labels.dtype.kind == "i" else labels  # JAX's own integers
    found = compiled(model)(variables, ours, labels=narrow)
    assert found.loss.shape == () and float(found.loss) == pytest.approx(float(wanted.loss), rel=LOSS_LIMIT)
    assert model.config.problem_type == problem_type  # transformers writes the inferred type into its config
    assert reference.config.problem_type is not None
    with torch.inference_mode():
        order = reference(theirs, labels=torch.from_numpy(labels), return_dict=False)
    assert len(order) == len(found.to_tuple()) == 2


def test_wrong_channels_raise_in_both():
    reference, _, model, variables, _ = both(CLASSES[0])
    with pytest.raises(ValueError, match="channel dimension"):
        reference(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="num_channels, which is 3"):
        model.apply(variables, np.zeros((1, 32, 32, 4), np.float32))


@pytest.mark.parametrize("num_labels", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_another_number_of_classes_initializes_a_new_head(tmp_path, num_labels):
    """Both keep the backbone and initialize a new head. Ours warns, and needs no option to accept the mismatch."""
    reference, *_ = both(CLASSES[1])
    reference.save_pretrained(tmp_path)
    theirs = transformers.LevitForImageClassification.from_pretrained(
        tmp_path, num_labels=num_labels, ignore_mismatched_sizes=True
    )
    with pytest.warns(UserWarning, match=f"the heads for {num_labels} are newly initialized"):
        model, variables = lf.LevitForImageClassification.from_pretrained(tmp_path, num_labels=num_labels)
    back = convert.to_torch(model, variables)
    for name, tensor in theirs.state_dict().items():
        assert tuple(tensor.shape) == back[name].shape
        if not name.startswith("classifier"):
            np.testing.assert_array_equal(tensor.numpy(), back[name], err_msg=name)


def test_other_image_size_resizes_the_attention_biases(tmp_path):
    """transformers leaves them uninitialized."""
    reference, *_ = both(CLASSES[2])
    reference.save_pretrained(tmp_path)
    _, variables = lf.from_pretrained(tmp_path, image_size=96)
    biases = variables["params"]["stage_0"]["block_0"]["attention"]["attention_biases"]
    stored = reference.state_dict()["levit.encoder.stages.0.layers.0.module.attention_biases"]
    assert biases.shape == (36, 1) and float(biases[0, 0]) == pytest.approx(float(stored[0, 0]), rel=1e-6)
    assert np.abs(biases).max() < 1.3 * float(stored.abs().max())


def test_classifier_matches_the_pipeline():
    theirs = transformers.pipeline(
        "image-classification",
        model=transformers.LevitForImageClassificationWithTeacher.from_pretrained(_EMBEDDED_DIRECTORY, dtype="float32"),
        image_processor=transformers.LevitImageProcessorPil.from_pretrained(_EMBEDDED_DIRECTORY),
    )
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (150, 130 + i, 3), np.uint8)) for i in range(3)]
    wanted = theirs(images, top_k=4)
    found = lf.ImageClassifier.from_pretrained("cifar10")(images, top_k=4)
    for one, other in zip(found, wanted, strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        np.testing.assert_allclose(
            [entry["score"] for entry in one], [entry["score"] for entry in other], rtol=LOSS_LIMIT
        )


# What transformers tests for every config and image processor.


def test_config_files_are_read_by_both(tmp_path):
    values = {**SMALL, "num_labels": 3, "output_hidden_states": True, "return_dict": False, "dtype": "float16"}
    ours = lf.LevitConfig(**values, architectures=("LevitModel",))
    assert {key: json.loads(ours.to_json_string())[key] for key in ("image_size", "num_channels", "depths")} == {
        "image_size": ours.image_size,
        "num_channels": 3,
        "depths": list(ours.depths),
    }
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.LevitConfig.from_pretrained(tmp_path / "ours")
    assert theirs.output_hidden_states and not theirs.return_dict and theirs.num_labels == 3
    assert theirs.architectures == ["LevitModel"] and str(theirs.dtype).removeprefix("torch.") == "float16"
    theirs.save_pretrained(tmp_path / "theirs")
    again = lf.LevitConfig.from_pretrained(tmp_path / "theirs")
    assert again == ours and again.to_dict() == ours.to_dict()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_processor_takes_arrays_with_any_number_of_channels(channels):
    settings = {"size": {"shortest_edge": 18}, "crop_size": {"height": 18, "width": 18}}
    settings |= {"image_mean": [0.4] * channels, "image_std": [0.3] * channels}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 30, channels), np.uint8)
    call = {"return_tensors": "np", "input_data_format": "channels_last"}
    theirs = transformers.LevitImageProcessorPil(**settings)(list(pixels), **call)["pixel_values"]
    ours = lf.LevitImageProcessor(**settings)(images=list(pixels), data_format="channels_first", **call).pixel_values
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["LevitImageProcessor", "LevitImageProcessorPil"])
def test_processor_files_are_read_by_both(tmp_path, name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    theirs = getattr(transformers, name)(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 18})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lf.LevitImageProcessor.from_pretrained(tmp_path / "theirs")
    [saved] = ours.save_pretrained(tmp_path / "ours")
    back = transformers.LevitImageProcessorPil.from_pretrained(tmp_path / "ours")
    expected = back(image, return_tensors="np")["pixel_values"]
    assert saved.endswith("preprocessor_config.json") and expected.shape == (1, 3, 16, 18)
    np.testing.assert_array_equal(ours(image, return_tensors="np", data_format="channels_first").pixel_values, expected)
