"""Read labeled images from a source of any kind: a directory, or a dataset by its name."""

from pathlib import Path

from .datasets import _ANY_DATA, _TRAIN, _VALIDATION, DataError, LabeledImages, _DataOptions, _read_folder
from .hugging_face import _read_dataset_part, _read_dataset_parts
from .tfds import _read_tfds_part, _read_tfds_parts

# The kinds of sources, and the fields of `_DataOptions` that apply to each.
_COLUMNS = {"image_column", "label_column"}
_OPTIONS = {
    "folder": {"split"},
    "hfds": {"split", "revision", *_COLUMNS},
    "tfds": {"split", *_COLUMNS},
}
_SCHEMES = _OPTIONS.keys() - {"folder"}


def _kind_of(source: str | Path, options: _DataOptions) -> str:
    """Return the kind of a source, one of `_OPTIONS`; raise DataError if an option does not apply to it."""
    text = str(source)
    kind, slash, name = text.partition("/")
    if "://" in text:
        raise DataError(
            f"The scheme of {text} is not known: expected a directory, hfds/NAME, tfds/NAME or NAME, found"
            f" {text.partition('://')[0]}://."
        )
    if isinstance(source, Path) or not slash or kind not in _SCHEMES:
        kind = "folder" if Path(source).expanduser().is_dir() else "hfds"
    elif not name:
        raise DataError(f"{text} names no dataset: expected {text}NAME.")
    for option in ("split", "revision", "image_column", "label_column"):
        if getattr(options, option) is not None and option not in _OPTIONS[kind]:
            argument = "data_revision" if option == "revision" else option
            raise DataError(f"{text} has no {option.replace('_', ' ')} to choose: expected no {argument}=...")
    return kind


def _read_part(source: str | Path, options: _DataOptions) -> LabeledImages:
    """Return the images of a source for evaluation, with the class names of the data."""
    kind = _kind_of(source, options)
    if kind == "folder":
        return _read_folder(_folder(source, options.split), allow_empty=True)
    read = _read_tfds_part if kind == "tfds" else _read_dataset_part
    return read(str(source), options.split or "test", options)


def _read_parts(source: str | Path, options: _DataOptions = _ANY_DATA) -> dict[str, LabeledImages]:
    """Return the images to train on, under the name "train", and those to validate on if there is such a part."""
    kind = _kind_of(source, options)
    if kind == "folder":
        return _read_folders(_folder(source), options.split)
    return (_read_tfds_parts if kind == "tfds" else _read_dataset_parts)(str(source), options)


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
