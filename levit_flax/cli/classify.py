"""The command `levit-flax classify`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DEFAULT_MODEL, JsonOption, ModelOption, OfflineOption, RevisionOption
from .output import print_error, with_progress


def classify(
    paths: Annotated[list[Path], typer.Argument(help="Images, and directories to search for images.")],
    model: ModelOption = DEFAULT_MODEL,
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes to print for each image.")] = 5,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Classify images."""
    from levit_flax.classifier import _FEW_IMAGES, ImageClassifier
    from levit_flax.memory import keep_freed_memory

    keep_freed_memory()
    files, errors = _list_images(paths)
    classifier = ImageClassifier.from_pretrained(
        model, fast_start=len(files) <= _FEW_IMAGES, revision=revision, local_files_only=offline
    )
    printer = _JsonPrinter() if as_json else _TablePrinter()
    for path, logits in zip(files, with_progress(classifier.stream_logits(files), len(files)), strict=True):
        if isinstance(logits, Exception):
            errors[str(path)] = str(logits)
        else:
            printer.add(str(path), classifier.name(logits, top_k))
    printer.end()
    for error in errors.values():
        print_error(error)
    if errors:
        raise typer.Exit(1)


class _JsonPrinter:
    """Print a JSON list with one object per image, as soon as each result is known."""

    def __init__(self) -> None:
        self.separator = "["

    def add(self, file: str, predictions: list[dict[str, Any]]) -> None:
        """Print the object of one image."""
        print(self.separator + "\n  " + json.dumps({"file": file, "predictions": predictions}), end="")
        self.separator = ","

    def end(self) -> None:
        """Close the list."""
        print("[]" if self.separator == "[" else "\n]")


class _TablePrinter:
    """Print the name of each image, followed by one line per class."""

    def add(self, file: str, predictions: list[dict[str, Any]]) -> None:
        """Print the lines of one image."""
        print(file)
        for prediction in predictions:
            print(f"  {prediction['score']:.4f}  {prediction['label']}")

    def end(self) -> None:
        """Print nothing."""


def _list_images(paths: Sequence[Path]) -> tuple[list[Path], dict[str, str]]:
    """Return the files to classify, and an error for each directory without images."""
    from levit_flax.datasets import _image_files

    files, errors = [], {}
    for path in paths:
        if not path.is_dir():
            files.append(path)  # the classifier reports files that are not images
            continue
        images = _image_files(path)
        files += images
        if not images:
            errors[str(path)] = f"The directory {path} contains no images."
    return files, errors
