"""Labeled images from Python sequences."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .configuration import _REGRESSION
from .datasets import DataError, LabeledImages, _check_classes


@dataclass(frozen=True)
class _SequenceImages:
    """The images of a sequence, with names for skip lists.

    Attributes:
        items: the sequence.
        split: name of the part of the data that it is.
        paired: whether its items are pairs of an image and a label.
    """

    items: Any
    split: str
    paired: bool

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[int(index)]
        return item[0] if self.paired else item

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))  # `items` need not raise IndexError at its end

    def key(self, index: int) -> str:
        """Return the name of an image in a skip list."""
        return f"{self.split}/{index}"


def _read_sequence(data: Any, split: str, where: str) -> LabeledImages:
    """Return the images of `LabeledImages`, or of a sequence of pairs of an image and a label.

    The images are a list only if they are files, as those of a directory.
    """
    if not isinstance(data, LabeledImages):
        return _read_pairs(data, split, where)
    files = isinstance(data.images, list) and all(isinstance(image, str | os.PathLike) for image in data.images)
    return data if files else replace(data, images=_SequenceImages(data.images, split, paired=False))


def _read_pairs(pairs: Any, split: str, where: str) -> LabeledImages:
    """Return the images of a sequence of pairs, each of which is read once for its label."""

    def read_label(index: int) -> Any:
        try:
            item = pairs[index]
        except Exception as error:  # the items are made by the caller's code
            raise DataError(f"image {split}/{index} of {where} cannot be read: {error!r}.") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(
                f"The items of {where} are not labeled images: expected pairs of an image and a label, found"
                f" {'a sequence of ' + str(len(item)) if isinstance(item, tuple | list) else type(item).__name__} at"
                f" [{index}]."
            )
        return item[1]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        labels = list(pool.map(read_label, range(len(pairs))))
    images, names = _SequenceImages(pairs, split, paired=True), getattr(pairs, "classes", None)
    names = tuple(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else ()
    if labels and all(isinstance(label, str) for label in labels):
        names = names or tuple(sorted(set(labels)))
        indices = {name: index for index, name in enumerate(names)}
        labels = [indices.get(label, -1) for label in labels]
    values = _as_array(labels, where)
    if values.dtype.kind == "f":
        return LabeledImages(images, values.astype(np.float32).reshape(len(labels), -1), (), where, _REGRESSION)
    targets = values.astype(np.int32)
    _check_classes(targets, names, where)
    return LabeledImages(images, targets, names, where)


def _as_array(labels: Sequence[Any], where: str) -> np.ndarray:
    """Return class indices [N], or numbers [N] or [N L]."""
    try:
        values = np.asarray(labels)
    except (TypeError, ValueError):  # the labels have different lengths
        values = np.asarray(None)
    if not len(labels):
        return np.zeros(0, np.int32)
    if (values.ndim, values.dtype.kind) not in ((1, "i"), (1, "u"), (1, "b"), (1, "f"), (2, "f")):
        raise DataError(
            f"The labels of {where} have the wrong type: expected class indices, class names, numbers, or lists of"
            f" numbers of the same length, found {type(labels[0]).__name__}. For several classes per image, pass"
            " LabeledImages."
        )
    return values
