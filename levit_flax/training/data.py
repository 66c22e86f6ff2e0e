"""Labeled images for training: found, checked, shuffled, augmented and batched, the same way on every host.

The order of the images and all randomness follow from the recipe's seed and the place in the training, never from
threads, processes or hosts: whatever reads them, a step sees the same images.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np

from levit_flax.datasets import DataError, LabeledImages, load_dataset, read_folder, read_split
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.images import ImageError, check_header

from .augmentation import augment
from .recipe import Recipe

TRAIN_FOLDER = "train"
VALIDATION_FOLDERS = ("validation", "val", "valid", "test")
NAMED = 5  # unusable images that a message names


def read_images(
    source: str | Path, recipe: Recipe, skip: Collection[str] = (), check: bool = False
) -> tuple[LabeledImages, LabeledImages]:
    """Find the images to train on and those to validate on.

    Args:
        source: a directory with a folder for each class; one with `train` and `validation` (or `val`, `valid`, `test`)
            that hold a folder for each class; or a Hugging Face dataset by name (needs `datasets`).
        recipe: gives the share to hold back, and the seed, where there is no part for validation.
        skip: images to leave out: paths relative to the source, or rows of a dataset such as "train/17".
        check: decode every image first, rather than only read its header.

    Raises:
        DataError: there are too few images or classes, the two parts differ in their classes, or images cannot be
            used.
        ImportError: a dataset is asked for, and `datasets` is not installed.

    Example:
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
    parts = find_images(source, recipe, skip)
    for part in parts:
        check_images(part, decode=check)
    return parts


def find_images(source: str | Path, recipe: Recipe, skip: Collection[str]) -> tuple[LabeledImages, LabeledImages]:
    """Do what `read_images` does, but for looking into the files."""
    directory = Path(source).expanduser()
    parts = read_folders(directory, skip) if directory.is_dir() else read_dataset(str(source), skip)
    train = parts[TRAIN_FOLDER]
    if train.labels and len(train.labels) < 2:
        raise DataError(f"{train.where} has one class, {train.labels[0]}: expected two or more to tell apart.")
    if len(parts) == 1:
        train, validation = split(train, recipe)
    else:
        validation = next(part for name, part in parts.items() if name != TRAIN_FOLDER)
        if validation.labels != train.labels:
            odd = sorted(set(train.labels) ^ set(validation.labels))
            found = f"{', '.join(odd[:NAMED])} is in one only" if odd else "their order is another"
            raise DataError(
                f"{train.where} has {len(train.labels)} classes and {validation.where} {len(validation.labels)}:"
                f" expected the same, but {found}."
            )
    for part in (train, validation):
        if not len(part):
            raise DataError(f"{part.where} has no images: expected one or more.")
    return train, validation


def read_folders(directory: Path, skip: Collection[str]) -> dict[str, LabeledImages]:
    """Return the parts of a directory by name, of which one is "train"."""
    if not (directory / TRAIN_FOLDER).is_dir():
        return {TRAIN_FOLDER: read_folder(directory, skip=skip)}
    other = next((name for name in VALIDATION_FOLDERS if (directory / name).is_dir()), None)
    names = (TRAIN_FOLDER, other) if other else (TRAIN_FOLDER,)
    return {name: read_folder(directory / name, directory, skip) for name in names}


def read_dataset(name: str, skip: Collection[str] = ()) -> dict[str, LabeledImages]:
    """Return the parts of a Hugging Face dataset by name, of which one is "train"."""
    found = load_dataset(name)
    if TRAIN_FOLDER not in found:
        raise DataError(f"The dataset {name} has the splits {', '.join(found)}: expected one named {TRAIN_FOLDER}.")
    other = next((part for part in VALIDATION_FOLDERS if part in found), None)
    names = (TRAIN_FOLDER, other) if other else (TRAIN_FOLDER,)
    parts = {part: read_split(found[part], name, part) for part in names}
    if not skip:
        return parts
    return {
        part: rows.select([i for i in range(len(rows)) if rows.key(i) not in skip], rows.where)
        for part, rows in parts.items()
    }


def split(images: LabeledImages, recipe: Recipe) -> tuple[LabeledImages, LabeledImages]:
    """Hold back a share of the images, of each class where there are classes, for validation."""
    if not recipe.validation_share:
        raise DataError(
            f"{images.where} has no part for validation and validation_share is 0: expected one of the two."
        )
    rng = np.random.default_rng(recipe.seed)
    single = images.targets.ndim == 1
    groups = range(len(images.labels)) if single else [0]
    held = []
    for group in groups:
        members = np.flatnonzero(images.targets == group) if single else np.arange(len(images))
        if len(members) < 2:
            of = f" of the class {images.labels[group]}" if single else ""
            raise DataError(
                f"{images.where} has {len(members)} image{of}: expected at least two, one to train on and one to"
                " validate on."
            )
        share = min(max(1, round(recipe.validation_share * len(members))), len(members) - 1)
        held.append(rng.permutation(members)[:share])
    back = np.sort(np.concatenate(held))
    rest = np.setdiff1d(np.arange(len(images)), back)
    where = images.where
    return images.select(rest, f"{where}, for training"), images.select(back, f"{where}, for validation")


