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
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize to int8; for ONNX and OpenVINO, with --calibration.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Folder with one folder of images per class, to calibrate and to measure the accuracy."),
    ] = None,
    max_drop: Annotated[float, typer.Option(help="Largest accepted drop of the accuracy, in percentage points.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace the artifact in OUT.")] = False,
) -> None:
    """Export a model as an artifact that runs without levit-flax."""
    if int8 != (calibration is not None):
        raise typer.BadParameter("expected --int8 and --calibration together")
    if int8 and format == "stablehlo":
        raise typer.BadParameter("--int8 needs --format onnx or openvino, found stablehlo")
    from levit_flax.classifier import ImageClassifier
    from levit_flax.export import export_model
    from levit_flax.files import _check_free

    _check_free(out, overwrite=force)
    classifier = ImageClassifier.from_pretrained(
        model, image_size=image_size, revision=revision, local_files_only=offline
    )
    images = None
    if calibration is not None:
        from levit_flax.datasets import LabeledImages
        from levit_flax.evaluation import read_data

        if not calibration.is_dir():
            raise FileNotFoundError(
                f"The folder {calibration} does not exist: expected one folder of images per class."
            )
        data = read_data(calibration, classifier.model.config.id2label)
        images = data if isinstance(data, LabeledImages) else None  # a folder is not a stream
    export_model(
        out,
        classifier.model,
        classifier.variables,
        classifier.processor,
        format=format,
        platforms=platforms.split(","),
        overwrite=force,
        calibration=images,
        max_drop=max_drop,
    )
    print(f"written to {out}")
