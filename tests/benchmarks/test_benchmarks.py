"""The benchmark scripts run on tiny models, and their stored results are what the README reports."""

import contextlib
import importlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import levit_flax as lf
from configs import random_variables

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = 2.0
OF_THE_FILE = 2.0

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the wheel does not contain the benchmarks")


def run(script, out, *arguments, **environment):
    """Run a script as a user does and return its results."""
    command = [sys.executable, BENCHMARKS / script, *arguments, "--out", out]
    environment = {**os.environ, **environment}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def run_in_process(script, *arguments, **environment):
    """Run a script in this process under JAX's default promotion rules and return its output."""
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        for name, value in environment.items():
            patch.setenv(name, value)
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    return printed.getvalue()


@pytest.fixture
def run_quickly(monkeypatch, tmp_path):
    """Return a function like `run` that starts neither the script nor its workers in new processes.

    It takes answers of workers by name, which then do not run.
    """
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("levit_flax.memory.keep_freed_memory", lambda: True)  # would last beyond the test
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: None, raising=False)
    turns = importlib.import_module("turns")

    def run_quickly(script, *arguments, answers=()):
        def answer(script, *arguments, **environment):
            worker = arguments[arguments.index("--worker") + 1]
            if worker in answers:
                return answers[worker]
            printed = run_in_process(script, *arguments, **environment).splitlines()
            line = next(line for line in printed if line.startswith(turns.MARK))
            return json.loads(line.removeprefix(turns.MARK))

        monkeypatch.setattr(turns, "run", answer)
        run_in_process(script, *arguments, "--out", tmp_path / "out.json")
        return json.loads((tmp_path / "out.json").read_text())

    return run_quickly


def need(*modules):
    for module in modules:
        pytest.importorskip(module)


@pytest.mark.slow
def test_conversion_runs_as_a_script(tmp_path):
    result = run("conversion.py", tmp_path / "out.json", "--variants", "levit-128S", "--runs", 1, "--layout", "timm")
    row = result["variants"]["levit-128S"]
    assert row["seconds"] > 0 and row["peak_mib"] > 0 and row["file_mib"] == pytest.approx(29.9, abs=0.2)
    assert result["machine"]["jax"] and result["layout"] == "timm"


TINY = ("--variants", "tiny", "--rounds", 1, "--seconds", 0.1)
FEW = (
    "levit-flax",
    "levit-flax, highest precision",
    "levit-flax, freed memory kept",
    "transformers",
    "timm fused",
    "timm fused conv",
)


def check_peers(result, names, *batches):
    for batch in batches:
        rows = result["variants"]["tiny"]["float32"][str(batch)]
        assert rows.keys() >= set(names)
        assert rows["levit-flax"]["times_ours"]["median"] == 1 and rows["levit-flax"]["difference"] == 0
        for row in rows.values():
            assert row["difference"] < 1e-4 and row["images_per_second"] > 0
            assert row["milliseconds"]["median"] > 0 and row["first_call_seconds"]["median"] > 0


def check_plots(result, folder):
    result["variants"] = dict.fromkeys(("levit-128S", "levit-256"), result["variants"]["tiny"])
    (folder / "results.json").write_text(json.dumps(result))
    run_in_process("plot.py", "--results", folder / "results.json", "--out", folder)
    for name in ("ratios.png", "speed_accuracy.png"):
        assert (folder / name).stat().st_size > 5000


def test_latency_and_plots_of_tiny_peers(tmp_path, run_quickly):
    need("torch", "transformers", "timm")
    names = ("levit-flax", "transformers", "timm fused")
    result = run_quickly("latency.py", *TINY, "--batches", 1, 3, "--peers", *names)
    check_peers(result, names, 1, 3)
    check_plots(result, tmp_path)


def test_int8_of_a_tiny_model(run_quickly):
    need("jax2onnx", "openvino")
    rows = run_quickly("int8.py", "--variants", "tiny", "--rounds", 1)["speed"]["tiny"]
    assert rows.keys() == {"openvino", "onnxruntime"}
    assert all(row["ratio"]["median"] > 0 for runtime in rows.values() for row in runtime.values())


