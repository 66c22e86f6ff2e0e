"""The command `levit-flax export`."""

from pathlib import Path
from typing import Annotated

import typer

from levit_flax.choices import _KNOWN_PLATFORMS, _PLATFORMS, _ExportFormat

from .options import DEFAULT_MODEL, ImageSizeOption, ModelOption, OfflineOption, RevisionOption


def export(
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    model: ModelOption = DEFAULT_MODEL,
    format: Annotated[
        _ExportFormat, typer.Option(help="Format: StableHLO runs in JAX, ONNX in onnxruntime, and OpenVINO in itself.")
    ] = "stablehlo",
    platforms: Annotated[
        str,
        typer.Option(help=f"Platforms of a StableHLO artifact, separated by commas: {', '.join(_KNOWN_PLATFORMS)}."),
    ] = ",".join(_PLATFORMS),
    image_size: ImageSizeOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the artifact in OUT.")] = False,
) -> None:
    """Export a model as an artifact that runs without levit-flax."""
    from levit_flax.classifier import ImageClassifier
    from levit_flax.export import export_model
    from levit_flax.files import _check_free

    _check_free(out, overwrite=force)
    classifier = ImageClassifier.from_pretrained(
        model, image_size=image_size, revision=revision, local_files_only=offline
    )
    export_model(
        out,
        classifier.model,
        classifier.variables,
        classifier.processor,
        format=format,
        platforms=platforms.split(","),
        overwrite=force,
    )
    print(f"written to {out}")
