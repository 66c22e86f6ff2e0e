"""`levit-flax evaluate`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from levit_flax.choices import CropRule

from .options import DEFAULT_MODEL, ImageSizeOption, JsonOption, ModelOption, OfflineOption, RevisionOption
from .output import print_error, print_fields, print_json, with_progress


def evaluate(
    data: Annotated[str, typer.Argument(help="Directory with a folder for each class, or a Hugging Face dataset.")],
    model: ModelOption = DEFAULT_MODEL,
    crop: Annotated[CropRule, typer.Option(help="How images are resized and cropped.")] = "model",
    split: Annotated[str, typer.Option(help="Part of a Hugging Face dataset.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed at once.")] = 64,
    output: Annotated[
        Path | None, typer.Option(help="Directory for metrics.json, confusion.csv and confusion.png.")
    ] = None,
    image_size: ImageSizeOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how often a model is right."""
    from levit_flax import evaluation, files
    from levit_flax.classifier import ImageClassifier
    from levit_flax.memory import keep_freed_memory

    keep_freed_memory()
    if output is not None:
        from levit_flax.visualize import draw_confusion, new_figure

        new_figure(1, 1)  # what is missing for the images is said before the work, not after it
        files.make_directory(output)
    loaded = ImageClassifier.from_pretrained(model, image_size=image_size, revision=revision, local_files_only=offline)
    processor = evaluation.evaluation_processor(crop, loaded.processor)
    classifier = ImageClassifier(loaded.model, loaded.variables, processor, batch_size)
    labeled = evaluation.read_data(data, classifier.model.config.id2label, split)
    labeled = dataclasses.replace(labeled, images=with_progress(labeled.images, len(labeled)))
    result = evaluation.evaluate(classifier, labeled)
    numbers = {"model": model, "data": data, "crop": crop, **result.to_dict()}
    if output is not None:
        texts = {"metrics.json": json.dumps(numbers, indent=2) + "\n", "confusion.csv": result.confusion_csv()}
        for name, text in texts.items():
            files.write_text(output / name, text)
        figure = draw_confusion(result.confusion, result.labels)
        files.write_atomically(output / "confusion.png", lambda file: figure.savefig(file, format="png"))
    if as_json:
        print_json(numbers)
    else:
        print_fields({**numbers, "broken": len(result.broken) or None})
    for reason in result.broken:
        print_error(reason)
    if result.broken:
        raise typer.Exit(1)
