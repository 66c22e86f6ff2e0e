"""Read labeled images from a source of any kind: a directory, a dataset by its name, or a sequence."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .configuration import _SINGLE_LABEL
from .datasets import (
    _ANY_DATA,
    _TRAIN,
    _VALIDATION,
    DataError,
    LabeledImages,
    _check_classes,
    _DataOptions,
    _read_folder,
    _read_named_parts,
)
from .hugging_face import (
    _read_dataset_images,
    _read_dataset_part,
    _read_dataset_parts,
    _read_split,
    _stream_split,
)
from .sequences import _read_sequence
from .streams import LabeledStream
from .tfds import _read_tfds_images, _read_tfds_part, _read_tfds_parts
from .webdataset import _read_webdataset, _read_webdataset_images

# The kinds of sources, and the fields of `_DataOptions` that apply to each.
_COLUMNS = {"image_column", "label_column"}
_OPTIONS = {
    "folder": {"split"},
    "hfds": {"split", "revision", *_COLUMNS},
    "hfids": {"split", "revision", *_COLUMNS},
    "tfds": {"split", *_COLUMNS},
    "wds": _COLUMNS,
    "mapping": {"split", *_COLUMNS},
    "dataset": _COLUMNS,
    "sequence": set(),
}
_SCHEMES = ("hfds", "hfids", "tfds", "wds")
_STREAMS = ("hfids", "wds")  # have no random access


def _kind_of(source: Any, options: _DataOptions) -> str:
    """Return the kind of a source, one of `_OPTIONS`; raise DataError if an option does not apply to it."""
    if isinstance(source, str | Path):
        kind = _kind_of_name(source)
    elif isinstance(source, Mapping):
        kind = "mapping"
    else:
        kind = "dataset" if hasattr(source, "cast_column") else "sequence"
    for option in ("split", "revision", "image_column", "label_column"):
        if getattr(options, option) is not None and option not in _OPTIONS[kind]:
            argument = "data_revision" if option == "revision" else option
            raise DataError(
                f"{_root_of(source)} has no {option.replace('_', ' ')} to choose: expected no {argument}=..."
            )
    return kind


def _kind_of_name(source: str | Path) -> str:
    """Return the kind of a source that is named."""
    text = str(source)
    kind, slash, name = text.partition("/")
    if "://" in text:
        raise DataError(
            f"The scheme of {text} is not known: expected a directory, NAME, or NAME after"
            f" {', '.join(f'{scheme}/' for scheme in _SCHEMES)}, found {text.partition('://')[0]}://."
        )
    if isinstance(source, Path) or not slash or kind not in _SCHEMES:
        return "folder" if Path(source).expanduser().is_dir() else "hfds"
    if not name:
        raise DataError(f"{text} names no dataset: expected {text}NAME.")
    return kind


def _root_of(source: Any) -> Path:
    """Return the directory that the paths in a skip list are relative to; another source has a name for messages."""
    return Path(source).expanduser() if isinstance(source, str | Path) else Path("the data")


def _read_part(source: Any, options: _DataOptions) -> LabeledImages | LabeledStream:
    """Return the images of a source for evaluation, with the class names of the data; none if it does not name them."""
    kind, split = _kind_of(source, options), options.split or "test"
    if kind == "folder":
        return _read_folder(_folder(source, options.split), allow_empty=True)
    if kind == "hfds":
        return _read_dataset_part(str(source), split, options)
    if kind == "hfids":
        return _stream_split(source, split, options)
    if kind == "tfds":
        return _read_tfds_part(source, split, options)
    if kind == "wds":
        return _read_webdataset(source, options)
    if kind == "mapping":
        if split not in source:
            raise DataError(f"The data has the splits {', '.join(source)}: expected one named {split}.")
        return _read_objects(source[split], split, f"the data, {split}", options)
    return _read_objects(source, split, "the data", options)


def _is_dataset(source: str) -> bool:
    """Return whether a string names a dataset by its scheme."""
    scheme, slash, _ = source.partition("/")
    return bool(slash) and scheme in _SCHEMES


def _read_images(source: str, options: _DataOptions) -> Iterator[tuple[str, Any]]:
    """Return the names and the images of a dataset, which need no labels."""
    kind, split = _kind_of(source, options), options.split or "test"
    if kind == "wds":
        return _read_webdataset_images(source, options)
    if kind == "tfds":
        rows = _read_tfds_images(source, split, options)
    else:
        rows = _read_dataset_images(source, split, options, streaming=kind in _STREAMS)
    return ((f"{source}/{key}", image) for key, image in rows)


def _read_parts(source: Any, options: _DataOptions = _ANY_DATA) -> dict[str, LabeledImages]:
    """Return the images to train on, under the name "train", and those to validate on if there is such a part."""
    kind = _kind_of(source, options)
    if kind in _STREAMS:
        raise DataError(
            f"{source} is read in order and cannot be shuffled: expected data with random access for training, such as"
            " hfds/NAME or tfds/NAME."
        )
    if kind == "folder":
        parts = _read_folders(_folder(source), options.split)
    elif kind in _SCHEMES:
        parts = (_read_tfds_parts if kind == "tfds" else _read_dataset_parts)(str(source), options)
    elif kind == "mapping":

        def read(split: str) -> LabeledImages:
            return _read_objects(source[split], split, f"the data, {split}", options)

        parts = _read_named_parts("the data", source, read, options)
    else:
        parts = {_TRAIN: _read_objects(source, _TRAIN, "the data", options)}
    return _with_names(parts)


def _read_objects(data: Any, split: str, where: str, options: _DataOptions) -> LabeledImages:
    """Return the images of a Hugging Face dataset, of `LabeledImages`, or of a sequence of pairs."""
    if hasattr(data, "cast_column"):
        return _read_split(data, "the data", split, options=options)
    return _read_sequence(data, split, where)


def _with_names(parts: dict[str, LabeledImages]) -> dict[str, LabeledImages]:
    """Return parts whose classes have names: those of another part, or else their numbers."""
    unnamed = {name: part for name, part in parts.items() if part.problem_type == _SINGLE_LABEL and not part.labels}
    highest = max((int(part.targets.max(initial=-1)) for part in unnamed.values()), default=-1)
    labels = next((part.labels for part in parts.values() if part.labels), tuple(map(str, range(highest + 1))))
    for name, part in unnamed.items():
        _check_classes(part.targets, labels, part.where)
        parts[name] = replace(part, labels=labels)
    return parts


def _read_folders(directory: Path, split: str | None = None) -> dict[str, LabeledImages]:
    """Like `_read_parts`, for a directory."""
    if split is None and not (directory / _TRAIN).is_dir():
        return {_TRAIN: _read_folder(directory)}
    parts = {_TRAIN: _read_folder(_folder(directory, split or _TRAIN))}
    other = next((name for name in _VALIDATION if (directory / name).is_dir() and name != split), None)
    if other:
        parts[other] = _read_folder(directory / other)
    return parts


def _folder(source: str | Path, split: str | None = None) -> Path:
    """Return a directory, or the folder of a split in it."""
    directory = Path(source).expanduser()
    if split is None:
        return directory
    if not (directory / split).is_dir():
        folders = ", ".join(sorted(path.name for path in directory.iterdir() if path.is_dir())) or "none"
        raise DataError(f"{directory} has the folders {folders}: expected one named {split}. Change split=...")
    return directory / split
