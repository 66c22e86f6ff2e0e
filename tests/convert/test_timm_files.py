"""timm's config.json, read and written: architecture, labels, and the preprocessing with its crop of 0.9."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import levit_flax as lf
from configs import SMALL, random_variables
from levit_flax import convert
from levit_flax.convert import ConversionError
from levit_flax.convert.timm_files import _read_timm_config, _read_timm_processor, _write_timm_config
from levit_flax.loading import _load_processor


def published(name="levit_128s", **values):
    """Return the content of config.json in timm's repository on the Hub."""
    return {
        "architecture": name,
        "num_classes": 1000,
        "num_features": 384,
        "global_pool": "avg",
        "pretrained_cfg": {
            "tag": "fb_dist_in1k",
            "custom_load": False,
            "input_size": [3, 224, 224],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "num_classes": 1000,
            "pool_size": [4, 4],
            "first_conv": "stem.conv1.linear",
            "classifier": ["head.linear", "head_dist.linear"],
        },
        **values,
    }


@pytest.mark.parametrize("name", lf.VARIANTS)
@pytest.mark.parametrize("flavour", ["levit_", "levit_conv_"])
def test_published_configs_are_read(name, flavour):
    config = _read_timm_config(published(name.lower().replace("levit-", flavour)))
    variant = lf.VARIANTS[name]
    fields = ("hidden_sizes", "num_attention_heads", "depths", "key_dim", "down_ops", "image_size", "num_labels")
    assert all(getattr(config, field) == getattr(variant, field) for field in fields)


def test_arguments_and_labels_are_read():
    values = published(
        num_classes=3,
        label_names=["n1", "n2", "n3"],
        label_descriptions={"n1": "a cat", "n3": "a dog"},
        model_args={"img_size": 160, "key_dim": 32, "embed_dim": [64, 128], "depth": [1, 2], "num_heads": [2, 4]}
        | {"attn_ratio": 2.0, "mlp_ratio": [2, 3], "act_layer": "hard_swish", "use_conv": True, "drop_path_rate": 0.1},
    )
    config = _read_timm_config(values)
    assert config.image_size == 160 and config.key_dim == (32, 32) and config.hidden_sizes == (64, 128)
    assert config.mlp_ratio == (2, 3) and config.attention_ratio == (2, 2) and config.drop_path_rate == 0.1
    assert config.id2label == ("a cat", "n2", "a dog") and len(config.down_ops) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (published("levit_512"), "unsupported architecture: expected one of levit_128s, .*, found 'levit_512'"),
        (published("resnet50"), "unsupported architecture: .*, found 'resnet50'"),
        (published(model_args={"act_layer": "silu"}), "act_layer='silu', .*: expected 'hard_swish'"),
        (published(model_args={"stem_type": "s8"}), "stem_type='s8'"),
        (published(model_args={"wings": 2}), "the argument wings=2, which levit-flax does not support"),
        (published(pretrained_cfg=3), "a malformed pretrained_cfg: expected an object, found 3"),
    ],
)
def test_other_networks_are_refused(values, message):
    with pytest.raises(ConversionError, match=message):
        _read_timm_config(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_args": [1]},
        {"model_args": {"embed_dim": 5}},
        {"model_args": {"drop_path_rate": "x"}},
        {"pretrained_cfg": 3},
        {"pretrained_cfg": {"input_size": 5}},
        {"pretrained_cfg": {"input_size": [3]}},
        {"pretrained_cfg": {"input_size": [3, 224, None]}},
        {"num_classes": "many"},
        {"num_classes": 2, "label_names": 5},
        {"num_classes": 2, "label_names": {"a": "b"}},
        {"num_classes": 2, "label_names": ["a", "b"], "label_descriptions": ["c"]},
        {"architecture": "levit_512"},
    ],
    ids=str,
)
def test_malformed_configs_are_refused(tmp_path, changes):
    model = lf.LevitForImageClassification(lf.LevitConfig(**SMALL))
    save_file(convert.to_torch(model, random_variables(model), "timm"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**published(), **changes}))
    with pytest.raises(ConversionError, match=rf"^The config\.json of {tmp_path}( is malformed)?: "):
        convert.from_torch(tmp_path)


@pytest.mark.parametrize(
    "cfg",
    [3, *({key: value} for key in ("input_size", "mean", "std", "crop_pct", "interpolation") for value in ({}, "x"))],
)
def test_malformed_preprocessing_is_refused(tmp_path, cfg):
    (tmp_path / "config.json").write_text(json.dumps(published(pretrained_cfg=cfg)))
    with pytest.raises(ConversionError, match=rf"^The preprocessing in {tmp_path}/config\.json"):
        _load_processor(tmp_path, lf.LevitConfig())