@pytest.mark.slow
def test_throughput_of_a_tiny_peer(run_quickly):
    need("torch", "transformers", "timm")
    names = ("levit-flax", "timm fused conv")
    check_peers(run_quickly("throughput.py", *TINY, "--batches", 3, "--peers", *names), names, 3)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["latency.py", "throughput.py"])
def test_all_peers_compute_the_same(tmp_path, monkeypatch, script):
    need("torch", "transformers", "timm")
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = list(importlib.import_module("peers").PEERS)
    result = run(script, tmp_path / "out.json", *TINY, "--batches", 1, 3, "--peers", *names)
    check_peers(result, FEW, 1, 3)
    check_plots(result, tmp_path)


@pytest.mark.slow
def test_peer_without_bfloat16_is_left_out(run_quickly):
    names = ["levit-flax", "onnxruntime"]
    result = run_quickly("latency.py", *TINY, "--batches", 2, "--dtypes", "bfloat16", "--peers", *names)
    assert result["variants"]["tiny"]["bfloat16"]["2"].keys() == {"levit-flax"}


PROTOCOL = ("original_protocol.py", "--variants", "tiny", "--seconds", 0.1, "--warm-up", 0.1)


@pytest.mark.slow
def test_original_protocol_of_a_tiny_model(run_quickly):
    need("timm")
    check_protocol(run_quickly(*PROTOCOL, "--peers", "timm fused"))


@pytest.mark.slow
def test_original_protocol_runs_as_a_script(tmp_path):
    need("timm")
    script, *arguments = PROTOCOL
    check_protocol(run(script, tmp_path / "out.json", *arguments))


def check_protocol(result):
    row = result["variants"]["tiny"]
    assert row["levit-flax"] > 0 and row["timm fused"] > 0 and row["published"] is None


def test_preprocessing_of_four_images(run_quickly):
    need("torchvision", "transformers")
    check_preprocessing(run_quickly("preprocessing.py", "--images", 4, "--rounds", 1))


@pytest.mark.slow
def test_preprocessing_runs_as_a_script(tmp_path):
    need("torchvision", "transformers")
    check_preprocessing(run("preprocessing.py", tmp_path / "out.json", "--images", 4, "--rounds", 1))


def check_preprocessing(result):
    rows = result["processors"]
    assert rows["transformers, PIL"]["values_that_differ_from_ours"] == 0
    assert rows["transformers, torchvision"]["values_that_differ_from_ours"] > 0  # another resize
    assert rows["levit-flax"]["ours_times_as_fast"]["1"]["median"] == 1


@pytest.mark.slow
def test_startup_of_a_tiny_model(run_quickly):
    need("transformers")
    check_startup(run_quickly("startup.py", "--variant", "tiny", "--rounds", 1))


@pytest.mark.slow
def test_startup_runs_as_a_script(tmp_path):
    need("transformers")
    check_startup(run("startup.py", tmp_path / "out.json", "--variant", "tiny", "--rounds", 1))


def check_startup(result):
    rows = result["seconds"]
    assert rows.keys() == {"levit-flax, compiling", "levit-flax, from the cache", "transformers"}
    for row in rows.values():
        parts = sum(row[part]["median"] for part in ("import", "load", "compile", "first answer"))
        assert row["to the first answer"]["median"] == pytest.approx(parts)


