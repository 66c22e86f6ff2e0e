"""Images from WebDatasets: tar files in which consecutive files of the same name, up to its first dot, are a sample.

Source: https://github.com/webdataset/webdataset, "The WebDataset Format".
"""

import glob
import itertools
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .datasets import DataError, _DataOptions
from .files import _open_regular
from .image_sources import _MOST_BYTES
from .images import _image_suffixes
from .streams import LabeledStream, _reading

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_LABEL = "cls"


@dataclass(frozen=True)
class _Sample:
    """The files of a sample that are images or labels, by lower-case suffix, and the suffixes of all files."""

    key: str
    files: Mapping[str, bytes]
    suffixes: tuple[str, ...]


def _read_webdataset(source: str, options: _DataOptions) -> LabeledStream:
    """Return the images of a WebDataset with their class indices, which are those of the model."""
    shards, label = _find_shards(source), options.label_column or _LABEL
    first = _first_sample(shards, source, label)
    if label not in first.files:
        raise DataError(
            f"{source} has no labels: expected a class index in a file .{label} of each sample, found"
            f" {_listed(first)} in {first.key}. Choose one with label_column=..."
        )
    _choose_image(first, options, source)
    return LabeledStream(_Rows(shards, source, label, options), (), source)


def _read_webdataset_images(source: str, options: _DataOptions) -> Iterator[tuple[str, Any]]:
    """Return the names and the images of a WebDataset."""
    shards = _find_shards(source)
    _choose_image(_first_sample(shards, source, _LABEL), options, source)
    rows = (sample for shard in shards for sample in _read_shard(shard, _LABEL))
    return ((sample.key, _choose_image(sample, options, source)) for sample in _reading(rows, source))


@dataclass(frozen=True)
class _Rows:
    """The name, image and class index of each sample."""

    shards: Iterable[Path]
    source: str
    label: str
    options: _DataOptions

    def __iter__(self) -> Iterator[tuple[str, Any, int]]:
        samples = (sample for shard in self.shards for sample in _read_shard(shard, self.label))
        for sample in _reading(samples, self.source):
            yield sample.key, _choose_image(sample, self.options, self.source), _class_index(sample, self.label)


def _class_index(sample: _Sample, label: str) -> int:
    """Return the class index of a sample; -1 if it has none."""
    text = sample.files.get(label, b"-1")
    try:
        return int(text)
    except ValueError:
        raise DataError(
            f"The label of {sample.key} is not a class index: expected an integer in .{label}, found {text[:40]!r}."
        ) from None


def _choose_image(sample: _Sample, options: _DataOptions, source: str) -> bytes | None:
    """Return the encoded image of a sample, or None if it has none."""
    if options.image_column is not None:
        return sample.files.get(options.image_column.lower())
    images = [suffix for suffix in sample.files if _is_image(suffix)]
    if len(images) > 1:
        raise DataError(
            f"It is not clear which image to use: expected one image in each sample of {source}, found"
            f" {_listed(sample)} in {sample.key}. Choose one with image_column=..."
        )
    return sample.files[images[0]] if images else None


def _is_image(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in _image_suffixes()


def _listed(sample: _Sample) -> str:
    return ", ".join(f".{suffix}" for suffix in sample.suffixes) or "no files"


def _find_shards(source: str) -> list[Path]:
    """Return the tar files that a source names: paths, with braces and wildcards, or directories of tar files."""
    shards = []
    for pattern in _expand(source.removeprefix("wds/")):
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
        else:
            found = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(pattern) else [path]
        if not found or not all(shard.is_file() for shard in found):
            raise DataError(f"{source} names no tar files: expected some at {path}, found none.")
        shards += found
    return shards


def _expand(pattern: str) -> list[str]:
    """Return the paths that a pattern such as "train-{000..127}.tar" or "{train,test}.tar" stands for."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last, listed = match.groups()
    choices = listed.split(",") if listed else [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    start, end = pattern[: match.start()], pattern[match.end() :]
    return [path for choice in choices for path in _expand(start + choice + end)]


def _first_sample(shards: Iterable[Path], source: str, label: str) -> _Sample:
    samples = (sample for shard in shards for sample in _read_shard(shard, label))
    first: _Sample | None = next(_reading(samples, source), None)
    if first is None:
        raise DataError(f"{source} contains no images: expected at least one.")
    return first


def _read_shard(path: Path, label: str) -> Iterator[_Sample]:
    """Yield the samples of a tar file, which may be compressed."""
    with _open_regular(path) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for stem, members in itertools.groupby(_visible_files(archive), key=lambda member: _split(member.name)[0]):
            files, suffixes = {}, []
            for member in members:
                suffix = _split(member.name)[1]
                suffixes.append(suffix)
                if suffix == label or _is_image(suffix):
                    files[suffix] = _read_member(archive, member, path)
            yield _Sample(f"{path}/{stem}", files, tuple(suffixes))


def _visible_files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # would grow with every file
        if member.isfile() and not posixpath.basename(member.name).startswith("."):
            yield member


def _split(name: str) -> tuple[str, str]:
    """Return the name of a file up to the first dot, with its folder, and the lower-case rest."""
    folder, base = posixpath.split(name)
    stem, _, suffix = base.partition(".")
    return posixpath.join(folder, stem), suffix.lower()


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    if member.size > _MOST_BYTES:
        raise DataError(f"{path}/{member.name} is too large: expected at most {_MOST_BYTES // 2**20} MiB.")
    file = archive.extractfile(member)
    assert file is not None  # it is a file
    return file.read()
