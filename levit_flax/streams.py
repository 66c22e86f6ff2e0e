"""Labeled images that are read once and in order, without random access."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .datasets import DataError, _reason


@dataclass(frozen=True)
class LabeledStream:
    """Images with one class each that are read in order, such as those of a WebDataset; for evaluation.

    Attributes:
        rows: an iterable of the name of an image in the data, the image as in `LevitImageProcessor.preprocess`, and its
            class index.
        labels: the names of the classes; empty if the indices are those of the model.
        where: name of the data in messages.

    Examples:
        >>> import numpy as np
        >>> from levit_flax import ImageClassifier
        >>> from levit_flax.evaluation import evaluate
        >>> frames = ((f"frame {i}", np.full((32, 32, 3), i, np.uint8), 3) for i in range(5))
        >>> evaluate(ImageClassifier.from_pretrained("cifar10"), LabeledStream(frames, where="the film")).images
        5
    """

    rows: Iterable[tuple[str, Any, int]]
    labels: tuple[str, ...] = ()
    where: str = "the data"


@dataclass(frozen=True)
class _RenumberedRows:
    """Rows with the class indices `indices[target]`; -1 if there is none."""

    rows: Iterable[tuple[str, Any, int]]
    indices: Sequence[int]

    def __iter__(self) -> Iterator[tuple[str, Any, int]]:
        for key, image, target in self.rows:
            yield key, image, self.indices[target] if 0 <= target < len(self.indices) else -1


def _reading(rows: Iterable[Any], where: str) -> Iterator[Any]:
    """Yield rows, and raise DataError if the next one cannot be read."""
    iterator, count = iter(rows), 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:  # the reader of damaged or remote data may raise any exception
            raise DataError(f"{where} cannot be read after {count} images: {_reason(error)}.") from error
        count += 1
        yield row