@pytest.mark.slow
def test_roofline_counts_the_operations_of_a_tiny_model(run_quickly):
    row = run_quickly("roofline.py", *TINY, "--batches", 2)["variants"]["tiny"]["2"]
    assert 0 < row["of_the_machine"]["median"] < 1 and sum(row["time_by_part"].values()) == pytest.approx(1)
    assert row["time_by_part"].keys() >= {"stem", "linear layers", "attention products, softmax"}
    # By hand: four 3x3 convolutions, a block on a grid of 2x2, and twice a downsampling and a block on one token.
    multiplications = 16 * 16 * 2 * 27 + 8 * 8 * 4 * 18 + 4 * 4 * 8 * 36 + 2 * 2 * 16 * 72
    for queries, keys, width, heads, ratio, result in (
        (4, 4, 16, 1, 2, 16),
        (1, 4, 16, 2, 4, 32),
        (1, 1, 32, 2, 2, 32),
        (1, 1, 32, 4, 4, 48),
        (1, 1, 48, 3, 2, 48),
    ):
        multiplications += queries * width * heads * 8 + keys * width * heads * 8 * (1 + ratio)  # q; k and v
        multiplications += heads * queries * keys * 8 * (1 + ratio)  # both products of the attention
        multiplications += queries * heads * 8 * ratio * result + 4 * queries * result**2  # projection, MLP
    multiplications += 48 * 4  # one head
    assert row["operations"] == 2 * 2 * multiplications  # a batch of two, and an addition each


TRAINING = ("training.py", "--variants", "tiny", "--batch", 8, "--steps", 2, "--rounds", 1, "--images", 24)


@pytest.mark.slow
def test_training_compares_the_steps_of_both_sides(run_quickly):
    need("torch", "grain", "orbax.checkpoint", "tensorboardX")
    data = {"share_waiting_for_data": 0.5, "ceiling_images_per_second": {"1 threads, 0 processes": 7.0}}
    steps = {
        name: {"seconds": [seconds], "losses": [1.6, loss], "compile_seconds": 9.0}
        for name, seconds, loss in (("levit-flax", 1.0, 1.5), ("transformers", 3.0, 1.5001))
    }
    result = run_quickly(*TRAINING, answers={"data": data, **steps})
    assert result["models"]["tiny"]["times_as_fast"]["median"] == 3 and result["machine"]["torch"]
    assert result["data"] == {"variant": "tiny", **data}


@pytest.mark.slow
def test_training_runs_as_a_script(tmp_path):
    need("grain", "orbax.checkpoint", "tensorboardX", "torch", "transformers")
    script, *arguments = TRAINING
    result = run(script, tmp_path / "out.json", *arguments)
    assert result["models"]["tiny"]["times_as_fast"]["median"] > 0 and result["machine"]["torch"]
    assert 0 <= result["data"]["share_waiting_for_data"] < 1 and result["data"]["ceiling_images_per_second"]


def test_training_memory_of_a_tiny_model(run_quickly):
    need("grain", "orbax.checkpoint", "tensorboardX")
    rows = run_quickly("training_memory.py", "--variants", "tiny", "--batches", 4)["variants"]["tiny"]["float32"]["4"]
    assert rows["stored"]["argument_mib"] == rows["remat"]["argument_mib"]  # the same weights and images
    assert rows["ratio"]["operations"] > 1.05  # the forward pass of the blocks runs twice
    assert rows["remat"]["intermediate_mib"] > 0


QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # compiling takes most of the time


@pytest.fixture
def data(tmp_path):
    """Write noise: 13 training images for every class of the embedded model, and a test image for eight of them."""
    names = lf.from_pretrained("cifar10")[0].config.id2label
    generator = np.random.default_rng(0)
    for part, count in (("train", 13), ("test", 1)):
        for name in names if part == "train" else names[:8]:  # a single batch of a power of two
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data", names


