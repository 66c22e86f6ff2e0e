"""The command line prints results to stdout and errors to stderr, and never leaves partial output."""

import json
import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import levit_flax as lf
from configs import SMALL, random_variables
from hub_server import HubServer, run_with_hub
from levit_flax import convert, demo
from levit_flax.cli import main
from levit_flax.convert import verification
from levit_flax.hub import _EMBEDDED_DIRECTORY

HELP_SECONDS = 0.5
COLD_CLASSIFY_SECONDS = 5.0
PARAMETERS = 77_730  # of the small config of these tests, with two heads


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def torch_directory(tmp_path):
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL))
    directory = tmp_path / "torch"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))
    convert.save_torch(directory / "model.safetensors", model, random_variables(model))
    return directory


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def processor_time():
    """Return the processor time of the finished child processes, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def quickest(*arguments, runs=3, clock=time.perf_counter):
    """Return the least of several times in seconds, which other work on the machine disturbed least."""
    seconds = []
    for _ in range(runs):
        start = clock()
        subprocess.run([sys.executable, "-m", "levit_flax", *map(str, arguments)], check=True, capture_output=True)
        seconds.append(clock() - start)
    return min(seconds)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, cache):
    """Give these tests, and the processes that they start, a cache that only they share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)


def test_help_is_quick():
    # Processor time, because other tests keep the cores busy.
    assert quickest("--help", clock=processor_time) < HELP_SECONDS


