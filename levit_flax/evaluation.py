"""Evaluate a classifier on labeled images: accuracy, loss and confusion matrix."""

import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import _check_types
from .choices import _CROP_RULES
from .classifier import ImageClassifier, _classify_rows
from .configuration import _SINGLE_LABEL
from .data_sources import _read_part
from .datasets import DataError, LabeledImages, _DataOptions, _match_classes
from .image_processing import _TIMM_CROP_PCT, LevitImageProcessor, _size_for_edge
from .images import ImageError
from .streams import LabeledStream, _RenumberedRows

_TOP_K = 5


class _HalfEvenProcessor(LevitImageProcessor):
    """A processor that rounds the crop offset half to even, as torchvision does; transformers rounds it down."""

    def crop_offset(self, margin: int) -> int:
        """Return the offset of the center crop in pixels, rounded half to even."""
        return round(margin / 2)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        images: number of images evaluated.
        top1: fraction of images whose most likely class is correct, in [0, 1].
        top5: fraction of images whose class is among the five most likely, in [0, 1].
        loss: mean cross entropy, in nats.
        confusion: number of images by true class (rows) and predicted class (columns), int64 [num_labels num_labels].
        labels: class names.
        seconds: time to load and classify the images, excluding compilation.
        broken: one error message per unreadable image. These images are not counted.

    Examples:
        >>> result = Evaluation(4, 0.75, 1.0, 0.5, np.array([[2, 1], [0, 1]]), ("cat", "dog"), seconds=0.5)
        >>> result.top1, result.confusion[0, 1].item()  # one cat was classified as a dog
        (0.75, 1)
    """

    images: int
    top1: float
    top5: float
    loss: float
    confusion: np.ndarray
    labels: tuple[str, ...]
    seconds: float
    broken: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as JSON values, without the confusion matrix.

        Examples:
            >>> result = Evaluation(4, 0.75, 1.0, 0.5, np.array([[2, 1], [0, 1]]), ("cat", "dog"), seconds=0.5)
            >>> result.to_dict()["images_per_second"]
            8.0
        """
        return {
            "images": self.images,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "images_per_second": self.images / self.seconds if self.seconds else None,
            "broken": self.broken,
        }

    def confusion_csv(self) -> str:
        """Return the confusion matrix as CSV, with one row per true class.

        Examples:
            >>> result = Evaluation(4, 0.75, 1.0, 0.5, np.array([[2, 1], [0, 1]]), ("cat", "dog"), seconds=0.5)
            >>> print(result.confusion_csv().replace(chr(92), "/"))
            true / predicted,cat,dog
            cat,2,1
            dog,0,1
            <BLANKLINE>
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["true \\ predicted", *self.labels])
        writer.writerows([label, *map(int, row)] for label, row in zip(self.labels, self.confusion, strict=True))
        return text.getvalue()


@_check_types
def evaluate(classifier: ImageClassifier, data: LabeledImages | LabeledStream) -> Evaluation:
    """Compute the accuracy, loss and confusion matrix of a classifier.

    Args:
        classifier: the model with its processor.
        data: images with one class each, as returned by `read_data`. `targets` are class indices of the model.

    Raises:
        ValueError: there are no images, none of them can be read, or a target is not a class index of the model.

    Examples:
        >>> classifier = ImageClassifier.from_pretrained("cifar10")
        >>> black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
        >>> data = LabeledImages([black, white, "nowhere.jpg"], np.array([0, 1, 2]))
        >>> result = evaluate(classifier, data)
        >>> result.images, result.confusion.shape, result.broken
        (2, (10, 10), ['The image nowhere.jpg does not exist.'])
    """
    return _evaluate(classifier, data, _classify_rows(classifier, _rows_of(data)))


def _rows_of(data: LabeledImages | LabeledStream) -> Iterator[tuple[tuple[str, int], Any]]:
    """Yield the name and the target of each image, and the image."""
    if isinstance(data, LabeledImages):
        for i, (image, target) in enumerate(zip(data.images, data.targets.tolist(), strict=True)):
            yield (data.name(i), target), image
    else:
        for key, image, target in data.rows:
            yield (f"image {key} of {data.where}", target), image


def _evaluate(
    classifier: ImageClassifier,
    data: LabeledImages | LabeledStream,
    results: Iterator[tuple[tuple[str, int], np.ndarray | ImageError | OSError]],
) -> Evaluation:
    """Like `evaluate`, for the results of `_classify_rows` of the images, which are computed when they are read."""
    labels = classifier.model.config.id2label
    config, sizes = classifier.model.config, {classifier.batch_size}
    if isinstance(data, LabeledImages):
        _check_targets(data, len(labels))
        sizes = {min(len(data), classifier.batch_size), len(data) % classifier.batch_size} - {0}
    for size in sizes:  # compile all shapes before timing
        classifier.logits(np.zeros((size, *config.image_height_width, config.num_channels), np.uint8))
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    in_top5, losses, broken = 0, 0.0, []
    start = time.perf_counter()
    for (name, label), logits in results:
        if not 0 <= label < len(labels):
            raise DataError(
                f"The target of {name} is not a class index: expected a value in [0, {len(labels)}), found {label}."
                " Leave this image out."
            )
        if isinstance(logits, Exception):
            text = str(logits)
            broken.append(text if name in text else f"{name}: {text}")
            continue
        order = np.argsort(-logits, kind="stable")
        confusion[label, order[0]] += 1
        in_top5 += label in order[:_TOP_K]
        row = logits.astype(np.float64)
        losses += np.log(np.exp(row - row.max()).sum()) + row.max() - row[label]
    count = int(confusion.sum())
    if not count:
        raise ValueError(f"There are no images to evaluate: {'; '.join(broken[:3]) or 'the data is empty'}.")
    return Evaluation(
        images=count,
        top1=float(np.trace(confusion)) / count,
        top5=in_top5 / count,
        loss=float(losses) / count,
        confusion=confusion,
        labels=labels,
        seconds=time.perf_counter() - start,
        broken=broken,
    )


def _check_targets(data: LabeledImages, num_labels: int) -> None:
    """Raise DataError unless every target is a class index."""
    if data.problem_type != _SINGLE_LABEL:
        raise DataError(f"{data.where} is for {data.problem_type}: expected images with one class each.")
    targets = np.asarray(data.targets)
    outside = np.flatnonzero((targets < 0) | (targets >= num_labels))
    if outside.size:
        raise DataError(
            f"{outside.size} of {len(targets)} targets of {data.where} are not class indices: expected values in"
            f" [0, {num_labels}), found {targets[outside[0]]} for {data.name(int(outside[0]))}. Leave these images out."
        )


@_check_types
def evaluation_processor(rule: str, model_processor: LevitImageProcessor) -> LevitImageProcessor:
    """Return a processor that resizes and crops images as published evaluations do.

    Args:
        rule: "model" returns `model_processor`. The other rules crop the center of the image after its shorter edge
            has been resized:

            - "hf": transformers. Resizes to crop size * 256 / 224, and rounds the crop offset down.
            - "torchvision": the original repository. Resizes as "hf" does, and rounds the offset half to even.
            - "timm": timm. Resizes to crop size / 0.9, and rounds the offset half to even.
        model_processor: the processor that provides the crop size, mean and standard deviation.

    Raises:
        ValueError: the rule is unknown.

    Examples:
        >>> for rule in ("hf", "torchvision", "timm"):
        ...     processor = evaluation_processor(rule, LevitImageProcessor())
        ...     print(rule, int(256 / 224 * processor.size["shortest_edge"]), processor.crop_offset(35))
        hf 256 17
        torchvision 256 18
        timm 248 18
    """
    height, width = model_processor.crop_size["height"], model_processor.crop_size["width"]
    side = max(height, width)
    if rule == "model":
        return model_processor
    if rule not in _CROP_RULES:
        raise ValueError(f"Unknown crop rule: expected one of {', '.join(_CROP_RULES)}, found {rule!r}.")
    processor_class = LevitImageProcessor if rule == "hf" else _HalfEvenProcessor
    size = _size_for_edge(int(side / _TIMM_CROP_PCT)) if rule == "timm" else side
    return processor_class(**{**vars(model_processor), "size": size, "crop_size": (height, width)})


@_check_types
def read_data(
    source: str | Path | LabeledImages | Sequence[Any] | Mapping[str, Any],
    labels: Sequence[str],
    split: str | None = None,
    *,
    data_revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> LabeledImages | LabeledStream:
    """Read the labeled images of a directory or a dataset.

    Args:
        source: one of these:

            - a directory with one folder per class; hidden files and folders are skipped;
            - "hfds/NAME" or "hfds/NAME:CONFIG": a Hugging Face dataset (requires `datasets`). "NAME" alone is the same
              if there is no such directory;
            - "tfds/NAME", "tfds/NAME:VERSION" or "tfds/NAME/CONFIG:VERSION": a dataset of TensorFlow Datasets that is
              prepared as ArrayRecord files in the directory TFDS_DATA_DIR (requires the extra `tfds`, and not
              TensorFlow);
            - "hfids/NAME" or "hfids/NAME:CONFIG": a Hugging Face dataset that is downloaded while it is read;
            - "wds/SHARDS": tar files of a WebDataset on this machine, such as "wds/data/test-{000..007}.tar". The files
              .cls contain class indices of the model;
            - `LabeledImages`, or any other sequence with `len()` and `[i]` that gives an image and a label: a class
              index, a class name, a number, or a list of numbers. Its attribute `classes`, if it has one, names the
              classes. Each item is read once for its label;
            - a mapping from names of splits to such sequences, or a Hugging Face dataset that is already loaded.
        labels: class names of the model. The classes of the data are matched by name, or those of ImageNet by WordNet
            id. If no name matches but the numbers are equal, they are matched by position, with a warning.
        split: split of a dataset, `test` by default; for a directory, the name of a folder in it.
        data_revision: branch, tag or commit of a Hugging Face dataset; None for its main branch.
        image_column: image column of a dataset; None for the only one, or the one called image or img.
        label_column: class column of a dataset; None for the only one, or the one called label or labels.

    Returns:
        The images, with the class indices and class names of the model: a `LabeledStream` for "hfids" and "wds",
        otherwise `LabeledImages`.

    Raises:
        DataError: there are no images, the classes do not match those of the model, the split does not exist, or it is
            not clear which columns to read.
        ImportError: the package that reads the dataset is not installed.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("dog", "cat"):
        ...         Path(folder, name).mkdir()
        ...         Image.new("RGB", (32, 32)).save(Path(folder, name, "1.png"))
        ...     data = read_data(folder, labels=("ant", "cat", "dog"))
        >>> [path.parent.name for path in data.images], data.targets.tolist()
        (['cat', 'dog'], [1, 2])
    """
    data = _read_part(source, _DataOptions(split, data_revision, image_column, label_column))
    if isinstance(data, LabeledStream):
        indices = _match_classes(data.labels, labels, data.where) if data.labels else range(len(labels))
        return replace(data, rows=_RenumberedRows(data.rows, indices), labels=tuple(labels))
    if not len(data):
        raise DataError(f"{data.where} contains no images: expected at least one.")
    if data.labels:
        order = np.array(_match_classes(data.labels, labels, data.where), np.int32)
        data = replace(data, targets=order[data.targets])
    data = replace(data, labels=tuple(labels))
    _check_targets(data, len(labels))
    return data
