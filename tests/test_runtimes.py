"""Classification in OpenVINO and onnxruntime: the same preprocessing, labels and streaming as in JAX."""

import importlib.util
import json
import sys
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

import levit_flax as lf
from configs import TINY, random_variables
from levit_flax.cli import main

LIMIT = 1e-5  # float32, of the largest logit
RUNTIMES = ("openvino", "onnxruntime")


def needs_runtime(name):
    missing = [package for package in (name, "jax2onnx") if importlib.util.find_spec(package) is None]
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"{missing} are not installed"))


@pytest.fixture(autouse=True)
def exporter():
    """The exporter violates the strict promotion rules of these tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def model():
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**TINY))
    return model, random_variables(model)


def images(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, 40, 60, 3), np.uint8))


@pytest.mark.parametrize("runtime", [*map(needs_runtime, RUNTIMES)])
def test_runtime_classifies_like_jax(model, runtime, tmp_path):
    processor = lf.LevitImageProcessor(size=(32, 48), crop_size=(32, 48), image_mean=0.4, image_std=0.3)
    jax_classifier = lf.ImageClassifier(*model, processor, batch_size=4)
    other = lf.ImageClassifier(*model, processor, batch_size=4, runtime=runtime)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    several = [*images(9), tmp_path / "broken.jpg", images(1)[0].astype(np.float32) / 255]
    expected, found = (list(classifier.stream_logits(several)) for classifier in (jax_classifier, other))
    assert type(found[9]) is type(expected[9]) and str(found[9]) == str(expected[9])
    del expected[9], found[9]
    np.testing.assert_allclose(found, expected, atol=LIMIT * np.abs(expected).max())
    ours, theirs = (classifier(images(1)[0], top_k=2) for classifier in (jax_classifier, other))
    assert [entry["label"] for entry in ours] == [entry["label"] for entry in theirs]
    pixels = np.random.default_rng(0).standard_normal((5, 32, 48, 3)).astype(np.float32)
    np.testing.assert_allclose(other.logits(pixels), jax_classifier.logits(pixels), atol=1e-4)


@pytest.mark.parametrize("runtime", [*map(needs_runtime, RUNTIMES)])
def test_commands_take_a_runtime(runtime, tmp_path, capsys):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "cat" / "1.png")
    answers = []
    for chosen in ("jax", runtime):
        assert main(["classify", str(tmp_path / "data" / "cat"), "-m", "cifar10", "--json", "--runtime", chosen]) == 0
        [answer] = json.loads(capsys.readouterr().out)
        answers.append([entry["score"] for entry in answer["predictions"]])
    np.testing.assert_allclose(*answers, atol=1e-5)
    assert main(["evaluate", str(tmp_path / "data"), "-m", "cifar10", "--json", "--runtime", runtime]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_missing_runtime_raises(model, runtime, monkeypatch):
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(ImportError, match=f"{runtime}, which is not installed. Run: pip install 'levit-flax"):
        lf.ImageClassifier(*model, runtime=runtime)


def test_unknown_runtime_raises(model):
    with pytest.raises(ValueError, match="runtime must be one of 'jax', 'openvino', 'onnxruntime', found 'tensorrt'"):
        lf.ImageClassifier(*model, runtime="tensorrt")


@pytest.mark.parametrize("runtime", [*map(needs_runtime, RUNTIMES)])
def test_narrow_dtypes_need_jax(model, runtime):
    module, variables = model
    with pytest.raises(ValueError, match=f"The runtime {runtime} computes in float32: .* found bfloat16"):
        lf.ImageClassifier(module.clone(dtype="bfloat16"), variables, runtime=runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_devices_are_for_jax_only(model, runtime):
    with pytest.raises(ValueError, match=f"The runtime {runtime} computes on the CPU: expected devices=None"):
        lf.ImageClassifier(*model, runtime=runtime, devices=jax.devices())