@pytest.mark.parametrize("switch", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_compilation_cache_is_kept_unless_disabled(image, tmp_path, monkeypatch, switch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", switch)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # they take long and change nothing here
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quickest("classify", "--model", "cifar10", image, runs=1)
    kept = list((tmp_path / "cache" / "levit-flax" / "compiled").glob("*-cache"))
    assert bool(kept) == (switch == "true")


@pytest.mark.measurement
def test_first_classification_is_quick(image):
    assert quickest("classify", "--model", "cifar10", image) < COLD_CLASSIFY_SECONDS


def test_converted_model_classifies(capsys, torch_directory, image, tmp_path):
    out_directory = tmp_path / "out"
    status, out, _ = run(capsys, "convert", torch_directory, out_directory, "--no-verify", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["checkpoint"]["layout"] == "hf"
    assert report["checkpoint"]["mapped"].keys() == convert.to_torch(*lf.from_pretrained(out_directory)).keys()
    assert report["model"]["class"] == "LevitForImageClassificationWithTeacher"
    assert report["model"]["parameters"] == PARAMETERS
    assert report["proof"]["round trip"]["passed"] and report["proof"]["PyTorch"]["passed"] is None
    provenance = json.loads((out_directory / "config.json").read_text())["levit_flax"]["provenance"]
    assert provenance["source"] == str(torch_directory) and len(provenance["files"]["model.safetensors"]) == 64

    status, out, _ = run(capsys, "classify", "--model", out_directory, image, "--json", "--top-k", 2)
    [answer] = json.loads(out)
    assert status == 0 and answer["file"] == str(image) and len(answer["predictions"]) == 2

    status, out, _ = run(capsys, "info", out_directory)
    assert status == 0 and f"{PARAMETERS}" in out


def test_convert_verifies_against_transformers(capsys, torch_directory, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    status, out, _ = run(capsys, "convert", torch_directory, tmp_path / "out", "--json")
    compared = json.loads(out)["proof"]["PyTorch"]
    assert status == 0 and compared["passed"] and 0 < compared["relative"] < 1e-5

    by_block = verification._forward_by_block

    def forward_wrongly(*arguments):
        blocks, logits = by_block(*arguments)
        return blocks, logits * 1.001

    monkeypatch.setattr(verification, "_forward_by_block", forward_wrongly)
    status, out, err = run(capsys, "convert", torch_directory, tmp_path / "wrong")
    assert status == 1 and out == "" and not (tmp_path / "wrong").exists()
    assert "Verification failed, so nothing was written. PyTorch: logits differ from transformers" in err


@pytest.mark.slow
def test_info_lists_the_variants(capsys):
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0 and json.loads(out)["levit-384"]["parameters"] == 39_128_836


def test_broken_image_among_good_ones_is_reported(capsys, image, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"")
    (folder / "b.txt").write_text("not looked at")
    image.rename(folder / "deeper" / "c.png")
    status, out, err = run(capsys, "classify", "-m", "cifar10", folder, tmp_path / "none.jpg")
    assert status == 1
    assert "c.png" in out and "a.jpg" not in out
    lines = err.splitlines()
    assert len(lines) == 2 and "a.jpg" in err and "none.jpg" in err and all(s.startswith("error: ") for s in lines)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def damaged_weights(kind, directory, whole):
    """Write a damaged weight file; return its path and a part of the expected error."""
    path = directory / "model.safetensors"
    if kind == "empty":
        path.write_bytes(b"")
        return path, "is empty"
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
        return path, "is truncated or not a safetensors file"
    if kind == "resnet":
        save_file({"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}, path)
        return path, "does not contain a LeViT"
    if kind == "code":
        path = directory / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"weight": Evil()}))
            archive.writestr("archive/version", "3")
        return path, "system"
    return directory / "nothing.pth", "nothing.pth does not exist: expected a weight file"


@pytest.mark.parametrize("kind", ["empty", "truncated", "resnet", "code", "missing"])
def test_bad_weights_are_one_line_of_error(capsys, kind, torch_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (torch_directory / "model.safetensors").read_bytes()
    bad = tmp_path / "bad"
    bad.mkdir()
    path, message = damaged_weights(kind, bad, whole)
    status, out, err = run(capsys, "convert", path, tmp_path / "out")
    assert (status, out) == (2 if kind == "missing" else 1, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and message in err and str(path) in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil-was-here").exists()


def bad_image(kind, path):
    if kind == "text":
        path.write_text("This is no image.")
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "bomb":
        Image.new("1", (14_000, 14_000)).save(path, "PNG")


@pytest.mark.parametrize("kind", ["text", "zero bytes", "bomb", "missing"])
def test_bad_images_are_one_line_of_error(capsys, kind, tmp_path):
    path = tmp_path / "image.jpg"
    bad_image(kind, path)
    status, out, err = run(capsys, "classify", "--model", "cifar10", path, "--json")
    assert (status, out.split()) == ((2, []) if kind == "missing" else (1, ["[]"]))
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and str(path) in err
    assert ("--max-image-pixels" in err) == (kind == "bomb")


def test_bad_outputs_are_one_line_of_error(capsys, torch_directory, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, "convert", torch_directory, tmp_path / "file" / "out", "--no-verify")
    assert status == 1 and "Cannot write" in err and len(err.splitlines()) == 1
    status, _, err = run(capsys, "convert", torch_directory, torch_directory, "--no-verify")
    assert status == 1 and "is not empty" in err and len(err.splitlines()) == 1
    assert sorted(os.listdir(torch_directory)) == ["config.json", "model.safetensors"]
    assert run(capsys, "convert", torch_directory, torch_directory, "--no-verify", "--force")[0] == 0
    assert "flax_model.safetensors" in os.listdir(torch_directory)


@pytest.mark.parametrize("options", [[], ["--to=hf"]])
def test_full_disk_is_one_line_of_error(capsys, torch_directory, tmp_path, options):
    source = torch_directory
    if options:
        source = tmp_path / "own"
        lf.save_pretrained(source, *lf.from_pretrained(torch_directory))
    (tmp_path / "disk").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        status, out, err = run(capsys, "convert", source, tmp_path / "disk" / "out", "--no-verify", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, out) == (1, "")
    assert err.startswith("error: Cannot write ") and len(err.splitlines()) == 1
    assert str(tmp_path / "disk") in err and os.listdir(tmp_path / "disk") == []


def test_converted_hub_repository_is_pinned_to_a_revision(torch_directory, tmp_path):
    with HubServer() as hub:
        files = {path.name: path.read_bytes() for path in torch_directory.iterdir()}
        revision = hub.add("facebook/levit-tiny", files)
        run_with_hub(hub, tmp_path, "convert", "facebook/levit-tiny", "out", "--no-verify")
    provenance = json.loads((tmp_path / "out" / "config.json").read_text())["levit_flax"]["provenance"]
    assert (provenance["source"], provenance["revision"]) == ("facebook/levit-tiny", revision)
    assert lf.from_pretrained(tmp_path / "out")[0].config == lf.LevitConfig(**SMALL)


@pytest.mark.slow
def test_missing_network_is_one_line_of_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "levit_flax", "convert", "facebook/levit-128S", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and "the network" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [("convert",), ("fly",), ("convert", "a", "b", "--image-size", "big"), ("classify", "x", "--top-k", "0")],
)
def test_wrong_calls_exit_with_2(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and "Usage" in err


def test_demo_shows_proof_and_predictions(capsys, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(demo, "_SPEED_SECONDS", 0.1)
    status, out, _ = run(capsys, "demo")
    assert status == 0
    assert str(_EMBEDDED_DIRECTORY) in out and "250 tensors mapped" in out
    assert "largest difference" in out and "chelsea" in out and "images/s" in out
