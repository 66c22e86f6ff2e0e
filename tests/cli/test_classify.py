"""Which files `levit-flax classify` reads in a directory."""

import json

import numpy as np
from PIL import Image

from levit_flax.cli import main


def test_hidden_files_and_folders_are_skipped(capsys, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for name in ("b.png", "a/c.png", ".hidden.png", ".cache/d.png", "a/.cache/e.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    assert main(["classify", str(tmp_path / "images"), "-m", "cifar10", "--json"]) == 0
    found = [answer["file"] for answer in json.loads(capsys.readouterr().out)]
    assert found == [str(tmp_path / "images" / name) for name in ("a/c.png", "b.png")]


def test_directory_with_hidden_images_only_is_an_error(capsys, tmp_path):
    (tmp_path / ".hidden.png").touch()
    assert main(["classify", str(tmp_path), "-m", "cifar10", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == [] and err == f"error: The directory {tmp_path} contains no images.\n"
