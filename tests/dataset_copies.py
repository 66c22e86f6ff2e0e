"""Copies of a folder of labeled images as datasets that are read by name."""

import io
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from levit_flax.datasets import _read_folder


def _rows(folder: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the rows of a folder in its order, with the bytes of the files, and the class names."""
    data = _read_folder(folder)
    pairs = zip(data.images, data.targets.tolist(), strict=True)
    return [{"image": path.read_bytes(), "label": label} for path, label in pairs], data.labels


class Pairs:
    """A folder as pairs of an image and a class index; neither iterable nor a `collections.abc.Sequence`."""

    def __init__(self, folder: Path) -> None:
        data = _read_folder(folder)
        self.paths, self.targets, self.classes = data.images, data.targets, list(data.labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB"), int(self.targets[index])


def copy_to_records(splits: dict[str, Path], directory: Path) -> str:
    """Write folders as the splits of a dataset of TensorFlow Datasets in TFDS_DATA_DIR, and return its source."""
    import tensorflow_datasets as tfds

    labels = _rows(next(iter(splits.values())))[1]
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=list(labels))}
    return prepare_records({split: _rows(folder)[0] for split, folder in splits.items()}, features, directory)


def prepare_records(
    rows: dict[str, list[dict[str, Any]]], features: dict[str, Any], directory: Path, file_format: str = "array_record"
) -> str:
    """Write rows as the splits of a dataset of TensorFlow Datasets in TFDS_DATA_DIR, and return its source."""
    import tensorflow_datasets as tfds

    class Zoo(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            columns = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=columns, disable_shuffling=True)

        def _split_generators(self, _):
            return {split: enumerate(part) for split, part in rows.items()}

        def _generate_examples(self): ...

    tfds.display_progress_bar(False)
    Zoo(data_dir=directory, file_format=file_format).download_and_prepare()
    return "tfds/zoo"


def copy_to_tar(folder: Path, directory: Path) -> str:
    """Write a folder as a WebDataset of two shards, with the indices of the folder's classes; return its source."""
    directory.mkdir(parents=True)
    rows, _ = _rows(folder)
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        files = {}
        for i, row in enumerate(part):
            files |= {f"{i:04}.png": row["image"], f"{i:04}.cls": str(row["label"]).encode(), f"{i:04}.json": b"{}"}
        write_tar(directory / f"zoo-{shard:02}.tar", files)
    return f"wds/{directory}/zoo-{{00..01}}.tar"


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """Write a tar file, compressed if the name says so."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def copy_to_parquet(splits: dict[str, Path], directory: Path) -> str:
    """Write folders as the splits of a Hugging Face dataset, and return its source."""
    import datasets

    (directory / "data").mkdir(parents=True)
    for split, folder in splits.items():
        rows, labels = _rows(folder)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(labels))})
        encoded = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
        path = directory / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(encoded, features=features).to_parquet(path)
    return f"hfds/{directory}"
