"""Exported artifacts, run in processes that do not import this library."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

import levit_flax as lf
from configs import TINY, random_variables
from levit_flax.cli import main
from levit_flax.export import export_model
from levit_flax.onnx_export import to_onnx

LIMIT = 1e-5  # of the largest logit, in float32 on the same machine; ONNX runs other kernels
PROGRAMS = Path(__file__).parent / "programs"


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def exported_and_original(format, program, directory):
    """Export a model and run it; return the output of the program and pairs of logits for several batch sizes.

    The exporters violate the strict promotion rules of these tests.
    """
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**TINY), precision="highest")
    variables = random_variables(model)
    saved = directory.with_name("saved")
    lf.save_pretrained(saved, model, variables, lf.LevitImageProcessor(size=48, crop_size=(32, 48)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        assert main(["export", str(directory), "-m", str(saved), "--format", format]) == 0
    generator = np.random.default_rng(0)
    pixels = {batch: generator.standard_normal((batch, 32, 48, 3), np.float32) for batch in (1, 3, 8)}
    for batch, values in pixels.items():
        np.save(directory / f"pixels{batch}.npy", values)
    done = subprocess.run(
        [sys.executable, PROGRAMS / program], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Images do not affect each other, so one batch and one compilation are enough.
    logits = np.asarray(jax.jit(model.apply)(variables, np.concatenate(list(pixels.values()))).logits)
    wanted = np.split(logits, np.cumsum(list(pixels))[:-1])
    return done.stdout, [
        (np.load(directory / f"logits{batch}.npy"), part) for batch, part in zip(pixels, wanted, strict=True)
    ]


@needs("flatbuffers")
def test_stablehlo_runs_without_this_library(tmp_path):
    printed, pairs = exported_and_original("stablehlo", "run_stablehlo.py", tmp_path / "out")
    assert printed.split() == ["cpu", "cuda", "tpu"]
    for found, wanted in pairs:
        assert found.dtype == np.float32 and np.abs(found - wanted).max() < LIMIT * np.abs(wanted).max()
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert about["labels"] == [f"LABEL_{i}" for i in range(5)]
    assert about["inputs"]["pixel_values"]["shape"] == ["B", 32, 48, 3]
    assert about["preprocessing"]["crop_size"] == {"height": 32, "width": 48}


@needs("jax2onnx")
def test_onnx_runs_without_this_library(tmp_path):
    _, pairs = exported_and_original("onnx", "run_onnx.py", tmp_path / "out")
    for found, wanted in pairs:
        assert found.dtype == np.float32 and np.abs(found - wanted).max() < LIMIT * np.abs(wanted).max()


@needs("openvino")
@needs("jax2onnx")
def test_openvino_runs_without_this_library(tmp_path):
    _, pairs = exported_and_original("openvino", "run_openvino.py", tmp_path / "out")
    for found, wanted in pairs:
        assert found.dtype == np.float32 and np.abs(found - wanted).max() < LIMIT * np.abs(wanted).max()
    assert {"model.xml", "model.bin", "model.json", "README.md"} <= set(os.listdir(tmp_path / "out"))


@needs("jax2onnx")
def test_onnx_graph_has_one_softmax_per_attention_and_no_shape_arithmetic():
    import onnx

    model = lf.LevitForImageClassification(lf.LevitConfig(**TINY))
    model, variables = lf.fold_batch_norm(model, random_variables(model))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        artifact = to_onnx(lambda pixels: model.apply(variables, pixels).logits, (32, 48, 3))
    operations = Counter(node.op_type for node in onnx.load_from_string(artifact).graph.node)
    attentions = sum(model.config.depths) + model.config.num_stages - 1
    assert operations["Softmax"] == attentions and operations["Conv"] == 4
    assert not operations.keys() & {"Shape", "Gather", "Concat", "Exp", "ReduceMax", "Expand", "Where", "Cast"}


@needs("jax2onnx")
def test_wrong_onnx_graphs_are_refused(monkeypatch):
    """The batch is freed by changing the graph, so the result is compared with JAX."""

    def without_softmax(layer, args, kwargs, context):
        if context.method_name == "mix":
            logits, value = args
            return jax.numpy.matmul(logits, value), logits
        return layer(*args, **kwargs)

    monkeypatch.setattr("levit_flax.onnx_export._with_plain_softmax", without_softmax)
    model = lf.LevitForImageClassification(lf.LevitConfig(**TINY))
    model, variables = lf.fold_batch_norm(model, random_variables(model))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="The ONNX graph is wrong: expected the logits of JAX for 1 images"):
            to_onnx(lambda pixels: model.apply(variables, pixels).logits, (32, 48, 3))


@needs("flatbuffers")
@pytest.mark.slow
def test_export_command_writes_and_replaces_a_directory(capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(out), "-m", "cifar10", "--platforms", "cpu"]) == 0
    assert sorted(os.listdir(out)) == ["README.md", "model.json", "model.stablehlo"]
    first = (out / "model.stablehlo").read_bytes()
    assert main(["export", str(out), "-m", "cifar10", "--platforms", "cpu"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(out), "-m", "cifar10", "--force", "--image-size", "96"]) == 0
    assert (out / "model.stablehlo").read_bytes() != first
    assert "[B 96 96 3]" in (out / "README.md").read_text()


def test_unknown_platforms_raise(capsys, tmp_path, monkeypatch):
    status = main(["export", str(tmp_path / "out"), "-m", "cifar10", "--platforms", "cpu,foo"])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "") and len(err.splitlines()) == 1
    assert "error: Unknown platforms: expected one or more of cpu, cuda, tpu, rocm, found ['foo']." in err
    monkeypatch.setattr("levit_flax.export._prepare", None)  # the check comes first
    model = lf.LevitForImageClassification(lf.LevitConfig(**TINY))
    for platforms in ((), ("cpu", "foo"), ("",)):
        with pytest.raises(ValueError, match="Unknown platforms"):
            export_model(tmp_path / "out", model, {}, lf.LevitImageProcessor(), platforms=platforms)
    assert os.listdir(tmp_path) == []


def test_missing_packages_and_unknown_formats_raise(tmp_path, monkeypatch):
    model = lf.LevitForImageClassification(lf.LevitConfig(**TINY))
    arguments = model, random_variables(model), lf.LevitImageProcessor()
    for format, package in (("stablehlo", "flatbuffers"), ("onnx", "jax2onnx"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"requires {package}, which is not installed. Run: pip install"):
            export_model(tmp_path / "out", *arguments, format=format)
    with pytest.raises(ValueError, match="Unknown format: expected one of stablehlo, onnx, openvino, found 'tflite'"):
        export_model(tmp_path / "out", *arguments, format="tflite")
    features = lf.LevitModel(model.config)
    with pytest.raises(ValueError, match="The model has no classifier"):
        export_model(tmp_path / "out", features, random_variables(features), lf.LevitImageProcessor())
    assert not (tmp_path / "out").exists()
