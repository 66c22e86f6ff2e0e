"""Labeled images from Hugging Face datasets."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .configuration import _MULTI_LABEL, _REGRESSION, _SINGLE_LABEL
from .datasets import (
    _ANY_DATA,
    DataError,
    LabeledImages,
    _choose_image,
    _choose_target,
    _DataOptions,
    _label_rows,
    _read_named_parts,
    _reason,
    _Target,
)
from .streams import LabeledStream, _reading


@dataclass(frozen=True)
class _DatasetImages:
    """The images of a split of a Hugging Face dataset, still encoded: bytes or paths, or None if there is no image.

    `datasets` would end an iteration at the first damaged image.
    """

    dataset: Any
    column: str
    split: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _encoded(self.dataset[int(index)][self.column])

    def __iter__(self) -> Iterator[Any]:
        return (_encoded(row[self.column]) for row in self.dataset)  # prefetches, unlike access by index

    def key(self, index: int) -> str:
        """Return the name of an image in a skip list."""
        return f"{self.split}/{index}"


def _encoded(image: Mapping[str, Any] | None) -> Any:
    """Return the bytes or the path of an image that `datasets` has not decoded."""
    if image is None:
        return None
    return image["path"] if image["bytes"] is None else image["bytes"]


def _load_dataset(source: str, options: _DataOptions = _ANY_DATA, **others: Any) -> Any:
    """Load a Hugging Face dataset.

    Args:
        source: NAME or NAME:CONFIG, with or without "hfds/" or "hfids/" before it.
        options: the split to load, all if it is None, and the revision.
        others: more options of `datasets.load_dataset`.
    """
    name = source.removeprefix("hfds/").removeprefix("hfids/")
    missing = f"The directory {source} does not exist, and " if name == source else ""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{missing or f'{source} cannot be read: '}loading a Hugging Face dataset requires datasets, which is not"
            " installed. Run: pip install 'levit-flax[datasets]'"
        ) from None
    path, _, config = name.partition(":")
    given = {"name": config or None, "split": options.split, "revision": options.revision, **others}
    try:
        return datasets.load_dataset(path, **{key: value for key, value in given.items() if value is not None})
    except (FileNotFoundError, ConnectionError) as error:
        start = f"{missing}there is" if missing else "There is"
        raise FileNotFoundError(
            f"{start} no Hugging Face dataset {name}, or it cannot be loaded: {_reason(error)}."
        ) from error
    except Exception as error:  # the builder of a dataset may raise any exception
        raise DataError(f"The Hugging Face dataset {name} cannot be loaded: {_reason(error)}.") from error


def _read_dataset_part(source: str, split: str, options: _DataOptions) -> LabeledImages:
    """Return the images of one split of a Hugging Face dataset for evaluation."""
    options = replace(options, split=split)
    return _read_split(_load_dataset(source, options), source, split, (_SINGLE_LABEL,), options)


def _read_dataset_parts(source: str, options: _DataOptions) -> dict[str, LabeledImages]:
    """Return the images of a Hugging Face dataset for training, as `_read_parts` does."""
    splits = _load_dataset(source, replace(options, split=None))

    def read(split: str) -> LabeledImages:
        known = splits[split] if split in splits else _load_dataset(source, replace(options, split=split))
        return _read_split(known, source, split, options=options)

    return _read_named_parts(source, splits, read, options)


def _read_dataset_images(source: str, split: str, options: _DataOptions, streaming: bool) -> Iterator[tuple[str, Any]]:
    """Return the names and the images of one split of a Hugging Face dataset."""
    where = f"{source}, {split}"
    loaded = _load_dataset(source, replace(options, split=split), streaming=streaming or None)
    dataset, image = _with_encoded_images(loaded, where, options)
    return ((f"{split}/{i}", _encoded(row[image])) for i, row in enumerate(_reading(dataset, where)))


def _stream_split(source: str, split: str, options: _DataOptions) -> LabeledStream:
    """Return the images of one split of a Hugging Face dataset that is downloaded while it is read."""
    where = f"{source}, {split}"
    loaded = _load_dataset(source, replace(options, split=split), streaming=True)
    dataset, image = _with_encoded_images(loaded, where, options)
    target = _find_target(dataset.features, where, (_SINGLE_LABEL,), options)
    return LabeledStream(_DatasetRows(dataset, image, target.name, split, where), target.labels, where)


@dataclass(frozen=True)
class _DatasetRows:
    """The name, image and class index of each row of a dataset that is read in order."""

    dataset: Any
    image: str
    target: str
    split: str
    where: str

    def __iter__(self) -> Iterator[tuple[str, Any, int]]:
        for i, row in enumerate(_reading(self.dataset, self.where)):
            target = row[self.target]
            yield f"{self.split}/{i}", _encoded(row[self.image]), -1 if target is None else target


def _read_split(
    dataset: Any,
    name: str,
    split: str,
    problem_types: Collection[str] | None = None,
    options: _DataOptions = _ANY_DATA,
) -> LabeledImages:
    """Return the images and targets of one split of a Hugging Face dataset, decoded on access.

    The targets have one of the accepted `problem_types`; None accepts all.
    """
    where = f"{name}, {split}"
    target = _find_target(dataset.features, where, problem_types, options)
    encoded, image = _with_encoded_images(dataset, where, options)
    return _label_rows(_DatasetImages(encoded, image, split), dataset[target.name][:], target, where)


def _with_encoded_images(dataset: Any, where: str, options: _DataOptions) -> tuple[Any, str]:
    """Return a dataset that does not decode its images, and the name of their column."""
    import datasets

    if dataset.features is None:  # of files whose first rows have not been read yet
        [dataset] = _reading(map(_resolve_features, [dataset]), where)
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    image = _choose_image(images, dataset.features, where, options)
    return dataset.cast_column(image, datasets.Image(decode=False)), image


def _resolve_features(dataset: Any) -> Any:
    return dataset._resolve_features()


def _find_target(
    features: Mapping[str, Any], where: str, problem_types: Collection[str] | None, options: _DataOptions
) -> _Target:
    """Return the column of targets to read."""
    targets = (_as_target(name, feature, options) for name, feature in features.items())
    return _choose_target(filter(None, targets), features, where, problem_types, options)


def _as_target(name: str, feature: Any, options: _DataOptions) -> _Target | None:
    """Return a column as a column of targets, or None if its feature cannot be one."""
    import datasets

    entry = getattr(feature, "feature", None)
    dtype = str(getattr(entry or feature, "dtype", ""))
    if isinstance(feature, datasets.ClassLabel):
        return _Target(name, _SINGLE_LABEL, tuple(feature.names))
    if isinstance(entry, datasets.ClassLabel):
        return _Target(name, _MULTI_LABEL, tuple(entry.names))
    if not entry and name == options.label_column and dtype.startswith(("int", "uint")):
        return _Target(name, _SINGLE_LABEL)  # integers are classes only if they are asked for
    return _Target(name, _REGRESSION) if dtype.startswith("float") else None
