"""Model directories: save, load, damaged files, and loading through the model classes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import levit_flax as lf
from configs import SMALL, random_variables
from levit_flax import loading
from levit_flax.checkpoint import _check_variables
from levit_flax.modeling import _MODEL_CLASSES

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


def small(model_class=lf.LevitForImageClassification, **fields):
    model = model_class(lf.LevitConfig(**{**SMALL, **fields}))
    return model, random_variables(model)


@pytest.mark.parametrize("model_class", _MODEL_CLASSES)
@pytest.mark.parametrize("folded", [False, True])
def test_saved_models_load_unchanged(model_class, folded, tmp_path):
    model = model_class(lf.LevitConfig(**SMALL, drop_path_rate=0.2, problem_type="regression"), folded=folded)
    variables = random_variables(model)
    lf.save_pretrained(tmp_path / "new" / "model", model, variables, provenance={"source": "here"})
    loaded, found = lf.from_pretrained(tmp_path / "new" / "model")
    assert loaded == model
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    for path, leaf in flatten_dict(variables, sep="/").items():
        np.testing.assert_array_equal(flatten_dict(found, sep="/")[path], leaf)
    config = json.loads((tmp_path / "new" / "model" / "config.json").read_text())
    assert config["architectures"] == [model_class.__name__]
    assert config["levit_flax"]["provenance"] == {"source": "here"}
    assert sorted(os.listdir(tmp_path / "new")) == ["model"]


def test_types_are_kept_or_converted(tmp_path):
    model, variables = small()
    half = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16) if leaf.dtype == np.float32 else leaf, variables)
    lf.save_pretrained(tmp_path, model, half)
    loaded, found = lf.from_pretrained(tmp_path, dtype="auto")
    assert loaded.param_dtype == jax.numpy.bfloat16
    assert found["params"]["head"]["linear"]["kernel"].dtype == jax.numpy.bfloat16
    for dtype in (None, "float32"):  # narrower types underflow in optimizers
        loaded, found = lf.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.param_dtype == np.float32
        assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32", "int32"}


def test_processor_is_saved_with_the_model(tmp_path):
    model, variables = small()
    lf.save_pretrained(tmp_path, model, variables, lf.LevitImageProcessor(size=56, crop_size=64))
    assert loading._load_processor(tmp_path, model.config).size == {"shortest_edge": 56}
    usual = loading._load_processor(None, lf.LevitConfig(image_size=(64, 96)))
    assert (usual.size, usual.crop_size) == ({"shortest_edge": 96}, {"height": 64, "width": 96})


def test_existing_files_are_kept_without_overwrite(tmp_path):
    model, variables = small()
    directory = tmp_path / "model"
    directory.mkdir()
    lf.save_pretrained(directory, model, variables, lf.LevitImageProcessor())  # an empty directory is free
    (directory / "notes.txt").write_text("mine")
    (directory / "model.safetensors").write_text("PyTorch's")
    before = (directory / "flax_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"is not empty: .* pass overwrite=True to replace"):
        lf.save_pretrained(directory, model, random_variables(model, seed=1))
    assert (directory / "flax_model.safetensors").read_bytes() == before
    lf.save_pretrained(directory, model, random_variables(model, seed=1), overwrite=True)
    assert (directory / "flax_model.safetensors").read_bytes() != before
    assert sorted(os.listdir(directory)) == ["config.json", "flax_model.safetensors", "model.safetensors", "notes.txt"]
    assert os.listdir(tmp_path) == ["model"]


def test_failed_write_leaves_no_files(tmp_path):
    model, variables = small()

    class Broken(lf.LevitImageProcessor):
        def save_pretrained(self, directory, **_):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        lf.save_pretrained(tmp_path / "model", model, variables, Broken())
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write .*file/model: .* \(.*file\)\. Choose a writable location"):
        lf.save_pretrained(tmp_path / "file" / "model", model, variables)
    with pytest.raises(FileExistsError, match="is a file: expected a directory or an unused name"):
        lf.save_pretrained(tmp_path / "file", model, variables)


@pytest.mark.parametrize(
    "suffixes",
    [["safetensors"], pytest.param(["pth"], marks=[pytest.mark.slow, needs_torch])],
    ids=["safetensors", "pth"],
)
def test_full_disk_raises_one_sentence_and_leaves_no_files(tmp_path, suffixes):
    command = [sys.executable, Path(__file__).parent / "programs" / "full_disk.py", tmp_path, *suffixes]
    # Coverage would write its data to the full disk, too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    *sentences, left = done.stdout.splitlines()
    assert (done.returncode, done.stderr, left) == (0, "", "[]")
    assert len(sentences) == 2 * (1 + len(suffixes))
    for sentence in sentences:
        assert re.fullmatch(rf"Cannot write {tmp_path}/.*model.*: .*\. Choose a .*\.", sentence)


def test_variables_of_another_model_raise(tmp_path):
    model, variables = small()
    del variables["params"]["head"]["linear"]["bias"]
    with pytest.raises(
        ValueError, match=r": 1 of \d+ arrays differ, params/head/linear/bias \(expected \(5,\), found nothing\)"
    ):
        lf.save_pretrained(tmp_path / "model", model, variables)
    assert os.listdir(tmp_path) == []


def test_damaged_directories_raise(tmp_path):
    model, variables = small()
    lf.save_pretrained(tmp_path / "model", model, variables)
    weights, config = tmp_path / "model" / "flax_model.safetensors", tmp_path / "model" / "config.json"
    content, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"flax_model\.safetensors is not a complete safetensors file"):
        lf.from_pretrained(tmp_path / "model")
    weights.write_bytes(content)
    config.write_text(json.dumps({**settings, "num_attention_heads": [1, 1, 3]}))
    with pytest.raises(ValueError, match=r"does not fit LevitForImageClassification: \d+ of \d+ arrays differ"):
        lf.from_pretrained(tmp_path / "model")
    for broken in ("{", "[]", "[" * 100_000, json.dumps({**settings, "architectures": ["ResNet"]})):
        config.write_text(broken)
        with pytest.raises(
            ValueError,
            match=r"config\.json is (not the config of a LeViT model|not valid JSON|malformed: expected a JSON object)",
        ):
            lf.from_pretrained(tmp_path / "model")
    for change in ({"down_ops": 5}, {"id2label": 5}, {"stride": float("inf")}, {"levit_flax": 5}, {"depths": "x"}):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=r"config\.json is not the config of a LeViT model"):
            lf.from_pretrained(tmp_path / "model")
    config.unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        lf.from_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="does not exist: expected a directory"):
        lf.from_pretrained(tmp_path / "nowhere")


# Through the model classes, as in transformers.


@pytest.fixture
def two_heads(tmp_path):
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL))
    model.save_pretrained(
        tmp_path / "two", random_variables(model), processor=lf.LevitImageProcessor(size=64, crop_size=64)
    )
    return tmp_path / "two"


def leaves(variables):
    return flatten_dict(variables, sep="/")


def test_class_loads_its_own_model(two_heads):
    model, variables = lf.LevitForImageClassificationWithTeacher.from_pretrained(two_heads)
    jax.tree.map(np.testing.assert_array_equal, variables, random_variables(model))


def test_loading_one_head_of_two_warns(two_heads):
    with pytest.warns(
        UserWarning, match=r"published accuracy is that of the average of both heads.*levit_flax\.merge_heads"
    ):
        model, variables = lf.LevitForImageClassification.from_pretrained(two_heads)
    assert type(model) is lf.LevitForImageClassification and model.config.num_labels == 5
    whole = leaves(lf.from_pretrained(two_heads)[1])
    assert leaves(variables).keys() == {path for path in whole if "head_dist" not in path}
    _check_variables(model, variables, "it")


def test_features_load_without_heads(two_heads):
    model, variables = lf.LevitModel.from_pretrained(two_heads)
    assert type(model) is lf.LevitModel
    _check_variables(model, variables, "it")


def test_missing_head_is_newly_initialized_with_a_warning(two_heads, tmp_path):
    model, variables = lf.merge_heads(*lf.from_pretrained(two_heads))
    model.save_pretrained(tmp_path / "one", variables)
    with pytest.warns(UserWarning, match="has no head_dist: these heads are newly initialized"):
        back, back_variables = lf.LevitForImageClassificationWithTeacher.from_pretrained(tmp_path / "one")
    _check_variables(back, back_variables, "it")
    assert (
        leaves(back_variables)["params/head/linear/kernel"] == variables["params"]["head"]["linear"]["kernel"]
    ).all()
    assert back.config.id2label == model.config.id2label
    lf.save_pretrained(tmp_path / "folded", *lf.fold_batch_norm(model, variables))
    with (
        pytest.warns(UserWarning, match="has no head_dist"),
        pytest.raises(ValueError, match="cannot be replaced: expected a model with heads and folded=False"),
    ):
        lf.LevitForImageClassificationWithTeacher.from_pretrained(tmp_path / "folded")


def test_another_number_of_classes_warns(two_heads):
    with pytest.warns(UserWarning, match="has 5 classes: the heads for 7 are newly initialized"):
        model, variables = lf.from_pretrained(two_heads, num_labels=7)
    assert model.config.num_labels == 7
    _check_variables(model, variables, "it")
    assert lf.from_pretrained(two_heads, num_labels=5)[0].config.num_labels == 5


def test_image_size_resizes_model_and_processor(two_heads):
    model, variables = lf.from_pretrained(two_heads, image_size=(96, 80))
    assert model.config.image_size == (96, 80)
    _check_variables(model, variables, "it")
    classifier = lf.ImageClassifier.from_pretrained(two_heads, image_size=96)
    assert classifier.processor.size == {"shortest_edge": 96}
    assert len(classifier(np.zeros((50, 60, 3), np.uint8))) == 5


def test_push_to_hub_uploads_the_model_directory(two_heads, tmp_path, monkeypatch):
    sent = {}

    def push(directory, repo_id, *, files, **options):
        sent.update(names=sorted(path.name for path in Path(directory).iterdir()), repo_id=repo_id, options=options)
        return "address"

    monkeypatch.setattr("levit_flax.hub._push", push)
    model, variables = lf.from_pretrained(two_heads)
    assert model.push_to_hub("me/levit", variables, private=True) == "address"
    assert sent == {
        "names": ["config.json", "flax_model.safetensors"],
        "repo_id": "me/levit",
        "options": {"private": True, "token": None, "revision": None, "commit_message": None},
    }


def test_processor_has_the_names_of_transformers():
    assert lf.LevitImageProcessorFast is lf.LevitFeatureExtractor is lf.LevitImageProcessor


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("params/head/linear/kernel", lambda a: a.astype(np.int32), "head/linear/kernel \\(expected floating point"),
        ("params/head/linear/bias", lambda a: a * np.nan, "head/linear/bias \\(expected finite values"),
        ("batch_stats/head/norm/var", lambda a: -1 - a, "head/norm/var \\(expected variances of at least 0"),
        ("batch_stats/head/norm/count", lambda a: a - 2**20, "head/norm/count \\(expected an integer from 0"),
    ],
)
def test_invalid_values_of_a_model_directory_raise(tmp_path, path, change, message):
    model, variables = small()
    flat = flatten_dict(variables, sep="/")
    lf.save_pretrained(tmp_path, model, variables)
    save_file({**flat, path: np.asarray(change(flat[path]))}, tmp_path / "flax_model.safetensors")
    with pytest.raises(ValueError, match=f"flax_model.safetensors holds invalid values: .*{message}"):
        lf.from_pretrained(tmp_path)


def test_array_below_another_raises(tmp_path):
    model, variables = small()
    flat = flatten_dict(variables, sep="/")
    lf.save_pretrained(tmp_path, model, variables)
    save_file({**flat, "params/head/linear/kernel/more": np.zeros(1)}, tmp_path / "flax_model.safetensors")
    with pytest.raises(ValueError, match=r"1 of \d+ arrays differ, \S+/kernel/more \(expected nothing"):
        lf.from_pretrained(tmp_path)


def test_files_follow_the_umask(tmp_path):
    model, variables = small()
    before = os.umask(0o027)
    try:
        lf.save_pretrained(tmp_path / "model", model, variables, lf.LevitImageProcessor(size=64, crop_size=64))
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {0o640} and (tmp_path / "model").stat().st_mode & 0o777 == 0o750


def test_dtype_accepts_names_and_dtypes_of_other_libraries(tmp_path):
    lf.save_pretrained(tmp_path, *small())
    for options in ({"torch_dtype": "float16"}, {"dtype": np.float16}, {"dtype": jax.numpy.float16}):
        assert lf.from_pretrained(tmp_path, **options)[0].param_dtype == np.float16
    for wrong in ("float17", "int32", 5):
        with pytest.raises(
            ValueError, match='dtype must be one of float16, bfloat16, float32, float64, "auto" or None'
        ):
            lf.from_pretrained(tmp_path, dtype=wrong)
    with pytest.raises(ValueError, match="dtype and torch_dtype mean the same"):
        lf.from_pretrained(tmp_path, dtype="float16", torch_dtype="float32")


@needs_torch
def test_dtype_accepts_those_of_pytorch(tmp_path):
    import torch

    lf.save_pretrained(tmp_path, *small())
    assert lf.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)[0].param_dtype == jax.numpy.bfloat16


def test_options_of_transformers_change_heads_and_channels(tmp_path, recwarn):
    lf.save_pretrained(tmp_path / "sub", *small())
    model, _ = lf.from_pretrained(tmp_path, subfolder="sub", num_labels=0, num_channels=1)
    assert model.config.num_labels == 0 and model.config.num_channels == 1 and not recwarn.list
    with pytest.warns(UserWarning, match="the heads for 3 are newly initialized"):
        model, _ = lf.from_pretrained(tmp_path / "sub", num_labels=3, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 3
