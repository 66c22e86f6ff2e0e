"""Labeled images, folders of them, and how their classes match those of a model."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .configuration import _MULTI_LABEL, _PROBLEM_TYPES, _REGRESSION, _SINGLE_LABEL
from .image_processing import LevitImageProcessor
from .image_sources import _is_encoded
from .imagenet import _imagenet_labels, _imagenet_names, _imagenet_wordnet_ids
from .images import _image_suffixes, _load_image

_LISTED = 5  # maximum number of class names in an error message

# Suffixes of images that cannot be decoded.
_OTHER_IMAGES = frozenset(".arw .cr2 .cr3 .dng .eps .exr .heic .heif .jxl .nef .psd .svg".split())

# The names of the parts of the data to train on and to validate on.
_TRAIN = "train"
_VALIDATION = ("validation", "val", "valid", "test")

# Preferred column names if several columns have the right type.
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels")

_READER = LevitImageProcessor(do_resize=False, do_center_crop=False)  # converts to RGB


@dataclass(frozen=True)
class _DataOptions:
    """The part of a dataset to read.

    Attributes:
        split: name of a split; None for the usual one.
        revision: branch, tag or commit of a dataset on the Hub; None for its main branch.
        image_column: column of the images; None chooses one by type and name.
        label_column: column of the targets; None chooses one by type and name.
    """

    split: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None


_ANY_DATA = _DataOptions()


class DataError(ValueError):
    """Raised when labeled images cannot be used.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from levit_flax.evaluation import read_data
        >>> with TemporaryDirectory() as folder:
        ...     try:
        ...         read_data(folder, labels=("cat", "dog"))
        ...     except DataError as error:
        ...         print(str(error).removeprefix(folder))
         has no folders: expected one folder of images per class.
    """


@dataclass(frozen=True)
class LabeledImages:
    """Images with their targets.

    Attributes:
        images: a list of paths, or a sequence of paths, PIL images or arrays.
        targets: class indices, int32 [N], for single-label data; 0 or 1 per class, float32 [N L], for multi-label data;
            numbers, float32 [N L], for regression.
        labels: the names of the L classes; empty for regression.
        where: name of the data in messages.
        problem_type: as in `LevitConfig`.

    Examples:
        >>> red = Image.new("RGB", (8, 8), "red")
        >>> data = LabeledImages([red, red], np.array([0, 1], np.int32), ("cat", "dog"))
        >>> len(data)
        2
    """

    images: Any
    targets: np.ndarray
    labels: tuple[str, ...] = ()
    where: str = "the data"
    problem_type: str = "single_label_classification"

    def __post_init__(self) -> None:
        if not (hasattr(self.images, "__len__") and hasattr(self.images, "__getitem__")):
            raise TypeError(
                f"The images of {self.where} have the wrong type: expected a sequence, found a"
                f" {type(self.images).__name__}."
            )
        targets = np.asarray(self.targets)
        if len(self.images) != len(targets):
            raise DataError(
                f"{self.where} has {len(self.images)} images and {len(targets)} targets: expected a target for each"
                " image."
            )
        axes, kinds, form = (1, "iu", "integers [N]") if self.problem_type == _SINGLE_LABEL else (2, "f", "float [N L]")
        if targets.ndim != axes or targets.dtype.kind not in kinds:
            raise DataError(
                f"The targets of {self.where} do not fit {self.problem_type}: expected {form}, found {targets.dtype}"
                f" {list(targets.shape)}."
            )

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """Return the name of an image for use in messages.

        Examples:
            >>> LabeledImages([Path("a.jpg")], np.zeros(1, np.int32)).name(0)
            'a.jpg'
        """
        self._check_indices(index)
        image = self.images[index] if isinstance(self.images, list) else None
        return str(image) if isinstance(image, str | Path) else f"image {_row_key(self.images, index)} of {self.where}"

    def key(self, index: int, root: Path = Path()) -> str:
        """Return the name of an image in a skip list.

        Args:
            index: index of the image.
            root: directory to which the paths of image files in it are made relative.

        Examples:
            >>> LabeledImages([Path("data/cat/1.jpg")], np.zeros(1, np.int32)).key(0, Path("data"))
            'cat/1.jpg'
        """
        self._check_indices(index)
        image = self.images[index] if isinstance(self.images, list) else None
        if isinstance(image, str | Path):
            path = Path(image)
            return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
        return _row_key(self.images, index)

    def load(self, index: int) -> Image.Image:
        """Decode an image as RGB.

        Raises:
            DataError: the image cannot be decoded.

        Examples:
            >>> LabeledImages([Image.new("L", (8, 4))], np.zeros(1, np.int32)).load(0).mode
            'RGB'
        """
        self._check_indices(index)
        try:
            image = self.images[index]
            if _is_encoded(image):
                return _load_image(image)
            return Image.fromarray(_READER.resize_and_crop(image))
        except Exception as error:  # the decoder of a dataset may raise any exception
            raise DataError(f"{self.name(index)} cannot be used: {error}") from error

    def select(self, indices: Any, where: str) -> "LabeledImages":
        """Return a subset of the images.

        Args:
            indices: indices of the images.
            where: name of the subset in messages.

        Examples:
            >>> data = LabeledImages(["a.jpg", "b.jpg"], np.array([0, 1], np.int32), ("cat", "dog"))
            >>> data.select([1], "the dogs").images
            ['b.jpg']
        """
        indices = self._check_indices(indices)
        listed = isinstance(self.images, list)
        chosen = [self.images[i] for i in indices] if listed else _SelectedRows(self.images, indices)
        return LabeledImages(chosen, self.targets[indices], self.labels, where, self.problem_type)

    def _check_indices(self, indices: Any) -> np.ndarray:
        """Return one index or several as an array, or raise IndexError unless there are such images."""
        rows = np.asarray(indices)
        if not rows.size:
            return rows.astype(np.int64)
        if rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(self):
            found = rows if rows.dtype.kind not in "iu" else rows[(rows < 0) | (rows >= len(self))]
            raise IndexError(
                f"{self.where} has no image {found.flat[0]!r}: expected integers from 0 to {len(self) - 1}."
            )
        return rows


@dataclass(frozen=True)
class _SelectedRows:
    """A subset of a sequence of images, decoded on access."""

    images: Any
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.images[int(self.indices[index])]

    def key(self, index: int) -> str:
        """Return the name of an image in a skip list."""
        return _row_key(self.images, int(self.indices[index]))


def _row_key(images: Any, index: int) -> str:
    """Return the name in a skip list of an image that is not a file."""
    return str(images.key(index)) if hasattr(images, "key") else str(index)


def _image_files(directory: Path) -> list[Path]:
    """Return the image files in a directory and its subdirectories, sorted, without hidden files and folders.

    Links to folders are followed. A warning counts the images that are skipped because of their format.
    """
    files: list[Path] = []
    skipped: Counter[str] = Counter()
    _walk(directory, _image_suffixes(), files, skipped, ())
    if skipped:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())
        warnings.warn(
            f"{skipped.total()} images in {directory} are skipped, because their formats cannot be decoded: {counts}."
            " Convert them to JPEG or PNG.",
            stacklevel=3,
        )
    return sorted(files)


def _walk(
    directory: Path, suffixes: Collection[str], files: list[Path], skipped: Counter[str], above: tuple[str, ...]
) -> None:
    """Add the visible images below a directory to `files` or to `skipped`; `above` ends loops of links."""
    real = os.path.realpath(directory)
    if real in above:
        return
    for path in directory.iterdir():
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            continue
        if path.is_dir():
            _walk(path, suffixes, files, skipped, (*above, real))
        elif suffix in suffixes and path.is_file():
            files.append(path)
        elif suffix in _OTHER_IMAGES:
            skipped[suffix] += 1


def _read_folder(directory: Path, allow_empty: bool = False) -> LabeledImages:
    """List the images of a directory with one folder per class, sorted by name, without opening them.

    Classes without images raise DataError unless `allow_empty` is True.
    """
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{directory} has no folders: expected one folder of images per class.")
    classes = {folder.name: _image_files(folder) for folder in folders}
    empty = [name for name, paths in classes.items() if not paths]
    if empty and not allow_empty:
        raise DataError(
            f"{directory / empty[0]} has no images: expected at least one per class. Add images, or remove the folder."
        )
    images = [path for paths in classes.values() for path in paths]
    targets = np.repeat(np.arange(len(classes), dtype=np.int32), [len(paths) for paths in classes.values()])
    return LabeledImages(images, targets, tuple(classes), str(directory))


def _reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _read_named_parts(
    where: str, names: Collection[str], read: Callable[[str], LabeledImages], options: _DataOptions
) -> dict[str, LabeledImages]:
    """Return the images to train on, under the name "train", and those to validate on if there is such a split.

    Args:
        where: name of the data in messages.
        names: names of the splits.
        read: returns the images of a split, or of an expression such as "train[:80%]".
        options: its split is the one to train on.
    """
    train = options.split or _TRAIN
    mentioned = {train, *re.findall(r"[\w.-]+", train)}
    if len(mentioned) == 1 and train not in (*names, "all"):
        raise DataError(
            f"{where} has the splits {', '.join(names)}: expected one named {train}. Choose one with split=..."
        )
    other = next((name for name in _VALIDATION if name in names and not mentioned & {name, "all"}), None)
    parts = {_TRAIN: read(train)}
    if other:
        parts[other] = read(other)
    return parts


def _check_classes(targets: np.ndarray, labels: Sequence[str], where: str) -> None:
    """Raise DataError unless all targets are class indices; if there are no labels, they need not be bounded."""
    outside = np.flatnonzero((targets < 0) | ((targets >= len(labels)) & bool(labels)))
    if len(outside):
        raise _unlabeled(where, len(targets), outside)


def _unlabeled(where: str, count: int, missing: Any) -> DataError:
    return DataError(
        f"{where} has unlabeled rows: expected a label for each of {count} rows, found {len(missing)} rows without one,"
        f" first row {missing[0]}. Remove these rows."
    )


def _match_classes(names: Sequence[str], labels: Sequence[str], where: str) -> list[int]:
    """Return the model's index of each class of the data.

    Classes are matched by name; those of ImageNet, or some of them, also by WordNet id. Only if no name matches, they
    are matched by position, and a warning is issued.
    """
    if tuple(labels) == _imagenet_labels():
        by_id = {wordnet_id: i for i, wordnet_id in enumerate(_imagenet_wordnet_ids())}
        if all(name in by_id for name in names):
            return [by_id[name] for name in names]
    known = set(labels)
    choices = (names, _imagenet_names(names) or names)
    names = max(choices, key=lambda choice: sum(name in known for name in choice))
    if any(name in known for name in names):
        return _match_names(names, labels, f"The classes of {where}")
    if len(names) == len(labels):
        warnings.warn(
            f"No class name of {where} is one of the model's: its {len(names)} classes are matched by position,"
            f" {names[0]} as {labels[0]}.",
            stacklevel=3,
        )
        return list(range(len(names)))
    raise DataError(
        f"The classes of {where} do not match the model: expected the model's class names, or its {len(labels)} classes"
        f" in order, found {len(names)} other names, such as {names[0]!r}."
    )


def _match_names(names: Sequence[str], labels: Sequence[str], what: str) -> list[int]:
    """Return the index in `labels` of each name; `what` names the classes in messages."""
    if tuple(names) == tuple(labels):
        return list(range(len(names)))
    indices: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        indices.setdefault(label, []).append(i)
    missing = [name for name in names if name not in indices]
    if missing:
        raise DataError(
            f"{what} do not match: expected names of the {len(labels)} known classes, found {len(missing)} of"
            f" {len(names)} that are not, such as {', '.join(missing[:_LISTED])}. Rename them, or leave them out."
        )
    ambiguous = [name for name in names if len(indices[name]) > 1]
    if ambiguous:
        places = " and ".join(map(str, indices[ambiguous[0]]))
        raise DataError(
            f"{what} are ambiguous: expected names that only one class has, found {ambiguous[0]}, which classes"
            f" {places} have. Name ImageNet's classes by WordNet ids, such as n01440764."
        )
    return [indices[name][0] for name in names]


@dataclass(frozen=True)
class _Target:
    """A column of targets.

    Attributes:
        name: name of the column.
        problem_type: as in `LevitConfig`.
        labels: class names; empty for regression, and for classes without names.
    """

    name: str
    problem_type: str
    labels: tuple[str, ...] = ()


def _choose_image(images: Sequence[str], columns: Collection[str], where: str, options: _DataOptions) -> str:
    """Return the column of images to read.

    Args:
        images: columns that contain images.
        columns: all columns.
        where: name of the data in messages.
        options: the column that was asked for.
    """
    return _choose_column(images, options.image_column, _IMAGE_COLUMNS, "image_column", f"images, {where}", columns)


def _choose_target(
    targets: Iterable[_Target],
    columns: Collection[str],
    where: str,
    problem_types: Collection[str] | None,
    options: _DataOptions,
) -> _Target:
    """Return the column of targets to read.

    Args:
        targets: columns that can be targets.
        columns: all columns.
        where: name of the data in messages.
        problem_types: accepted problem types of the targets; None accepts all.
        options: the column that was asked for.
    """
    accepted = {target.name: target for target in targets if target.problem_type in (problem_types or _PROBLEM_TYPES)}
    # Numbers are targets only if there are no classes, because they may be boxes or coordinates.
    usual = [name for name, target in accepted.items() if target.problem_type != _REGRESSION] or list(accepted)
    kinds = "classes" if problem_types == (_SINGLE_LABEL,) else "classes, lists of classes or numbers"
    candidates, content = usual if options.label_column is None else list(accepted), f"{kinds}, {where}"
    name = _choose_column(candidates, options.label_column, _LABEL_COLUMNS, "label_column", content, columns)
    return accepted[name]


def _label_rows(rows: Any, values: Sequence[Any], target: _Target, where: str) -> LabeledImages:
    """Return images with the values of their column of targets; None and -1 are no classes."""
    if target.problem_type == _SINGLE_LABEL:
        classes = np.asarray([-1 if index is None else index for index in values], np.int32)
        _check_classes(classes, target.labels, where)
        return LabeledImages(rows, classes, target.labels, where)
    missing = [i for i, value in enumerate(values) if value is None]
    if missing:
        raise _unlabeled(where, len(values), missing)
    if target.problem_type == _REGRESSION:
        numbers = np.asarray(values, np.float32).reshape(len(values), -1)
        return LabeledImages(rows, numbers, (), where, _REGRESSION)
    matrix = np.zeros((len(values), len(target.labels)), np.float32)
    for row, indices in zip(matrix, values, strict=True):
        row[list(indices)] = 1
    return LabeledImages(rows, matrix, target.labels, where, _MULTI_LABEL)


def _choose_column(
    candidates: Sequence[str],
    requested: str | None,
    usual: Collection[str],
    option: str,
    content: str,
    features: Collection[str],
) -> str:
    """Return the requested column, the only candidate, or the only one with a usual name."""
    if requested is not None:
        if requested in candidates:
            return requested
        raise DataError(
            f"The column {requested} cannot be used: expected a column of {content}, found"
            f" {', '.join(candidates) or 'none'} in the columns {', '.join(features)}. Change {option}=..."
        )
    named = [column for column in candidates if column.lower() in usual]
    for choice in (candidates, named):
        if len(choice) == 1:
            return choice[0]
    if not candidates:
        raise DataError(f"A column is missing: expected one of {content}, found the columns {', '.join(features)}.")
    raise DataError(
        f"It is not clear which column to use: expected one column of {content}, found {', '.join(candidates)}. Choose"
        f" one with {option}=..."
    )
