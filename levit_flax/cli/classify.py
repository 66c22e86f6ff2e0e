"""The command `levit-flax classify`."""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .exit_status import FAILED, WRONG_CALL
from .options import (
    DEFAULT_MODEL,
    DataRevisionOption,
    ImageColumnOption,
    JsonOption,
    MaxPixelsOption,
    ModelOption,
    OfflineOption,
    RevisionOption,
    RuntimeOption,
)
from .output import print_error, with_progress

if TYPE_CHECKING:
    from levit_flax.datasets import _DataOptions

_STANDARD_INPUT = "-"


def classify(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, directories to search for images, URLs, - for an image in standard input, or datasets:"
            " hfds/NAME[:CONFIG], hfids/NAME (streamed), tfds/NAME[:VERSION], or wds/SHARDS for tar files."
        ),
    ] = None,
    files_from: Annotated[
        str | None, typer.Option(help="File with one more path per line, or - for standard input.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes to print for each image.")] = 5,
    function_to_apply: Annotated[
        Literal["softmax", "sigmoid", "none"] | None,
        typer.Option(help="Compute the scores from the logits in this way; the default follows the model."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    runtime: RuntimeOption = "jax",
    split: Annotated[str | None, typer.Option(help="Split of a dataset, test by default.")] = None,
    data_revision: DataRevisionOption = None,
    image_column: ImageColumnOption = None,
    max_image_pixels: MaxPixelsOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the results as CSV.")] = False,
) -> None:
    """Classify images."""
    if as_json and as_csv:
        raise typer.BadParameter("expected --json or --csv, found both")
    from levit_flax.datasets import _DataOptions

    found, errors = _list_images(_all_paths(paths or [], files_from), _DataOptions(split, data_revision, image_column))
    if not found:
        _exit_with(errors, WRONG_CALL)
    from levit_flax.classifier import _FEW_IMAGES, ImageClassifier, _classify_rows
    from levit_flax.memory import keep_freed_memory

    keep_freed_memory()
    count = len(found) if all(isinstance(entry, str) for entry in found) else None
    classifier = ImageClassifier.from_pretrained(
        model,
        batch_size=batch_size,
        runtime=runtime,
        fast_start=count is not None and count <= _FEW_IMAGES,
        revision=revision,
        local_files_only=offline,
    )
    printer = _JsonPrinter() if as_json else _CsvPrinter() if as_csv else _TablePrinter()
    for path, logits in with_progress(_classify_rows(classifier, _open_images(found, errors)), count):
        if isinstance(logits, Exception):
            errors[path] = str(logits)
        else:
            printer.add(path, classifier.name(logits, top_k, function_to_apply=function_to_apply))
    printer.end()
    _exit_with(errors, FAILED)


def _exit_with(errors: dict[str, str], status: int) -> None:
    """Print the errors and exit with the status, if there are any."""
    for error in errors.values():
        print_error(error)
    if errors:
        raise typer.Exit(status)


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


class _CsvPrinter:
    """Print a header, and a row for each class of each image."""

    def __init__(self) -> None:
        self.writer = csv.writer(sys.stdout, lineterminator="\n")
        self.writer.writerow(["file", "rank", "label", "score"])

    def add(self, file: str, predictions: list[dict[str, Any]]) -> None:
        """Print the rows of one image."""
        for rank, prediction in enumerate(predictions, 1):
            self.writer.writerow([file, rank, prediction["label"], prediction["score"]])

    def end(self) -> None:
        """Print nothing."""


class _TablePrinter:
    """Print the name of each image, followed by one line per class."""

    def add(self, file: str, predictions: list[dict[str, Any]]) -> None:
        """Print the lines of one image."""
        print(file)
        for prediction in predictions:
            print(f"  {prediction['score']:.4f}  {prediction['label']}")

    def end(self) -> None:
        """Print nothing."""


def _all_paths(paths: Sequence[str], files_from: str | None) -> list[str]:
    """Return the paths of the command line and those that a file lists."""
    if files_from is None:
        if not paths:
            raise typer.BadParameter("expected paths of images, or --files-from")
        return list(paths)
    if files_from == _STANDARD_INPUT:
        if _STANDARD_INPUT in paths:
            raise typer.BadParameter("expected an image or a list of paths in standard input, found both")
        listed = sys.stdin.buffer.read()
    elif Path(files_from).is_file():
        listed = Path(files_from).read_bytes()
    else:
        raise typer.BadParameter(f"the list of paths {files_from} does not exist or is not a file")
    lines = (os.fsdecode(line) for line in listed.removeprefix(b"\xef\xbb\xbf").splitlines())  # names need not be text
    found = [*paths, *(line for line in lines if line)]
    if not found:
        raise typer.BadParameter(f"expected paths of images in {files_from}, found none")
    return found


def _list_images(
    paths: Sequence[str], options: "_DataOptions"
) -> tuple[list[str | Iterator[tuple[str, Any]]], dict[str, str]]:
    """Return the images to classify, and an error for each path without images.

    Images are paths, or for a dataset, an iterator of names and images.
    """
    from levit_flax.data_sources import _is_dataset, _read_images
    from levit_flax.datasets import _DataOptions, _image_files
    from levit_flax.image_sources import _URL_SCHEMES

    found: list[str | Iterator[tuple[str, Any]]] = []
    errors = {}
    for path in paths:
        local = Path(path)
        if path == _STANDARD_INPUT or path.lower().startswith(_URL_SCHEMES) or local.is_file():
            found.append(path)  # the classifier reports files that are not images
        elif _is_dataset(path):
            found.append(_read_images(path, options))
        elif local.is_dir():
            images = _image_files(local)
            found += map(str, images)
            if not images:
                errors[path] = f"The directory {path} contains no images."
        elif local.exists():
            found.append(path)
        else:
            errors[path] = f"The image {path} does not exist."
    if options != _DataOptions() and all(isinstance(entry, str) for entry in found):
        raise typer.BadParameter("expected a dataset, such as hfds/NAME, whose split, revision or column to read")
    return found, errors


def _open_images(found: Iterable[str | Iterator[tuple[str, Any]]], errors: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the name of each image, and the image as the classifier reads it.

    If a dataset cannot be read further, that is an error, and the next one is read.
    """
    from levit_flax.datasets import DataError

    for entry in found:
        if isinstance(entry, str):
            yield entry, sys.stdin.buffer.read() if entry == _STANDARD_INPUT else entry
        else:
            try:
                yield from entry
            except DataError as error:
                errors[str(error)] = str(error)
