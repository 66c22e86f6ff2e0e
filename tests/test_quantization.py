"""int8 artifacts: what they contain, what they report, and when they are refused."""

import importlib.util
import json
import os
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

import levit_flax as lf
from configs import TINY, random_variables
from levit_flax import quantization
from levit_flax.cli import main
from levit_flax.datasets import DataError, LabeledImages
from levit_flax.export import export_model

for package in ("jax2onnx", "onnxruntime"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def loaded():
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**TINY))
    return model, random_variables(model), lf.LevitImageProcessor(size=48, crop_size=(32, 48))


@pytest.fixture(scope="module")
def data(loaded):
    """Images whose labels are the model's own answers, so that its accuracy is 100 %."""
    levels = np.random.default_rng(0).integers(0, 256, (120, 4, 6, 3), np.uint8)
    images = [Image.fromarray(small).resize((48, 32), Image.Resampling.BICUBIC) for small in levels]
    classifier = lf.ImageClassifier(*loaded, batch_size=40, fast_start=True)
    targets = np.argmax(list(classifier.stream_logits(images)), -1).astype(np.int32)
    return LabeledImages(images, targets, loaded[0].config.id2label)


def export(directory, loaded, **options):
    """The exporters violate the strict promotion rules of these tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_model(directory, *loaded, **options)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_int8_artifacts_report_their_accuracy(loaded, data, tmp_path, format):
    package = pytest.importorskip({"onnx": "onnxruntime"}.get(format, format))
    export(tmp_path / "int8", loaded, format=format, calibration=data, max_drop=25)
    about = json.loads((tmp_path / "int8" / "model.json").read_text())["quantization"]
    assert (about["calibration_images"], about["held_out_images"], about["top1_float32"]) == (60, 60, 1.0)
    readme = (tmp_path / "int8" / "README.md").read_text()
    assert f"{about['top1_int8']:.2%}" in readme and "100.00%" in readme and "{" not in readme.split("```")[-1]
    _, held_out = quantization._split_images(data)
    pixels = np.concatenate(list(quantization._pixel_values(held_out, loaded[2])))
    if format == "onnx":
        import onnx

        path = tmp_path / "int8" / "model.onnx"
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear", "Softmax"} <= kinds
        session = package.InferenceSession(path, providers=["CPUExecutionProvider"])
        [logits] = session.run(None, {"pixel_values": pixels})
    else:
        logits = package.Core().compile_model(tmp_path / "int8" / "model.xml", "CPU")(pixels)[0]
        assert (tmp_path / "int8" / "model.bin").stat().st_size < 0.5 * sum(
            leaf.nbytes for leaf in jax.tree.leaves(loaded[1]["params"])
        )
    # Which images are batched together changes the last bits of logits, so one answer may differ.
    assert abs(np.mean(logits.argmax(-1) == held_out.targets) - about["top1_int8"]) <= 1 / 60


def test_int8_models_that_lost_accuracy_are_not_written(loaded, data, tmp_path, monkeypatch):
    real = quantization._quantize

    def damaged(artifact, *arguments):
        import onnx

        model = onnx.load_from_string(real(artifact, *arguments))
        for array in model.graph.initializer:
            if array.data_type == onnx.TensorProto.INT8 and len(array.dims) > 1:
                array.raw_data = bytes(len(array.raw_data))
        return model.SerializeToString()

    monkeypatch.setattr(quantization, "_quantize", damaged)
    message = (
        r"lost too much accuracy: expected a drop of at most 1 percentage points, found \d+\.\d\d, from 100\.00% to "
        r"\d+\.\d\d% of 60 images\. .* raise max_drop="
    )
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "int8", loaded, format="onnx", calibration=data)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("count", "problem_type", "message"),
    [
        (1, "single_label_classification", "has 1 images: expected two or more"),
        (4, "multi_label_classification", "is for multi_label_classification: expected images with one class each"),
    ],
)
def test_unsuitable_images_are_refused(loaded, tmp_path, count, problem_type, message):
    targets = np.zeros(count, np.int32) if count == 1 else np.zeros((count, 5), np.float32)
    data = LabeledImages([np.zeros((32, 48, 3), np.uint8)] * count, targets, problem_type=problem_type)
    with pytest.raises(DataError, match=message):
        export(tmp_path / "int8", loaded, format="onnx", calibration=data)


def test_stablehlo_is_not_quantized(loaded, data, tmp_path):
    with pytest.raises(ValueError, match="expected the format onnx or openvino for int8"):
        export(tmp_path / "int8", loaded, calibration=data)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--int8"], 2, "expected --int8 and --calibration together"),
        (["--calibration", "empty"], 2, "expected --int8 and --calibration together"),
        (["--int8", "--calibration", "empty", "--format", "stablehlo"], 2, "--int8 needs --format onnx or openvino"),
        (["--int8", "--calibration", "nowhere", "--format", "onnx"], 2, "The folder nowhere does not exist"),
        (["--int8", "--calibration", "empty", "--format", "onnx"], 1, "empty has no folders: expected one folder of"),
        (["--int8", "--calibration", "classes", "--format", "onnx"], 1, "classes contains no images: expected at"),
    ],
)
def test_wrong_calls_raise_one_sentence(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    assert main(["export", "out", "-m", "cifar10", *arguments]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
