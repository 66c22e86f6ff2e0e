"""How good a classifier is: top-1, top-5, loss and confusion over a folder of pictures or a Hugging Face dataset."""

import csv
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .classifier import ImageClassifier
from .image_processing import TIMM_CROP_PCT, LevitImageProcessor, picture_suffixes, size_for_edge

TOP_K = 5


class Data(NamedTuple):
    """Labelled pictures.

    Attributes:
        images: paths or PIL images, taken from one by one.
        labels: the class index of each, as the model counts.
    """

    images: Iterable[Any]
    labels: Sequence[int]


class HalfEvenProcessor(LevitImageProcessor):
    """Crop as torchvision's CenterCrop does, which rounds half an odd margin to even where transformers rounds down."""

    def crop_offset(self, margin: int) -> int:
        """Return where the crop begins in an edge that is `margin` pixels longer."""
        return round(margin / 2)


@dataclass(frozen=True)
class Evaluation:
    """What came out of an evaluation.

    Attributes:
        pictures: number of pictures counted.
        top1: share of pictures whose likeliest class is right, in [0, 1].
        top5: share of pictures whose class is among the five likeliest, in [0, 1].
        loss: mean cross entropy, in nats.
        confusion: number of pictures by true and by named class [num_labels num_labels].
        labels: class names.
        seconds: time from the first picture to the last, compilation left out.
        broken: what is wrong with the pictures that could not be read, which count nowhere.
    """

    pictures: int
    top1: float
    top5: float
    loss: float
    confusion: np.ndarray
    labels: tuple[str, ...]
    seconds: float
    broken: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, JSON-ready, without the confusion matrix."""
        return {
            "pictures": self.pictures,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "pictures_per_second": self.pictures / self.seconds if self.seconds else None,
            "broken": self.broken,
        }

    def confusion_csv(self) -> str:
        """Return the confusion matrix as CSV: a row for each true class, a column for each class named."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["true \\ named", *self.labels])
        writer.writerows([label, *map(int, row)] for label, row in zip(self.labels, self.confusion, strict=True))
        return text.getvalue()


def evaluate(classifier: ImageClassifier, data: Data) -> Evaluation:
    """Classify labelled pictures and count.

    Args:
        classifier: the model and what prepares its pictures.
        data: pictures and the classes that they are of.

    Raises:
        ValueError: there is no picture that can be read.
    """
    labels = classifier.model.config.id2label
    config = classifier.model.config
    count, batch_size = len(data.labels), classifier.batch_size
    for size in {min(count, batch_size), count % batch_size} - {0}:  # the shapes that will be compiled
        classifier.logits(np.zeros((size, *config.image_height_width, config.num_channels), np.uint8))
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    among_five, losses, broken = 0, 0.0, []
    start = time.perf_counter()
    for label, logits in zip(data.labels, classifier.stream_logits(data.images), strict=True):
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
        raise ValueError(f"There is no picture to count: {'; '.join(broken[:3]) or 'the data is empty'}.")
    return Evaluation(
        pictures=count,
        top1=float(np.trace(confusion)) / count,
        top5=among_five / count,
        loss=float(losses) / count,
        confusion=confusion,
        labels=labels,
        seconds=time.perf_counter() - start,
        broken=broken,
    )


def evaluation_processor(rule: str, model_processor: LevitImageProcessor) -> LevitImageProcessor:
    """Return a processor that prepares pictures by the rule under which an accuracy was published.

    Args:
        rule: "model" for the model's own; "hf" for transformers' (shorter edge times 256 / 224, crop rounded down);
            "torchvision" for the original repository's (the same edge, crop rounded as torchvision does); "timm" for
            timm's (crop of 0.9, rounded as torchvision does).
        model_processor: gives the size of the crop, mean and standard deviation.

    Raises:
        ValueError: there is no such rule.
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


def read_data(source: str | Path, labels: Sequence[str], split: str = "test") -> Data:
    """Find labelled pictures.

    Args:
        source: a directory with a folder for each class, or a Hugging Face dataset by name (needs `datasets`).
        labels: the model's class names. Folders, or the dataset's classes, are matched by name; where names do not
            match but there are as many, by their order.
        split: which part of a Hugging Face dataset.

    Raises:
        ValueError: there are no pictures, or the classes are not the model's.
        ImportError: a dataset is asked for, and `datasets` is not installed.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        return read_folder(directory, labels)
    return read_dataset(str(source), labels, split)


def read_folder(directory: Path, labels: Sequence[str]) -> Data:
    """Find the pictures in a directory with a folder for each class."""
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"{directory} has no folders: expected one for each class, with the class's pictures in it.")
    indices = match_classes([folder.name for folder in folders], labels, str(directory))
    suffixes = picture_suffixes()
    found = [
        (path, index)
        for folder, index in zip(folders, indices, strict=True)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in suffixes and path.is_file()
    ]
    if not found:
        raise ValueError(f"The folders of {directory} hold no pictures.")
    return Data([path for path, _ in found], [index for _, index in found])


def read_dataset(name: str, labels: Sequence[str], split: str) -> Data:
    """Open a Hugging Face dataset with an image and a class label."""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"There is no directory {name}. If it is a Hugging Face dataset: pip install 'levit-flax[datasets]'."
        ) from None
    data = datasets.load_dataset(name, split=split)
    pictures = [key for key, kind in data.features.items() if isinstance(kind, datasets.Image)]
    classes = [key for key, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
    if not pictures or not classes:
        raise ValueError(f"The dataset {name} has the columns {list(data.features)}: expected an image and a class.")
    indices = match_classes(data.features[classes[0]].names, labels, name)
    return Data((row[pictures[0]] for row in data), [indices[label] for label in data[classes[0]]])


def match_classes(names: Sequence[str], labels: Sequence[str], where: str) -> list[int]:
    """Return the model's index of each class of the data."""
    by_name = {label: i for i, label in enumerate(labels)}
    if all(name in by_name for name in names):
        return [by_name[name] for name in names]
    if len(names) == len(labels):
        return list(range(len(names)))
    foreign = next(name for name in names if name not in by_name)
    raise ValueError(
        f"{where} has {len(names)} classes and the model {len(labels)}, and {foreign} is none of the model's: expected"
        " the model's class names, or as many classes in the model's order."
    )
