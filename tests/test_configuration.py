"""The configuration: checked, hashable, and stored in the format of transformers."""

import dataclasses
import json
import re
import time

import pytest

import levit_flax as lf
from configs import SMALL, UNUSUAL, unusual_config


def test_defaults_are_transformers():
    config = lf.LevitConfig()
    assert (config.hidden_sizes, config.num_attention_heads, config.depths) == ((128, 256, 384), (4, 8, 12), (4, 4, 4))
    assert config.down_ops == (("Subsample", 16, 8, 4, 2, 2), ("Subsample", 16, 16, 4, 2, 2))
    assert config.down_ops[0].num_attention_heads == 8
    assert config.id2label == ("LABEL_0", "LABEL_1") and config.num_labels == 2
    assert config.grids == ((14, 14), (7, 7), (4, 4))


def test_variants_are_the_published_ones():
    assert list(lf.VARIANTS) == ["levit-128S", "levit-128", "levit-192", "levit-256", "levit-384"]
    assert [config.drop_path_rate for config in lf.VARIANTS.values()] == [0, 0, 0, 0, 0.1]
    assert {config.id2label[281] for config in lf.VARIANTS.values()} == {"tabby, tabby cat"}
    assert {config.num_labels for config in lf.VARIANTS.values()} == {1000}
    assert lf.VARIANTS["levit-192"].down_ops == (("Subsample", 32, 6, 4, 2, 2), ("Subsample", 32, 9, 4, 2, 2))
    with pytest.raises(
        KeyError, match="levit_conv_512_s8 is not a published LeViT variant but an experiment of timm without"
    ):
        lf.VARIANTS["levit_conv_512_s8"]
    with pytest.raises(KeyError, match="levit-512x is not a published LeViT variant: expected one of levit-128S, "):
        lf.VARIANTS["levit-512x"]


def test_configs_are_frozen_hashable_and_hold_tuples():
    config = lf.LevitConfig(**{**SMALL, "hidden_sizes": [16, 32, 48], "id2label": {4: "e", **dict(enumerate("abcd"))}})
    assert config.hidden_sizes == (16, 32, 48) and config.id2label == tuple("abcde")
    assert config.label2id == dict(zip("abcde", range(5), strict=True))
    assert len({config, lf.LevitConfig(**{**SMALL, "id2label": list("abcde")})}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_labels = 3
    assert lf.LevitConfig(image_size=(224, 224)) == lf.LevitConfig()
    assert lf.LevitConfig(image_size=(200, 260)).grids == ((13, 17), (7, 9), (4, 5))
    assert lf.LevitConfig(attention_ratio=(2.0, 2.0, 2.0)) == lf.LevitConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_channels": 0}, "num_channels must be an integer from 1 to 1024, found 0"),
        ({"num_channels": True}, "num_channels must be an integer from 1 to 1024, found True"),
        ({"depths": (2, 3)}, "one entry per stage.*depths 2"),
        ({"key_dim": 16}, "key_dim must be a sequence with one integer per stage, found 16"),
        ({"key_dim": (16, 1.5, 16)}, r"key_dim\[1\] must be an integer from 1 to 1024, found 1.5"),
        ({"hidden_sizes": (4, 32, 48)}, r"hidden_sizes\[0\] must be at least 8"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be a number in \[0, 1\), found 1.0"),
        ({"image_size": (1, 2, 3)}, r"image_size must be an integer or \(height, width\)"),
        ({"patch_size": 8}, "patch_size 8 does not fit the stem: .* reduce 224 pixels to 14 tokens, expected 28"),
        (
            {"id2label": {0: "a", 2: "b"}},
            r"id2label must name the classes 0 to 1 once each, found the indices \[0, 2\]",
        ),
        ({"problem_type": "segmentation"}, "problem_type must be one of regression, .* found 'segmentation'"),
        ({"down_ops": (("Subsample", 16, 8, 4, 2, 2),)}, "down_ops must have 2 entries for 3 stages, found 1"),
        ({"down_ops": (("Pool", 16, 8, 4, 2, 2),) * 2}, r"must be 'Subsample' and 5 integers, found \('Pool'"),
        ({"key_dim": (512, 16, 16)}, "down_ops heads .* from 1 to 1024, found 0"),
    ],
)
def test_messages_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        lf.LevitConfig(**fields)


