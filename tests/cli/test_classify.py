"""The command `levit-flax classify`: which files it reads, and how it prints the results."""

import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from levit_flax.classifier import ImageClassifier
from levit_flax.cli import main

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path)
    return str(path)


def test_hidden_files_and_other_files_are_skipped(capsys, tmp_path):
    for name in ("b.png", "a/c.png", ".hidden.png", ".cache/d.png", "a/.cache/e.png"):
        save(tmp_path / "images" / name)
    for name in ("._b.png", "Thumbs.db", "notes.pdf", "film.mpg"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    assert main(["classify", str(tmp_path / "images"), "-m", "cifar10", "--json"]) == 0
    found = [answer["file"] for answer in json.loads(capsys.readouterr().out)]
    assert found == [str(tmp_path / "images" / name) for name in ("a/c.png", "b.png")]


@pytest.mark.parametrize("name", ["empty", "nothing.jpg"])
def test_paths_without_images_end_the_command_before_the_model_is_loaded(capsys, tmp_path, monkeypatch, name):
    monkeypatch.setattr(ImageClassifier, "from_pretrained", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.png").touch()
    assert main(["classify", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: The ") and len(err.splitlines()) == 1


def test_missing_files_do_not_keep_others_from_being_classified(capsys, tmp_path):
    path = save(tmp_path / "a.png")
    assert main(["classify", str(tmp_path / "none.png"), path, "-m", "cifar10", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [answer["file"] for answer in json.loads(out)] == [path]
    assert err == f"error: The image {tmp_path / 'none.png'} does not exist.\n"


def test_results_as_csv(capsys, tmp_path):
    path = save(tmp_path / "a, b.png")
    assert main(["classify", path, "-m", "cifar10", "--csv", "--top-k", "2", "--batch-size", "1"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["file"], row["rank"]) for row in rows] == [(path, "1"), (path, "2")]
    assert float(rows[0]["score"]) > float(rows[1]["score"]) and rows[0]["label"]
    assert main(["classify", path, "-m", "cifar10", "--csv", "--json"]) == 2


def test_function_to_apply(capsys, tmp_path):
    path, scores = save(tmp_path / "a.png"), {}
    for function in ("softmax", "sigmoid", "none"):
        assert main(["classify", path, "-m", "cifar10", "--json", "--function-to-apply", function]) == 0
        [answer] = json.loads(capsys.readouterr().out)
        scores[function] = answer["predictions"][0]["score"]
    assert scores["sigmoid"] == pytest.approx(1 / (1 + np.exp(-scores["none"])), abs=1e-5)


def test_paths_from_files(capsys, tmp_path):
    paths = [save(tmp_path / f"{name}.png") for name in "abc"]
    (tmp_path / "list.txt").write_text("\n".join(paths[1:]) + "\n\n")
    assert main(["classify", paths[0], "--files-from", str(tmp_path / "list.txt"), "-m", "cifar10", "--json"]) == 0
    assert [answer["file"] for answer in json.loads(capsys.readouterr().out)] == paths
    (tmp_path / "empty.txt").write_text("\n")
    for wrong in (
        ["--files-from", str(tmp_path / "none.txt")],
        ["--files-from", str(tmp_path)],
        ["--files-from", str(tmp_path / "empty.txt")],
        ["-", "--files-from", "-"],
    ):
        capsys.readouterr()
        assert main(["classify", *wrong]) == 2
        assert "Errno" not in capsys.readouterr().err
    assert main(["classify"]) == 2


def run(*arguments, stdin=b"", **environment):
    settings = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "levit_flax", *arguments], input=stdin, capture_output=True, env=settings, check=False
    )


def test_standard_input_and_names_that_the_terminal_cannot_encode(tmp_path):
    image = save(tmp_path / "a.png")
    strange = os.fsencode(tmp_path) + b"/caf\xe9.png"
    os.rename(image, strange)
    with open(strange, "rb") as file:
        content = file.read()
    done = run(
        "classify", "-", strange, strange[:-4] + b".jpg", "-m", "cifar10", stdin=content, PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == b"-" and lines[1:6] == lines[7:12]
    assert lines[6].endswith(b"/caf\\udce9.png") and b"caf\\udce9.jpg does not exist" in done.stderr