def test_old_files_without_a_nested_config_are_read(tmp_path):
    values = published()
    flat = {**values.pop("pretrained_cfg"), **values, "mean": [0.5, 0.5, 0.5]}
    assert _read_timm_config(flat) == _read_timm_config(published())
    (tmp_path / "config.json").write_text(json.dumps(flat))
    for processor in (_read_timm_processor(flat), _load_processor(tmp_path, lf.LevitConfig())):
        assert processor.size == {"shortest_edge": 217} and tuple(processor.image_mean) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (640, 480), (250, 248)])
def test_preprocessing_equals_timm(height, width):
    """If the offset of the crop is a half, timm rounds it and our processor floors it."""
    timm = pytest.importorskip("timm")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    processor = _read_timm_processor(published())
    assert processor.size == {"shortest_edge": 217} and processor.crop_size == {"height": 224, "width": 224}
    ours = processor(image, return_tensors="np", data_format="channels_first")["pixel_values"][0]
    transform = timm.data.create_transform(input_size=(3, 224, 224), interpolation="bicubic", crop_pct=0.9)
    np.testing.assert_allclose(ours, transform(image).numpy(), atol=1e-5)


@pytest.mark.parametrize("cfg", [{"interpolation": "random"}, {"crop_mode": "squash"}])
def test_other_preprocessing_is_refused(cfg):
    values = published()
    values["pretrained_cfg"] |= cfg
    with pytest.raises(ConversionError, match=r"expected one of bicubic, .* and a center crop"):
        _read_timm_processor(values)


def write_timm_directory(directory, model, layout):
    directory.mkdir()
    save_file(convert.to_torch(model, random_variables(model), layout), directory / "model.safetensors")
    config = _write_timm_config(model.config, model.head_names, lf.LevitImageProcessor(), layout == "timm_conv")
    (directory / "config.json").write_text(config)


@pytest.mark.parametrize("heads", [2, 1, 0])
@pytest.mark.parametrize("layout", ["timm", "timm_conv"])
def test_timm_opens_what_is_written(tmp_path, layout, heads):
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    classes = (lf.LevitModel, lf.LevitForImageClassification, lf.LevitForImageClassificationWithTeacher)
    model = classes[heads](lf.LevitConfig(**SMALL, drop_path_rate=0.1))
    write_timm_directory(tmp_path / "out", model, layout)
    opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    for name, array in convert.to_torch(model, random_variables(model), layout).items():
        np.testing.assert_array_equal(opened.state_dict()[name].numpy(), array)
    cfg = opened.pretrained_cfg
    assert cfg["crop_pct"] == 64 / 256 and cfg["input_size"] == (3, 64, 64)
    assert opened.eval()(torch.zeros(1, 3, 64, 64)).shape == ((1, 5) if heads else (1, 48))
    back = convert.from_torch(tmp_path / "out")[0]
    assert type(back) is type(model) and back.config.drop_path_rate == 0.1
    assert back.config == model.config or not heads  # without heads timm's config tells of no classes


def test_directory_of_timm_loads_unchanged(tmp_path):
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL))
    write_timm_directory(tmp_path / "out", model, "timm")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    values["pretrained_cfg"] |= {"crop_pct": 0.9, "mean": [0.5, 0.5, 0.5]}
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    loaded, _ = lf.from_pretrained(tmp_path / "out")
    processor = _load_processor(tmp_path / "out", loaded.config)
    assert int(256 / 224 * processor.size["shortest_edge"]) == 71 - 1  # 64 / 0.9 = 71 is no size times 8 / 7
    assert tuple(processor.image_mean) == (0.5, 0.5, 0.5)
    classifier = lf.ImageClassifier.from_pretrained(tmp_path / "out")
    assert classifier.processor.size == processor.size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key_dim": (8, 16, 8)}, "a key_dim that differs between stages"),
        ({"down_ops": (("Subsample", 8, 2, 2, 2, 2), ("Subsample", 8, 4, 4, 2, 2))}, "downsamplings other"),
        ({"kernel_size": 5, "padding": 2}, "a stem other"),
        ({"mlp_ratio": (2, 0, 2)}, "blocks without an MLP"),
        ({"image_size": 72}, "an image size that is not a multiple of 16"),
    ],
)
def test_models_that_timm_cannot_build_are_refused(fields, message):
    config = lf.LevitConfig(**{**SMALL, **fields})
    with pytest.raises(ConversionError, match=f"timm's LeViT does not support {message}"):
        _write_timm_config(config, ("head",), lf.LevitImageProcessor(), convolutional=False)