@pytest.mark.parametrize("name", UNUSUAL)
def test_dictionary_round_trip(name):
    config = dataclasses.replace(unusual_config(name), drop_path_rate=0.25, problem_type="regression")
    assert lf.LevitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_drop_path_rate_survives_transformers_integer():
    values = lf.VARIANTS["levit-384"].to_dict()
    assert type(values["drop_path_rate"]) is int and values["drop_path_rate"] == 0
    assert values["levit_flax"] == {"drop_path_rate": 0.1}
    assert lf.LevitConfig.from_dict({"drop_path_rate": 0.1}).drop_path_rate == 0.1


def test_transformers_reads_and_writes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch_models = pytest.importorskip("transformers.models.levit.modeling_levit")
    config = lf.VARIANTS["levit-384"]
    theirs = transformers.LevitConfig.from_dict(config.to_dict())
    for _ in range(2):  # each model appends to its config's down_ops
        torch_models.LevitModel(transformers.LevitConfig.from_dict(lf.LevitConfig(**SMALL).to_dict()))
        theirs.down_ops.append([""])
    theirs.save_pretrained(tmp_path)
    assert lf.LevitConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config


def test_unknown_keys_are_kept_with_a_warning():
    with pytest.warns(UserWarning, match=re.escape("does not use: color, finetuned_by. They have no effect")) as caught:
        config = lf.LevitConfig.from_dict({"color": {"b": 1, "a": [2]}, "finetuned_by": "me", "dtype": "float32"})
    assert len(caught) == 1
    hash(config)
    assert config.to_dict()["color"] == {"b": 1, "a": [2]} and config.to_dict()["dtype"] == "float32"


def test_configs_of_other_networks_raise():
    with pytest.raises(ValueError, match="The config has another model_type: expected 'levit', found 'resnet'"):
        lf.LevitConfig.from_dict({"model_type": "resnet"})
    with pytest.raises(
        ValueError, match="The config describes another architecture: expected hidden_act='hardswish', found 'silu'"
    ):
        lf.LevitConfig.from_dict({"hidden_act": "silu"})
    assert lf.LevitConfig.from_dict({"hidden_act": "hardswish"}) == lf.LevitConfig()


def test_feature_maps_are_listed():
    config = lf.VARIANTS["levit-192"]
    assert config.feature_info == ((192, 16, (14, 14)), (288, 32, (7, 7)), (384, 64, (4, 4)))
    assert config.feature_info[1].channels == 288 and config.feature_info[1].stride == 32


def test_derived_fields_follow_in_replace():
    config = lf.LevitConfig(hidden_sizes=(64, 128, 192), key_dim=(16,) * 3)
    wider = dataclasses.replace(config, hidden_sizes=(128, 256, 384))
    assert [op.num_attention_heads for op in wider.down_ops] == [8, 16]
    assert wider == lf.LevitConfig.from_dict(config.to_dict()).replace(hidden_sizes=(128, 256, 384))
    own = config.replace(down_ops=(("Subsample", 8, 2, 2, 2, 2),) * 2)
    assert dataclasses.replace(own, drop_path_rate=0.1).down_ops == own.down_ops
    assert own.replace(key_dim=(32,) * 3).down_ops[0] == ("Subsample", 32, 2, 4, 2, 2)


def test_classes_follow_in_replace():
    for replace in (dataclasses.replace, lf.LevitConfig.replace):
        assert replace(lf.VARIANTS["levit-128S"], num_labels=3).id2label == ("LABEL_0", "LABEL_1", "LABEL_2")
    named = lf.LevitConfig(id2label=("cat", "dog"))
    assert named.replace(id2label=("ant",)).num_labels == 1
    assert named.replace(num_labels=3).id2label[2] == "LABEL_2"
    assert named.replace(num_labels=2).id2label == ("cat", "dog")
    with pytest.warns(UserWarning, match=r"num_labels is 3, but id2label names 2 classes\. .* Use config\.replace"):
        assert dataclasses.replace(named, num_labels=3).id2label[2] == "LABEL_2"


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 1_000_000},
        {"image_size": (4096, 4096)},
        {"image_size": 10**400},
        {"image_size": 1e300},
        {"image_size": float("inf")},
        {"image_size": float("nan")},
        {"depths": [10**9] * 3},
        {"hidden_sizes": [10**9] * 3},
        {"num_labels": 10**9},
        {"num_channels": 10**9},
        {"kernel_size": 10**9},
        {"mlp_ratio": [10**9] * 3},
        {"key_dim": [10**6] * 3},
        {"num_attention_heads": [10**6] * 3},
        {"down_ops": [["Subsample", 16, 10**9, 4, 2, 2]] * 2},
        {"depths": [1] * 1_000_000},
        {"down_ops": "Subsample"},
        {"down_ops": [5, 5]},
        {"id2label": {"cat": 0}},
        {"id2label": dict.fromkeys(range(1, 200000), "x")},
    ],
)
def test_absurd_values_raise_a_short_sentence_at_once(fields):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"LevitConfig") as caught:
        lf.LevitConfig(**fields)
    assert time.perf_counter() - start < 1 and len(str(caught.value)) < 400


