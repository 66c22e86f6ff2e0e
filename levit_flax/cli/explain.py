"""The command `levit-flax explain`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DEFAULT_MODEL, ModelOption, OfflineOption, RevisionOption


def explain(
    image: Annotated[Path, typer.Argument(help="Image to explain.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")],
    model: ModelOption = DEFAULT_MODEL,
    label: Annotated[str | None, typer.Option(help="Class to explain; the default is the most likely class.")] = None,
    biases: Annotated[bool, typer.Option("--biases", help="Draw the model's attention biases instead.")] = False,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Draw the class activation, the gradient and the attention behind a prediction."""
    from levit_flax import visualize
    from levit_flax.classifier import ImageClassifier
    from levit_flax.files import _write_atomically

    classifier = ImageClassifier.from_pretrained(model, revision=revision, local_files_only=offline)
    if biases:
        figure = visualize.draw_bias_tables(classifier.model, classifier.variables)
    else:
        figure = visualize.explain(classifier, image, label)
    _write_atomically(output, lambda file: figure.savefig(file, format="png"))
    print(f"written to {output}")
