"""The command `levit-flax explain`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DEFAULT_MODEL, MaxPixelsOption, ModelOption, OfflineOption, RevisionOption

_FORMATS = ("png", "jpg", "pdf", "svg")


def explain(
    output: Annotated[
        Path, typer.Option("--output", "-o", help=f"Figure to write: {', '.join(_FORMATS)}, by the name of the file.")
    ],
    image: Annotated[Path | None, typer.Argument(help="Image to explain; none with --biases.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    label: Annotated[str | None, typer.Option(help="Class to explain; the default is the most likely class.")] = None,
    biases: Annotated[bool, typer.Option("--biases", help="Draw the model's attention biases instead.")] = False,
    max_image_pixels: MaxPixelsOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Draw the class activation, the gradient and the attention behind a prediction."""
    kind = output.suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise typer.BadParameter(f"expected a file name that ends in {', '.join(_FORMATS)}, found {output.name}")
    if biases == (image is not None):
        raise typer.BadParameter("expected an image, or --biases without an image")
    from levit_flax import visualize

    visualize._new_figure(1, 1)  # fails before the work if Matplotlib is missing
    if image is not None and not image.is_file():
        raise FileNotFoundError(f"The image {image} does not exist.")
    from levit_flax.classifier import ImageClassifier
    from levit_flax.files import _write_atomically

    classifier = ImageClassifier.from_pretrained(model, revision=revision, local_files_only=offline)
    if image is None:
        figure = visualize.draw_bias_tables(classifier.model, classifier.variables)
    else:
        figure = visualize.explain(classifier, image, label)
    _write_atomically(output, lambda file: figure.savefig(file, format=kind))
    print(f"written to {output}")
