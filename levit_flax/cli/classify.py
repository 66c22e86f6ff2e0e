"""`levit-flax classify`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DEFAULT_MODEL, JsonOption, ModelOption, OfflineOption, RevisionOption
from .output import print_error, with_progress


def classify(
    paths: Annotated[list[Path], typer.Argument(help="Images, and folders that are searched for images.")],
    model: ModelOption = DEFAULT_MODEL,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 5,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Name what is in images."""
    from levit_flax.classifier import ImageClassifier
    from levit_flax.memory import keep_freed_memory

    keep_freed_memory()
    files, broken = list_images(paths)
    classifier = ImageClassifier.from_pretrained(model, revision=revision, local_files_only=offline)
    show = JsonList() if as_json else PredictionTable()
    for path, logits in zip(files, with_progress(classifier.stream_logits(files), len(files)), strict=True):
        if isinstance(logits, Exception):
            broken[str(path)] = str(logits)
        else:
            show.add(str(path), classifier.name(logits, top_k))
    show.end()
    for reason in broken.values():
        print_error(reason)
    if broken:
        raise typer.Exit(1)


class JsonList:
    """Print a JSON list with an object for each image, as they come."""

    def __init__(self) -> None:
        self.separator = "["

    def add(self, file: str, predictions: list[dict[str, Any]]) -> None:
        """Print one image's object."""
        print(self.separator + "\n  " + json.dumps({"file": file, "predictions": predictions}), end="")
        self.separator = ","

    def end(self) -> None:
        """Close the list."""
        print("[]" if self.separator == "[" else "\n]")


class PredictionTable:
    """Print a line for each class named, as they come, the image's name before the first."""

    def add(self, file: str, predictions: list[dict[str, Any]]) -> None:
        """Print one image's lines."""
        print(file)
        for prediction in predictions:
            print(f"  {prediction['score']:.4f}  {prediction['label']}")

    def end(self) -> None:
        """Print nothing more."""


def list_images(paths: Sequence[Path]) -> tuple[list[Path], dict[str, str]]:
    """Return the files to classify, folders searched in depth and in order, and what is wrong with the rest."""
    from levit_flax.datasets import image_files

    files, broken = [], {}
    for path in paths:
        if not path.is_dir():
            files.append(path)  # whatever it is: if it is no image, its reader says so
            continue
        found = image_files(path)
        files += found
        if not found:
            broken[str(path)] = f"The folder {path} holds no images."
    return files, broken