def test_output_settings_survive_the_file():
    values = {"output_hidden_states": True, "output_attentions": True, "return_dict": False, "torch_dtype": "float16"}
    config = lf.LevitConfig.from_dict({**values, "architectures": ["LevitModel"]})
    assert config.output_hidden_states and config.output_attentions and not config.return_dict
    assert config.dtype == "float16" and config.architectures == ("LevitModel",)
    assert lf.LevitConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["architectures"] == ["LevitModel"] and config.to_dict()["return_dict"] is False
    assert lf.LevitConfig.from_dict(dict.fromkeys(values)) == lf.LevitConfig()
    with pytest.raises(ValueError, match="return_dict must be True or False, found 'yes'"):
        lf.LevitConfig(return_dict="yes")


def test_labels_read_like_those_of_transformers():
    config = lf.LevitConfig(id2label={0: "cat", 1: "dog"})
    assert list(config.id2label.items()) == [(0, "cat"), (1, "dog")] and config.id2label == ("cat", "dog")
    assert list(config.id2label.keys()) == [0, 1] and config.id2label.values() == ("cat", "dog")
    assert lf.LevitConfig(label2id={"dog": 1, "cat": 0}) == config and config.label2id == {"cat": 0, "dog": 1}
    assert config.replace(label2id={"a": 0, "b": 1, "c": 2}).num_labels == 3
    assert config.replace(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert config.model_type == "levit"
    with pytest.raises(ValueError, match="label2id contradicts id2label"):
        lf.LevitConfig(id2label=("cat", "dog"), label2id={"dog": 0, "cat": 1})


def test_null_class_names_follow_the_number_of_classes():
    assert lf.LevitConfig.from_dict({"id2label": None, "num_labels": 10}).id2label[9] == "LABEL_9"
    assert lf.LevitConfig.from_dict({"id2label": None, "label2id": None, "num_labels": None}).num_labels == 2


def test_number_of_classes_wins_over_other_class_names():
    """As in transformers."""
    values = {"id2label": {"0": "cat", "1": "dog"}, "num_labels": 3}
    with pytest.warns(UserWarning, match="num_labels is 3, but id2label names 2 classes"):
        assert lf.LevitConfig.from_dict(values).id2label == ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.warns(UserWarning, match="num_labels is 1, but id2label names 2 classes"):
        assert lf.LevitConfig(id2label=("cat", "dog"), num_labels=1).label2id == {"LABEL_0": 0}


def test_json_files_round_trip(tmp_path):
    config = lf.LevitConfig(id2label=("cat", "dog"), drop_path_rate=0.1, output_attentions=True)
    config.to_json_file(tmp_path / "levit.json")
    assert lf.LevitConfig.from_json_file(tmp_path / "levit.json") == config
    assert (tmp_path / "levit.json").read_text() == config.to_json_string()
    config.save_pretrained(tmp_path / "new" / "sub")
    loaded = lf.LevitConfig.from_pretrained(
        tmp_path / "new", subfolder="sub", drop_path_rate=0.2, problem_type="regression"
    )
    assert loaded == config.replace(drop_path_rate=0.2, problem_type="regression")
    with pytest.raises(TypeError, match="nonsense"):
        lf.LevitConfig.from_pretrained(tmp_path / "new" / "sub", nonsense=1)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json is malformed: expected a JSON object, found an array"):
        lf.LevitConfig.from_json_file(tmp_path / "list.json")
