"""Copies of a folder of labeled images as datasets that are read by name."""

from pathlib import Path
from typing import Any

from levit_flax.datasets import _read_folder


def _rows(folder: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the rows of a folder in its order, with the bytes of the files, and the class names."""
    data = _read_folder(folder)
    pairs = zip(data.images, data.targets.tolist(), strict=True)
    return [{"image": path.read_bytes(), "label": label} for path, label in pairs], data.labels


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