def leave_out(
    train: LabeledImages, validation: LabeledImages, root: Path, skip: Collection[str]
) -> tuple[LabeledImages, LabeledImages]:
    """Leave images out of a training that has begun, while all others keep their places in it.

    Args:
        train: the images to train on; one that is left out gives its place to another one of its class.
        validation: the images to validate on.
        root: the directory that paths are relative to.
        skip: the images to leave out, as in `read_images`.

    Raises:
        DataError: a class would be left without images to train on, or nothing would be left to validate on.
    """
    kept, kept_back = (
        np.array([part.key(i, root) not in skip for i in range(len(part))]) for part in (train, validation)
    )
    places = np.arange(len(train))
    for index in np.flatnonzero(~kept):
        single = train.targets.ndim == 1
        others = np.flatnonzero(kept & (train.targets == train.targets[index])) if single else np.flatnonzero(kept)
        if not len(others):
            of = f" of the class {train.labels[train.targets[index]]}" if single else ""
            raise DataError(f"{train.where} would have no image{of} left: leave out fewer.")
        places[index] = others[index % len(others)]
    if not kept_back.any():
        raise DataError(f"{validation.where} would have no image left: leave out fewer.")
    return train.select(places, train.where), validation.select(np.flatnonzero(kept_back), validation.where)


def check_images(images: LabeledImages, decode: bool) -> None:
    """Raise DataError unless every file has an image's header or, where asked for, can be decoded."""

    def fault(index: int) -> str | None:
        try:
            if decode:
                images.load(index)
            else:
                check_header(images.images[index])
        except (DataError, ImageError, OSError) as error:
            return str(error)
        return None

    if not decode and not isinstance(images.images, list):
        return  # the rows of a dataset have no headers
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [text for text in pool.map(fault, range(len(images))) if text]
    if faults:
        raise DataError(
            f"{len(faults)} of the {len(images)} images of {images.where} cannot be used:"
            f" {'; '.join(faults[:NAMED])}. Mend or remove them, or list their paths in a file for --skip."
        )


def read_skip_list(path: Path) -> frozenset[str]:
    """Read the paths of images to leave out, one a line, relative to the data."""
    lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    return frozenset(line.strip() for line in lines if line.strip())


@dataclass(frozen=True)
class Shard:
    """Which of the rows of each batch a host reads."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class TrainingRows:
    """Every row that a host reads in a whole training, in order: a source for Grain.

    A batch has `accumulation` parts, of which each host reads an equal range of rows.
    """

    images: LabeledImages
    recipe: Recipe
    processor: LevitImageProcessor
    teacher_logits: np.ndarray | None = None  # [N L]
    shard: Shard = Shard()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch; images that do not fill a batch are left out, others in each epoch."""
        return len(self.images) // self.recipe.batch_size

    @property
    def local_size(self) -> int:
        """Rows of a batch that this host reads."""
        return self.recipe.batch_size // self.shard.count

    @cached_property
    def _order(self) -> Any:
        # Grain adds the epoch to the seed: neighboring seeds would have most of their orders in common.
        [seed] = np.random.SeedSequence(self.recipe.seed).generate_state(1)
        return grain.MapDataset.range(len(self.images)).shuffle(seed=int(seed))

    def __len__(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch * self.local_size

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        epoch, place = self.locate(row)
        index = self._order[epoch * len(self.images) + place // self.recipe.repeats]
        rng = np.random.default_rng([self.recipe.seed, epoch, place])
        record = {
            "pixels": augment(self.images.load(index), rng, self.recipe, self.processor),
            "targets": self.images.targets[index],
        }
        if self.teacher_logits is not None:
            record["teacher_logits"] = self.teacher_logits[index]
        return record

    def locate(self, row: int) -> tuple[int, int]:
        """Return the epoch of a host's row, and its place among all rows of the epoch."""
        step, row = divmod(row, self.local_size)
        epoch, step = divmod(step, self.steps_per_epoch)
        part_size = self.local_size // self.recipe.accumulation
        part, row = divmod(row, part_size)
        place = (part * self.shard.count + self.shard.index) * part_size + row
        return epoch, step * self.recipe.batch_size + place


def training_batches(rows: TrainingRows, threads: int, processes: int = 0, first: int = 0) -> Any:
    """Return an iterator over a host's batches: dictionaries of arrays [A B ...], one for each step of the training.

    It is Grain's. The step is all of its state: Grain's own would bind a training to the number of its processes.

    Args:
        rows: what to read.
        threads: that decode and augment images, in each process.
        processes: that do so beside this one; 0 for none.
        first: the step to begin with.
    """
    parts = rows.recipe.accumulation

    def in_parts(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array.reshape(parts, -1, *array.shape[1:]) for name, array in batch.items()}

    dataset = grain.MapDataset.source(rows).batch(rows.local_size, drop_remainder=True)[first:].map(in_parts)
    # One thread makes one batch; twice as many batches wait as there are threads.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = dataset.to_iter_dataset(options)
    if processes:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's processes read a flag of absl's, which this program does not use
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes), follow_parent)
    return iter(batches)


def follow_parent(*_: int) -> None:
    """Have this process end when the one that it reads images for does, and leave the signals to that one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def evaluation_batches(
    images: LabeledImages, processor: LevitImageProcessor, batch_size: int, shard: Shard = Shard()
) -> Iterator[dict[str, np.ndarray]]:
    """Yield a host's part of every image in batches, the last one filled up with weight 0.

    Yields:
        pixels [1 B H W C], targets [1 B ...] and weights [1 B].
    """
    local = batch_size // shard.count
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), batch_size):
            first = start + shard.index * local
            indices = np.arange(first, first + local)
            kept = np.minimum(indices, len(images) - 1)
            pixels = list(pool.map(lambda i: processor.resize_and_crop(images.load(i)), kept))
            yield {
                "pixels": np.stack(pixels)[None],
                "targets": images.targets[kept][None],
                "weights": (indices < len(images)).astype(np.float32)[None],
            }
