"""Folders of images: links, hidden files, and files that are not images."""

import pytest
from PIL import Image

from levit_flax.datasets import _image_files


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def names(directory):
    return [path.relative_to(directory).as_posix() for path in _image_files(directory)]


def test_links_are_followed_and_loops_end(tmp_path):
    write(tmp_path / "elsewhere" / "2.png")
    write(tmp_path / "data" / "1.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert names(tmp_path / "data") == ["1.png", "linked/2.png"]


def test_folder_of_a_mac_has_one_image(tmp_path):
    write(tmp_path / "cat.jpg")
    write(tmp_path / ".hidden" / "cat.jpg")
    (tmp_path / "._cat.jpg").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    for name in ("notes.pdf", "film.mpg", "Thumbs.db", "data.h5"):
        (tmp_path / name).write_bytes(b"%PDF-1.4\n")
    assert names(tmp_path) == ["cat.jpg"]


def test_images_of_formats_that_cannot_be_decoded_are_counted(tmp_path):
    write(tmp_path / "1.png")
    for name in ("2.heic", "3.HEIC", "4.svg"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"^3 images in .* are skipped, .*: 2 \.heic, 1 \.svg\. Convert them"):
        assert names(tmp_path) == ["1.png"]
