"""The command `levit-flax evaluate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from levit_flax.choices import _CropRule

from .options import (
    DEFAULT_MODEL,
    DataRevisionOption,
    ImageColumnOption,
    ImageSizeOption,
    JsonOption,
    LabelColumnOption,
    MaxPixelsOption,
    ModelOption,
    OfflineOption,
    RevisionOption,
    RuntimeOption,
)
from .output import print_error, print_fields, print_json, with_progress

if TYPE_CHECKING:
    from levit_flax.evaluation import Evaluation


def evaluate(  # long: its parameters are the options, with their help
    data: Annotated[
        str,
        typer.Argument(
            help="Directory with one folder per class, or a dataset: hfds/NAME[:CONFIG], hfids/NAME (streamed),"
            " tfds/NAME[:VERSION], or wds/SHARDS for tar files."
        ),
    ],
    model: ModelOption = DEFAULT_MODEL,
    crop: Annotated[
        _CropRule, typer.Option(help="Resize and crop images as the model's processor or the named library does.")
    ] = "model",
    split: Annotated[
        str | None, typer.Option(help="Split of a dataset, test by default; or a folder in the directory.")
    ] = None,
    data_revision: DataRevisionOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    runtime: RuntimeOption = "jax",
    max_image_pixels: MaxPixelsOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write metrics.json, confusion.csv and confusion.png to.")
    ] = None,
    image_size: ImageSizeOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the accuracy of a model on labeled images."""
    from levit_flax import evaluation, files
    from levit_flax.classifier import _FEW_IMAGES, ImageClassifier, _classify_rows
    from levit_flax.datasets import LabeledImages
    from levit_flax.memory import keep_freed_memory

    keep_freed_memory()
    if output is not None:
        from levit_flax.visualize import _new_figure

        _new_figure(1, 1)  # fails before the evaluation if Matplotlib is missing
        files._make_directory(output)
    loaded = ImageClassifier.from_pretrained(model, image_size=image_size, revision=revision, local_files_only=offline)
    processor = evaluation.evaluation_processor(crop, loaded.processor)
    labeled = evaluation.read_data(
        data,
        loaded.model.config.id2label,
        split,
        data_revision=data_revision,
        image_column=image_column,
        label_column=label_column,
    )
    count = len(labeled) if isinstance(labeled, LabeledImages) else None
    classifier = ImageClassifier(
        loaded.model,
        loaded.variables,
        processor,
        batch_size,
        runtime=runtime,
        fast_start=count is not None and count <= _FEW_IMAGES,
    )
    results = with_progress(_classify_rows(classifier, evaluation._rows_of(labeled)), count)
    result = evaluation._evaluate(classifier, labeled, results)
    numbers = {"model": model, "data": data, "crop": crop, **result.to_dict()}
    if output is not None:
        _write_numbers(output, numbers, result)
    if as_json:
        print_json(numbers)
    else:
        print_fields({**numbers, "broken": len(result.broken) or None})
    for error in result.broken:
        print_error(error)
    if output is not None:
        _write_figure(output, result)
    if result.broken:
        raise typer.Exit(1)


def _write_numbers(output: Path, numbers: dict[str, Any], result: "Evaluation") -> None:
    """Write the numbers and the confusion matrix."""
    from levit_flax import files

    files._write_text(output / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    files._write_text(output / "confusion.csv", result.confusion_csv())


def _write_figure(output: Path, result: "Evaluation") -> None:
    """Write the confusion matrix as a figure, after everything that a failure must not lose."""
    from levit_flax import files
    from levit_flax.visualize import draw_confusion

    figure = draw_confusion(result.confusion, result.labels)
    files._write_atomically(output / "confusion.png", lambda file: figure.savefig(file, format="png"))
