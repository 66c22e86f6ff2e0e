"""Find, check, shuffle, augment and batch the images of a training run.

The order of the images and their augmentation depend only on the recipe's seed and the step. The number of threads,
processes or hosts does not change the images of a step.
"""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePath
from typing import Any

import grain
import numpy as np
from PIL import Image

from levit_flax.arguments import _check_types
from levit_flax.data_sources import _read_parts, _root_of
from levit_flax.datasets import _ANY_DATA, _TRAIN, DataError, LabeledImages, _DataOptions
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.imagenet import _imagenet_names
from levit_flax.images import ImageError, _check_header

from .augmentation import _augment
from .recipe import Recipe

_PRINTED_ROW = re.compile(r"image (\S+/\d+) of .*")  # as `LabeledImages.name` prints it
_LISTED = 5  # maximum number of images or classes in an error message


@_check_types
def read_images(
    source: str | Path | LabeledImages | Sequence[Any] | Mapping[str, Any],
    recipe: Recipe,
    skip: Collection[str | Path] = (),
    check: bool = False,
    *,
    split: str | None = None,
    data_revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[LabeledImages, LabeledImages]:
    """Find the images to train on and those to validate on.

    Args:
        source: one of these:

            - a directory with a folder for each class, or with the folders `train` and `validation` (or `val`, `valid`,
              `test`) that each have a folder for each class;
            - "hfds/NAME" or "hfds/NAME:CONFIG": a Hugging Face dataset (requires `datasets`). "NAME" alone is the same
              if there is no such directory;
            - "tfds/NAME", "tfds/NAME:VERSION" or "tfds/NAME/CONFIG:VERSION": a dataset of TensorFlow Datasets that is
              prepared as ArrayRecord files in the directory TFDS_DATA_DIR (requires the extra `tfds`, and not
              TensorFlow);
            - `LabeledImages`, or any other sequence with `len()` and `[i]` that gives an image and a label: a class
              index, a class name, a number, or a list of numbers. Its attribute `classes`, if it has one, names the
              classes. Each item is read once for its label before the first step;
            - a mapping from names of splits to such sequences, or a Hugging Face dataset that is already loaded.
        recipe: its `validation_share` and `seed` select the validation images if the source has no validation part.
        skip: images to leave out: paths relative to the source, or rows of a dataset such as "train/17", or either as
            errors print them.
        check: decode every image. By default only the headers of image files are read.
        split: split of a dataset to train on, or an expression such as "train[:80%]"; for a directory, the name of a
            folder in it. None for `train`. The validation images are those of the split `validation` (or `val`,
            `valid`, `test`), unless `split` names it.
        data_revision: branch, tag or commit of a Hugging Face dataset; None for its main branch.
        image_column: image column of a dataset; None for the only one, or the one called image or img.
        label_column: column of targets of a dataset; None for the only column of classes, or the one called label or
            labels; if there are no classes, the same for numbers.

    Returns:
        The training images and the validation images. Classes that are named by WordNet ids of ImageNet, such as
        n01440764, get the names of ImageNet's classes.

    Raises:
        DataError: there are too few images or classes, the two parts have different classes, or an image is unusable.
        ImportError: the source is not a directory, and `datasets` is not installed.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     for i in range(20):
        ...         path = Path(folder, ("cat", "dog")[i % 2], f"{i}.png")
        ...         path.parent.mkdir(exist_ok=True)
        ...         Image.new("RGB", (8, 8)).save(path)
        ...     train, validation = read_images(folder, Recipe(batch_size=4))
        >>> len(train), len(validation), train.labels
        (18, 2, ('cat', 'dog'))
    """
    parts = _find_images(
        source, recipe, _skip_keys(skip, source), _DataOptions(split, data_revision, image_column, label_column)
    )
    for part in parts:
        _check_images(part, decode=check)
    return parts


def _find_images(
    source: Any, recipe: Recipe, skip: Collection[str], options: _DataOptions = _ANY_DATA
) -> tuple[LabeledImages, LabeledImages]:
    """Like `read_images`, but does not open the files."""
    parts = {name: _with_imagenet_names(part) for name, part in _read_parts(source, options).items()}
    if skip:
        parts = _without_skipped(parts, _root_of(source), skip)
    train = parts[_TRAIN]
    if train.labels and len(train.labels) < 2:
        raise DataError(f"{train.where} has a single class, {train.labels[0]!r}: expected two or more.")
    if len(parts) == 1:
        train, validation = _split(train, recipe)
    else:
        validation = next(part for name, part in parts.items() if name != _TRAIN)
        if validation.labels != train.labels:
            unmatched = sorted(set(train.labels) ^ set(validation.labels))
            found = f"only one has {', '.join(unmatched[:_LISTED])}" if unmatched else "their order differs"
            raise DataError(
                f"{train.where} has {len(train.labels)} classes and {validation.where} has {len(validation.labels)}:"
                f" expected the same classes, but {found}."
            )
    for part in (train, validation):
        if not len(part):
            raise DataError(f"{part.where} has no images: expected at least one.")
    return train, validation


def _with_imagenet_names(data: LabeledImages) -> LabeledImages:
    """Replace class names that are WordNet ids by the names of ImageNet's classes."""
    names = _imagenet_names(data.labels)
    return replace(data, labels=names) if names else data


def _without_skipped(parts: dict[str, LabeledImages], root: Path, skip: Collection[str]) -> dict[str, LabeledImages]:
    """Return the parts without the skipped images; each class must keep an image."""
    keys = {name: [part.key(i, root) for i in range(len(part))] for name, part in parts.items()}
    _check_skipped(skip, set().union(*keys.values()), root)
    kept = {
        name: part.select([i for i, key in enumerate(keys[name]) if key not in skip], part.where)
        for name, part in parts.items()
    }
    train = kept[_TRAIN]
    if train.targets.ndim == 1 and train.labels:
        gone = set(parts[_TRAIN].targets.tolist()) - set(train.targets.tolist())
        if gone:
            raise DataError(
                f"{train.where} would have no image of the class {train.labels[min(gone)]} left. Skip fewer images."
            )
    return kept


def _check_skipped(skip: Collection[str], known: Collection[str], source: Path) -> None:
    """Raise DataError if an entry of a skip list matches no image."""
    unknown = sorted(set(skip) - set(known))
    if unknown:
        raise DataError(
            f"{len(unknown)} entries of skip=... match no image of {source}: expected paths or rows as the errors print"
            f" them, found {', '.join(unknown[:_LISTED])}. Correct or remove them."
        )


def _skip_keys(skip: Collection[Any], source: Any) -> frozenset[str]:
    """Return the keys of skipped images, from paths relative to the source or as the errors print them."""
    directory = _root_of(source)
    keys = set()
    for entry in map(str, skip):
        row = _PRINTED_ROW.fullmatch(entry)
        path = Path(entry).expanduser()
        if row:
            keys.add(row[1])
        elif directory in path.parents or directory.absolute() in path.parents:
            below = directory if directory in path.parents else directory.absolute()
            keys.add(path.relative_to(below).as_posix())
        else:
            keys.add(PurePath(entry).as_posix())
    return frozenset(keys)


def _split(data: LabeledImages, recipe: Recipe) -> tuple[LabeledImages, LabeledImages]:
    """Split off `validation_share` of the images, of each class if there are classes, for validation."""
    if not recipe.validation_share:
        raise DataError(
            f"{data.where} has no validation part and validation_share is 0. Add a validation part, or raise"
            " validation_share."
        )
    rng = np.random.default_rng(recipe.seed)
    single = data.targets.ndim == 1
    groups = range(len(data.labels)) if single else [0]
    chosen = []
    for group in groups:
        members = np.flatnonzero(data.targets == group) if single else np.arange(len(data))
        if len(members) < 2:
            of_class = f" of the class {data.labels[group]}" if single else ""
            raise DataError(
                f"{data.where} has {len(members)} image{of_class}: expected at least two, one for training and one for"
                " validation."
            )
        share = min(max(1, round(recipe.validation_share * len(members))), len(members) - 1)
        chosen.append(rng.permutation(members)[:share])
    validation = np.sort(np.concatenate(chosen))
    training = np.setdiff1d(np.arange(len(data)), validation)
    where = data.where
    return data.select(training, f"{where}, for training"), data.select(validation, f"{where}, for validation")


def _leave_out(
    train: LabeledImages, validation: LabeledImages, root: Path, skip: Collection[str], before: Collection[str] = ()
) -> tuple[LabeledImages, LabeledImages]:
    """Leave images out of a run that has started, without moving the others to different steps.

    The images in `before` were left out when the run was started. Each skipped training image is replaced by another
    image of its class. Skipped validation images are removed.
    """
    keys = [[part.key(i, root) for i in range(len(part))] for part in (train, validation)]
    _check_skipped(skip, {*keys[0], *keys[1], *before}, root)
    kept, kept_validation = (np.array([key not in skip for key in part]) for part in keys)
    rows = np.arange(len(train))
    for index in np.flatnonzero(~kept):
        single = train.targets.ndim == 1
        others = np.flatnonzero(kept & (train.targets == train.targets[index])) if single else np.flatnonzero(kept)
        if not len(others):
            of_class = f" of the class {train.labels[train.targets[index]]}" if single else ""
            raise DataError(f"{train.where} would have no image{of_class} left. Skip fewer images.")
        rows[index] = others[index % len(others)]
    if not kept_validation.any():
        raise DataError(f"{validation.where} would have no image left. Skip fewer images.")
    return train.select(rows, train.where), validation.select(np.flatnonzero(kept_validation), validation.where)


def _check_images(data: LabeledImages, decode: bool) -> None:
    """Raise DataError unless every file has an image header, or with `decode`, unless every image can be decoded."""

    def find_problem(index: int) -> str | None:
        try:
            if decode:
                data.load(index)
            else:
                _check_header(data.images[index])
        except (DataError, ImageError, OSError) as error:
            return str(error)
        return None

    if not decode and not isinstance(data.images, list):
        return  # a dataset has no files whose headers could be read
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = [text for text in pool.map(find_problem, range(len(data))) if text]
    if problems:
        raise DataError(
            f"{len(problems)} of the {len(data)} images of {data.where} cannot be used:"
            f" {'; '.join(problems[:_LISTED])}. Repair, remove or skip them (skip=...)."
        )


def _read_skip_list(path: Path) -> frozenset[str]:
    """Return the entries of a skip list: one path or row per line."""
    lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    return frozenset(line.strip() for line in lines if line.strip())


@dataclass(frozen=True)
class _Shard:
    """The rows of each batch that a host reads: part `index` of `count` equal parts."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class _TrainingRows:
    """The rows that a host reads during a whole run, in order; a source for Grain.

    A batch has `accumulation` parts. Each host reads an equal range of rows of each part.
    """

    data: LabeledImages
    recipe: Recipe
    processor: LevitImageProcessor
    teacher_logits: np.ndarray | None = None  # [N L]
    shard: _Shard = _Shard()

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in one epoch. Images that do not fill a batch are dropped, different ones in each epoch."""
        return len(self.data) // self.recipe.batch_size

    @property
    def local_size(self) -> int:
        """Number of rows of a batch that this host reads."""
        return self.recipe.batch_size // self.shard.count

    @cached_property
    def _order(self) -> Any:
        # Hashed, because Grain adds the epoch to the seed: seed 1 would repeat the orders of seed 0, one epoch earlier.
        [seed] = np.random.SeedSequence(self.recipe.seed).generate_state(1)
        return grain.MapDataset.range(len(self.data)).shuffle(seed=int(seed))

    def __len__(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch * self.local_size

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        epoch, place = self.locate(row)
        index = self._order[epoch * len(self.data) + place // self.recipe.repeats]
        rng = np.random.default_rng([self.recipe.seed, epoch, place])
        record = {
            "pixels": _augment(self.data.load(index), rng, self.recipe, self.processor),
            "targets": self.data.targets[index],
        }
        if self.teacher_logits is not None:
            record["teacher_logits"] = self.teacher_logits[index]
        return record

    def locate(self, row: int) -> tuple[int, int]:
        """Return the epoch of one of the host's rows, and its index among all rows of the epoch."""
        step, row = divmod(row, self.local_size)
        epoch, step = divmod(step, self.steps_per_epoch)
        part_size = self.local_size // self.recipe.accumulation
        part, row = divmod(row, part_size)
        place = (part * self.shard.count + self.shard.index) * part_size + row
        return epoch, step * self.recipe.batch_size + place


def _training_batches(rows: _TrainingRows, threads: int, processes: int = 0, first: int = 0) -> Any:
    """Return an iterator over a host's batches from step `first`: dictionaries of arrays [A B ...].

    A run is resumed by its step alone, because Grain's iterator state would fix the number of processes.
    """
    parts = rows.recipe.accumulation

    def in_parts(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array.reshape(parts, -1, *array.shape[1:]) for name, array in batch.items()}

    dataset = grain.MapDataset.source(rows).batch(rows.local_size, drop_remainder=True)[first:].map(in_parts)
    # Each thread prepares one batch at a time. The buffer holds two batches for each thread.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = dataset.to_iter_dataset(options)
    if processes:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's workers read an absl flag, and this program does not use absl
            flags.FLAGS.mark_as_parsed()
        start = partial(_start_worker, Image.MAX_IMAGE_PIXELS)
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes), start)
    return iter(batches)


def _start_worker(max_pixels: int | None, *_: int) -> None:
    """Set the limit of image sizes, exit when the parent process exits, and ignore the signals that it handles."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _evaluation_batches(
    data: LabeledImages, processor: LevitImageProcessor, batch_size: int, shard: _Shard = _Shard()
) -> Iterator[dict[str, np.ndarray]]:
    """Yield a host's rows of batches that cover every image once; the last batch is padded with rows of weight 0.

    Yields:
        pixels [1 B H W C], targets [1 B ...] and weights [1 B].
    """
    local = batch_size // shard.count
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(data), batch_size):
            first = start + shard.index * local
            indices = np.arange(first, first + local)
            kept = np.minimum(indices, len(data) - 1)
            pixels = list(pool.map(lambda i: processor.resize_and_crop(data.load(i)), kept))
            yield {
                "pixels": np.stack(pixels)[None],
                "targets": data.targets[kept][None],
                "weights": (indices < len(data)).astype(np.float32)[None],
            }
