"""The command `levit-flax convert`."""

from pathlib import Path
from typing import Annotated

import typer

from levit_flax.choices import _WeightDType, _WrittenLayout

from .options import ImageSizeOption, JsonOption, OfflineOption, RevisionOption, SourceImageSizeOption
from .output import print_fields, print_json


def convert(
    source: Annotated[
        str, typer.Argument(help="Weight file, directory or Hub id of a PyTorch LeViT, or a converted model directory.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    to: Annotated[
        _WrittenLayout | None, typer.Option(help="Write PyTorch weights in this layout instead of Flax weights.")
    ] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Fold the batch norms: faster, but only for inference.")] = False,
    merge_heads: Annotated[
        bool, typer.Option("--merge-heads", help="Merge the two heads into one that averages their logits.")
    ] = False,
    ema: Annotated[
        bool, typer.Option("--ema", help="Convert the averaged weights (model_ema) of a training checkpoint.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch on seeded inputs, if it is installed.")
    ] = True,
    dtype: Annotated[
        _WeightDType | None, typer.Option(help="Dtype of the weights; the default is the checkpoint's.")
    ] = None,
    source_image_size: SourceImageSizeOption = None,
    image_size: ImageSizeOption = None,
    prefix: Annotated[
        str | None, typer.Option(help="Prefix of the model's tensor names, if the checkpoint has several models.")
    ] = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a PyTorch checkpoint to a model directory or back, and verify it."""
    from levit_flax.convert import workflow
    from levit_flax.hub import _HubOptions

    report = workflow._convert_to_directory(
        source,
        out,
        layout=to,
        dtype=dtype,
        source_image_size=source_image_size,
        image_size=image_size,
        ema=ema,
        prefix=prefix,
        fold=fold,
        merge=merge_heads,
        verify=verify,
        options=_HubOptions(revision, local_files_only=offline),
        overwrite=force,
    )
    if as_json:
        print_json({**report.to_dict(), "out": str(out)})
    else:
        print_fields(report.summary())
        print(f"written to {out}")
