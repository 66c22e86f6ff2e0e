"""How good a classifier is: top-1, top-5, loss and confusion over a folder of images or a Hugging Face dataset."""

import csv
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .classifier import ImageClassifier
from .image_processing import TIMM_CROP_PCT, LevitImageProcessor, image_suffixes, size_for_edge

TOP_K = 5


class Data(NamedTuple):
    """Labeled images.

    Attributes:
        images: paths or PIL images, taken from one by one.
        labels: the class index of each, as the model counts.

    Example:
        >>> data = Data(images=["cat.jpg", "dog.jpg"], labels=[3, 5])
    """

    images: Iterable[Any]
    labels: Sequence[int]


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


def evaluate(classifier: ImageClassifier, data: Data) -> Evaluation:
    """Classify labeled images and count.

    Args:
        classifier: the model and what prepares its images.
        data: images and the classes that they are of.

    Raises:
        ValueError: there is no image that can be read.

    Example:
        >>> classifier = ImageClassifier.from_pretrained("cifar10")
        >>> black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
        >>> result = evaluate(classifier, Data([black, white, "nowhere.jpg"], [0, 1, 2]))
        >>> result.images, result.confusion.shape, result.broken
        (2, (10, 10), ['There is no image at nowhere.jpg.'])
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


def read_data(source: str | Path, labels: Sequence[str], split: str = "test") -> Data:
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
        ...     images, labels = read_data(folder, labels=("ant", "cat", "dog"))
        >>> [path.parent.name for path in images], labels
        (['cat', 'dog'], [1, 2])
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        return read_folder(directory, labels)
    return read_dataset(str(source), labels, split)


def read_folder(directory: Path, labels: Sequence[str]) -> Data:
    """Find the images in a directory with a folder for each class; `read_data` says how they are matched.

    Raises:
        ValueError: there are no folders, no images, or the classes are not the model's.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "cat").mkdir()
        ...     Path(folder, "cat", "1.jpg").touch()  # looked for by name, and not opened yet
        ...     len(read_folder(Path(folder), labels=("cat", "dog")).images)
        1
    """
    folders = class_folders(directory)
    indices = match_classes(list(folders), labels, str(directory))
    found = [(path, index) for paths, index in zip(folders.values(), indices, strict=True) for path in paths]
    if not found:
        raise ValueError(f"The folders of {directory} hold no images.")
    return Data([path for path, _ in found], [index for _, index in found])


def class_folders(directory: Path) -> dict[str, list[Path]]:
    """Return the images in each folder of a directory, by the folder's name, both in order; nothing that is hidden.

    Raises:
        ValueError: there are no folders.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "cat").mkdir()
        ...     Path(folder, "cat", "1.jpg").touch()
        ...     {name: [path.name for path in paths] for name, paths in class_folders(Path(folder)).items()}
        {'cat': ['1.jpg']}
    """
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not is_hidden(path, directory))
    if not folders:
        raise ValueError(f"{directory} has no folders: expected one for each class, with the class's images in it.")
    suffixes = image_suffixes()
    return {
        folder.name: [
            path
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in suffixes and path.is_file() and not is_hidden(path, folder)
        ]
        for folder in folders
    }


def is_hidden(path: Path, root: Path) -> bool:
    """Return whether a name on the way from a directory to a path begins with a dot.

    Example:
        >>> is_hidden(Path("cats/.trash/1.jpg"), Path("cats")), is_hidden(Path(".data/cats/1.jpg"), Path(".data/cats"))
        (True, False)
    """
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def load_dataset(name: str, **options: Any) -> Any:
    """Load a Hugging Face dataset; the options are those of `datasets.load_dataset`.

    Raises:
        ImportError: `datasets` is not installed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:  # which `datasets` opens as well as a name
        ...     for name in ("dog", "cat"):
        ...         Path(folder, name).mkdir()
        ...         Image.new("RGB", (32, 32)).save(Path(folder, name, "1.png"))
        ...     load_dataset(folder, split="train").features["label"].names
        ['cat', 'dog']
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"There is no directory {name}. If it is a Hugging Face dataset: pip install 'levit-flax[datasets]'."
        ) from None
    return datasets.load_dataset(name, **options)


def read_dataset(name: str, labels: Sequence[str], split: str) -> Data:
    """Open a Hugging Face dataset with an image and a class label; `read_data` says how they are matched.

    Raises:
        ValueError: the dataset has no image or no class, or its classes are not the model's.
        ImportError: `datasets` is not installed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:  # which `datasets` opens as well as a name
        ...     for name in ("dog", "cat"):
        ...         Path(folder, name).mkdir()
        ...         Image.new("RGB", (32, 32)).save(Path(folder, name, "1.png"))
        ...     read_dataset(folder, labels=("ant", "cat", "dog"), split="train").labels
        [1, 2]
    """
    data = load_dataset(name, split=split)
    import datasets

    images = [key for key, kind in data.features.items() if isinstance(kind, datasets.Image)]
    classes = [key for key, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
    if not images or not classes:
        raise ValueError(f"The dataset {name} has the columns {list(data.features)}: expected an image and a class.")
    indices = match_classes(data.features[classes[0]].names, labels, name)
    return Data((row[images[0]] for row in data), [indices[label] for label in data[classes[0]]])


def match_classes(names: Sequence[str], labels: Sequence[str], where: str) -> list[int]:
    """Return the model's index of each class of the data, by name or, where the names are others, by order.

    Raises:
        ValueError: the names are others, and not as many.

    Example:
        >>> match_classes(["dog", "cat"], labels=["ant", "cat", "dog"], where="data")
        [2, 1]
        >>> match_classes(["n01", "n02"], labels=["cat", "dog"], where="data")
        [0, 1]
    """
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