@pytest.fixture
def tiny_model(data, monkeypatch, tmp_path):
    """Write a tiny model with the classes of the embedded one."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    fields = {**importlib.import_module("peers").TINY, "num_labels": 10, "id2label": data[1]}
    model = lf.LevitForImageClassification(lf.LevitConfig(**fields))
    lf.save_pretrained(tmp_path / "tiny", model, random_variables(model))
    return tmp_path / "tiny"


def check_accuracy(result):
    own = result["image_size"]
    assert result["images"] == 8 and list(result["image_sizes"]) == [str(round(own * k)) for k in (0.75, 1, 1.25)]
    assert result["image_sizes"][str(own)]["top1"] == result["types"]["float32"]["top1"]
    assert result["types"]["float32"]["agreement_with_float32"] == 1


@pytest.mark.slow
def test_accuracy_of_a_tiny_model(data, tiny_model, monkeypatch, run_quickly):
    need("grain", "orbax.checkpoint", "tensorboardX")
    load = lf.ImageClassifier.from_pretrained
    monkeypatch.setattr(lf.ImageClassifier, "from_pretrained", lambda name, **options: load(tiny_model, **options))
    check_accuracy(run_quickly("accuracy.py", data[0], "--epochs", 0))


@pytest.mark.slow
def test_accuracy_runs_as_a_script(data, tmp_path):
    need("grain", "orbax.checkpoint", "tensorboardX")
    check_accuracy(run("accuracy.py", tmp_path / "out.json", data[0], "--epochs", 0, **QUICK))


def check_distillation(result, training_images):
    assert result["training_images"] == training_images and {len(found) for found in result["top1"].values()} == {1}
    alone, taught = (found[0] for found in result["top1"].values())
    assert result["gain"]["median"] == pytest.approx(taught - alone)


def test_distillation_compares_with_and_without_a_teacher(data, tiny_model, monkeypatch, run_quickly):
    need("grain", "orbax.checkpoint", "tensorboardX", "matplotlib")
    calls = []

    def finetune(data, run, *, recipe, teacher, skip):
        calls.append((recipe.distillation, teacher, len(skip)))
        return {"last": {"validation_accuracy": 0.5 if teacher else 0.25}}

    monkeypatch.setattr("levit_flax.training.finetune", finetune)
    options = ("--teacher", tiny_model, "--student", "tiny", "--epochs", 1, "--share", 0.5, "--seeds", 1)
    check_distillation(run_quickly("distillation.py", data[0], *options), 65)
    assert calls == [("none", None, 65), ("hard", str(tiny_model), 65)]


@pytest.mark.slow
def test_distillation_runs_as_a_script(data, tiny_model, tmp_path):
    need("grain", "orbax.checkpoint", "tensorboardX", "matplotlib")
    for name in data[1][8:]:  # training needs the same classes in both parts
        shutil.copytree(data[0] / "train" / name, data[0] / "test" / name)
    options = ("--teacher", tiny_model, "--student", "tiny", "--epochs", 1, "--share", 1, "--seeds", 1)
    check_distillation(run("distillation.py", tmp_path / "out.json", data[0], *options, **QUICK), 130)


@pytest.mark.measurement
def test_largest_model_converts_within_the_limits_of_time_and_memory(tmp_path):
    result = run("conversion.py", tmp_path / "out.json", "--variants", "levit-384", "--runs", 3)
    row = result["variants"]["levit-384"]
    assert row["seconds"] < SECONDS and row["peak_of_file"] < OF_THE_FILE


@pytest.mark.measurement
def test_preprocessing_is_faster_than_transformers(tmp_path):
    result = run("preprocessing.py", tmp_path / "out.json")
    assert result["processors"]["transformers, PIL"]["ours_times_as_fast"]["1"]["median"] > 1.2
    assert result["two_threads_over_one"]["median"] > 1.8


RESULTS = BENCHMARKS / "results"


def test_stored_results_are_within_the_limits():
    """The README reports these."""
    accuracy, conversion = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("accuracy", "conversion"))
    own = accuracy["image_sizes"][str(accuracy["image_size"])]["top1"]
    for size, row in accuracy["image_sizes"].items():
        assert row["top1"] >= 0.75 * own
        if int(size) != accuracy["image_size"]:
            assert row["fine_tuned"]["top1"] > max(own - 0.01, row["top1"] + 0.03)
    for row in accuracy["types"].values():
        assert row["agreement_with_float32"] >= 0.99
    assert conversion["variants"]["levit-384"]["seconds"] < SECONDS
    memory = json.loads((RESULTS / "training_memory.json").read_text())
    assert memory["variants"]["levit-256"]["float32"]["128"]["ratio"]["intermediate_mib"] < 0.5
