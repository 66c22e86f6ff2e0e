"""The benchmark scripts run; what they promise is measured where there is time for it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import levit_flax as lf
from configs import random_variables

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = 2.0
OF_THE_FILE = 2.0

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks do not come with the wheel")


def run(script, out, *arguments, **environment):
    command = [sys.executable, BENCHMARKS / script, *arguments, "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_conversion_at_small_size(tmp_path):
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


def peers():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("peers")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("script", "all_peers"),
    [
        ("latency.py", False),
        ("throughput.py", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("latency.py", "throughput.py")),
    ],
)
def test_peers_compute_the_same_at_tiny_size(tmp_path, script, all_peers):
    for module in ("torch", "transformers", "timm"):
        pytest.importorskip(module)
    names = list(peers().PEERS) if all_peers else FEW
    result = run(script, tmp_path / "out.json", *TINY, "--batches", 1, 3, "--peers", *names)
    for batch in ("1", "3"):
        rows = result["variants"]["tiny"]["float32"][batch]
        assert rows.keys() >= set(FEW)
        assert rows["levit-flax"]["times_ours"]["median"] == 1 and rows["levit-flax"]["difference"] == 0
        for row in rows.values():
            assert row["difference"] < 1e-4 and row["images_per_second"] > 0
            assert row["milliseconds"]["median"] > 0 and row["first_call_seconds"]["median"] > 0
    result["variants"] = dict.fromkeys(("levit-128S", "levit-256"), result["variants"]["tiny"])
    (tmp_path / "out.json").write_text(json.dumps(result))
    subprocess.run(
        [sys.executable, BENCHMARKS / "plot.py", "--results", tmp_path / "out.json", "--out", tmp_path], check=True
    )
    for name in ("ratios.png", "speed_accuracy.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_bfloat16_and_what_is_missing_at_tiny_size(tmp_path):
    names = ["levit-flax", "onnxruntime"]
    result = run("latency.py", tmp_path / "out.json", *TINY, "--batches", 2, "--dtypes", "bfloat16", "--peers", *names)
    assert result["variants"]["tiny"]["bfloat16"]["2"].keys() == {"levit-flax"}


def test_the_original_protocol_at_tiny_size(tmp_path):
    pytest.importorskip("timm")
    seconds = ("--seconds", 0.1, "--warm-up", 0.1)
    result = run("original_protocol.py", tmp_path / "out.json", "--variants", "tiny", *seconds)
    row = result["variants"]["tiny"]
    assert row["levit-flax"] > 0 and row["timm fused"] > 0 and row["published"] is None


def test_preprocessing_at_tiny_size(tmp_path):
    pytest.importorskip("torchvision")
    result = run("preprocessing.py", tmp_path / "out.json", "--images", 4, "--rounds", 1)
    rows = result["processors"]
    assert rows["transformers, PIL"]["values_that_differ_from_ours"] == 0
    assert rows["transformers, torchvision"]["values_that_differ_from_ours"] > 0  # it resizes otherwise
    assert rows["levit-flax"]["ours_times_as_fast"]["1"]["median"] == 1


def test_startup_at_tiny_size(tmp_path):
    pytest.importorskip("transformers")
    rows = run("startup.py", tmp_path / "out.json", "--variant", "tiny", "--rounds", 1)["seconds"]
    assert rows.keys() == {"levit-flax, compiling", "levit-flax, from the cache", "transformers"}
    for row in rows.values():
        parts = sum(row[part]["median"] for part in ("import", "load", "compile", "first answer"))
        assert row["to the first answer"]["median"] == pytest.approx(parts)


def test_the_roofline_at_tiny_size(tmp_path):
    row = run("roofline.py", tmp_path / "out.json", *TINY, "--batches", 2)["variants"]["tiny"]["2"]
    assert 0 < row["of_the_machine"]["median"] < 1 and sum(row["time_by_part"].values()) == pytest.approx(1)
    assert row["time_by_part"].keys() >= {"stem", "linear layers", "attention products, softmax"}
    # By hand: four convolutions of 3x3; a block on a grid of 2x2; and twice a downsampling and a block on one token.
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
    assert row["operations"] == 2 * 2 * multiplications  # a batch of two; each with its addition


def test_training_at_tiny_size(tmp_path):
    for module in ("grain", "orbax.checkpoint", "tensorboardX", "torch", "transformers"):
        pytest.importorskip(module)
    options = {"--variants": "tiny", "--batch": 8, "--steps": 2, "--rounds": 1, "--images": 24}
    result = run("training.py", tmp_path / "out.json", *(part for option in options.items() for part in option))
    assert result["models"]["tiny"]["times_as_fast"]["median"] > 0 and result["machine"]["torch"]
    assert 0 <= result["data"]["share_waiting_for_data"] < 1 and result["data"]["ceiling_images_per_second"]


QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # to compile, which is most of the time here


@pytest.fixture
def data(tmp_path):
    """Enough noise of every class that the embedded model knows for one batch, and some to test with."""
    names = lf.from_pretrained("cifar10")[0].config.id2label
    generator = np.random.default_rng(0)
    for part, count in (("train", 13), ("test", 1)):
        for name in names:
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data", names


def test_accuracy_at_small_size(data, tmp_path):
    pytest.importorskip("grain")
    result = run("accuracy.py", tmp_path / "out.json", data[0], "--epochs", 0, **QUICK)
    own = result["image_size"]
    assert result["images"] == 10 and list(result["image_sizes"]) == [str(round(own * k)) for k in (0.75, 1, 1.25)]
    assert result["image_sizes"][str(own)]["top1"] == result["types"]["float32"]["top1"]
    assert result["types"]["float32"]["agreement_with_float32"] == 1


def test_distillation_at_tiny_size(data, tmp_path):
    for module in ("grain", "orbax.checkpoint", "tensorboardX", "matplotlib"):
        pytest.importorskip(module)
    folder, names = data
    teacher = lf.LevitForImageClassification(lf.LevitConfig(**{**peers().TINY, "num_labels": 10, "id2label": names}))
    lf.save_pretrained(tmp_path / "teacher", teacher, random_variables(teacher))
    options = ("--teacher", tmp_path / "teacher", "--student", "tiny", "--epochs", 1, "--share", 1, "--seeds", 1)
    result = run("distillation.py", tmp_path / "out.json", folder, *options, **QUICK)
    assert result["training_images"] == 130 and {len(found) for found in result["top1"].values()} == {1}
    alone, taught = (found[0] for found in result["top1"].values())
    assert result["gain"]["median"] == pytest.approx(taught - alone)


@pytest.mark.measurement
def test_the_largest_model_converts_in_two_seconds_and_twice_its_size(tmp_path):
    result = run("conversion.py", tmp_path / "out.json", "--variants", "levit-384", "--runs", 3)
    row = result["variants"]["levit-384"]
    assert row["seconds"] < SECONDS and row["peak_of_file"] < OF_THE_FILE


@pytest.mark.measurement
def test_images_are_ready_sooner_than_by_transformers(tmp_path):
    result = run("preprocessing.py", tmp_path / "out.json")
    assert result["processors"]["transformers, PIL"]["ours_times_as_fast"]["1"]["median"] > 1.2
    assert result["two_threads_over_one"]["median"] > 1.8


RESULTS = BENCHMARKS / "results"


def test_what_the_stored_results_promise():
    """The README speaks of these."""
    accuracy, conversion = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("accuracy", "conversion"))
    own = accuracy["image_sizes"][str(accuracy["image_size"])]["top1"]
    for size, row in accuracy["image_sizes"].items():
        assert row["top1"] >= 0.75 * own
        if int(size) != accuracy["image_size"]:
            assert row["fine_tuned"]["top1"] > max(own - 0.01, row["top1"] + 0.03)
    for row in accuracy["types"].values():
        assert row["agreement_with_float32"] >= 0.99
    assert conversion["variants"]["levit-384"]["seconds"] < SECONDS
