"""How good a classifier is: top-1, top-5, loss and confusion over a folder of images or a Hugging Face dataset."""

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .classifier import ImageClassifier
from .configuration import SINGLE_LABEL
from .datasets import DataError, LabeledImages, load_dataset, match_classes, read_folder, read_split
from .image_processing import TIMM_CROP_PCT, LevitImageProcessor, size_for_edge

TOP_K = 5


class HalfEvenProcessor(LevitImageProcessor):
    """Crop as torchvision's CenterCrop does, which rounds half an odd margin to even where transformers rounds down.

    Example:
        >>> HalfEvenProcessor(size=224).resize_and_crop(np.zeros((300, 259, 3), np.uint8)).shape
        (224, 224, 3)

    Source: torchvision transforms/functional.py (`center_crop`).
    """

    def crop_offset(self, margin: int) -> int:
        """Return where the crop begins in an edge that is `margin` pixels longer.

        Example:
            >>> HalfEvenProcessor().crop_offset(35), LevitImageProcessor().crop_offset(35)
            (18, 17)
        """
        return round(margin / 2)


@dataclass(frozen=True)
class Evaluation:
    """What came out of an evaluation.

    Attributes:
        images: number of images counted.
        top1: share of images whose likeliest class is right, in [0, 1].
        top5: share of images whose class is among the five likeliest, in [0, 1].
        loss: mean cross entropy, in nats.
        confusion: number of images by true and by named class [num_labels num_labels].
        labels: class names.
        seconds: time from the first image to the last, compilation left out.
        broken: what is wrong with the images that could not be read, which count nowhere.

    Example:
        >>> result = Evaluation(4, 0.75, 1.0, 0.5, np.array([[2, 1], [0, 1]]), ("cat", "dog"), seconds=0.5)
        >>> result.top1, result.confusion[0, 1].item()  # a cat was taken for a dog
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
        """Return the numbers, JSON-ready, without the confusion matrix.

        Example:
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
        """Return the confusion matrix as CSV: a row for each true class, a column for each class named.

        Example:
            >>> result = Evaluation(4, 0.75, 1.0, 0.5, np.array([[2, 1], [0, 1]]), ("cat", "dog"), seconds=0.5)
            >>> print(result.confusion_csv().replace(chr(92), "/"))
            true / named,cat,dog
            cat,2,1
            dog,0,1
            <BLANKLINE>
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["true \\ named", *self.labels])
        writer.writerows([label, *map(int, row)] for label, row in zip(self.labels, self.confusion, strict=True))
        return text.getvalue()


def evaluate(classifier: ImageClassifier, data: LabeledImages) -> Evaluation:
    """Classify labeled images and count.

    Args:
        classifier: the model and what prepares its images.
        data: images of one class each; `targets` count classes as the model does.

    Raises:
        ValueError: there is no image that can be read.

    Example:
        >>> classifier = ImageClassifier.from_pretrained("cifar10")
        >>> black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
        >>> data = LabeledImages([black, white, "nowhere.jpg"], np.array([0, 1, 2]))
        >>> result = evaluate(classifier, data)
        >>> result.images, result.confusion.shape, result.broken
        (2, (10, 10), ['The image nowhere.jpg does not exist.'])
    """
    labels = classifier.model.config.id2label
    config = classifier.model.config
    count, batch_size = len(data), classifier.batch_size
    for size in {min(count, batch_size), count % batch_size} - {0}:  # the shapes that will be compiled
        classifier.logits(np.zeros((size, *config.image_height_width, config.num_channels), np.uint8))
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    among_five, losses, broken = 0, 0.0, []
    start = time.perf_counter()
    for label, logits in zip(data.targets, classifier.stream_logits(data.images), strict=True):
        if isinstance(logits, Exception):
            broken.append(str(logits))
            continue
        order = np.argsort(-logits, kind="stable")
        confusion[label, order[0]] += 1
        among_five += label in order[:TOP_K]
        wide = logits.astype(np.float64)
        losses += np.log(np.exp(wide - wide.max()).sum()) + wide.max() - wide[label]
    count = int(confusion.sum())
    if not count:
        raise ValueError(f"There is no image to count: {'; '.join(broken[:3]) or 'the data is empty'}.")
    return Evaluation(
        images=count,
        top1=float(np.trace(confusion)) / count,
        top5=among_five / count,
        loss=float(losses) / count,
        confusion=confusion,
        labels=labels,
        seconds=time.perf_counter() - start,
        broken=broken,
    )


def evaluation_processor(rule: str, model_processor: LevitImageProcessor) -> LevitImageProcessor:
    """Return a processor that prepares images by the rule under which an accuracy was published.

    Args:
        rule: "model" for the model's own; "hf" for transformers' (shorter edge times 256 / 224, crop rounded down);
            "torchvision" for the original repository's (the same edge, crop rounded as torchvision does); "timm" for
            timm's (crop of 0.9, rounded as torchvision does).
        model_processor: gives the size of the crop, mean and standard deviation.

    Raises:
        ValueError: there is no such rule.

    Example:
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
    if rule not in ("hf", "torchvision", "timm"):
        raise ValueError(f"There is no crop rule {rule!r}: expected model, hf, torchvision or timm.")
    kind = LevitImageProcessor if rule == "hf" else HalfEvenProcessor
    size = size_for_edge(int(side / TIMM_CROP_PCT)) if rule == "timm" else side
    return kind(**{**vars(model_processor), "size": size, "crop_size": (height, width)})


def read_data(source: str | Path, labels: Sequence[str], split: str = "test") -> LabeledImages:
    """Find labeled images.

    Args:
        source: a directory with a folder for each class, or a Hugging Face dataset by name (needs `datasets`).
        labels: the model's class names. Folders, or the dataset's classes, are matched by name; where names do not
            match but there are as many, by their order.
        split: which part of a Hugging Face dataset.

    Raises:
        ValueError: there are no images, or the classes are not the model's.
        ImportError: a dataset is asked for, and `datasets` is not installed.

    Example:
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
    directory = Path(source).expanduser()
    if directory.is_dir():
        data = read_folder(directory, allow_empty=True)
    else:
        data = read_split(load_dataset(str(source), split=split), str(source), split, (SINGLE_LABEL,))
    indices = match_classes(data.labels, labels, data.where)
    if not len(data):
        raise DataError(f"The folders of {data.where} hold no images.")
    return replace(data, targets=np.array(indices, np.int32)[data.targets], labels=tuple(labels))
