"""`levit-flax convert`."""

from pathlib import Path
from typing import Annotated

import typer

from levit_flax.choices import WeightDType, WrittenLayout

from .options import ImageSizeOption, JsonOption, OfflineOption, RevisionOption
from .output import print_fields, print_json


def convert(
    source: Annotated[
        str, typer.Argument(help="Weight file, directory or Hub id of a PyTorch LeViT, or a converted model.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    to: Annotated[WrittenLayout | None, typer.Option(help="Write PyTorch weights in this layout instead.")] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Fold the batch norms: faster, for inference only.")] = False,
    merge_heads: Annotated[
        bool, typer.Option("--merge-heads", help="Make one head of two, with their average as its logits.")
    ] = False,
    ema: Annotated[
        bool, typer.Option("--ema", help="Of a training checkpoint, take the averaged weights (model_ema).")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch on seeded inputs, if installed.")
    ] = True,
    dtype: Annotated[WeightDType | None, typer.Option(help="Type of the weights; the file's own if left out.")] = None,
    image_size: ImageSizeOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a PyTorch checkpoint into a model directory or back, with a report that proves it right."""
    from levit_flax.convert import workflow
    from levit_flax.hub import HubOptions

    report = workflow.convert_to_directory(
        source,
        out,
        layout=to,
        dtype=dtype,
        image_size=image_size,
        ema=ema,
        fold=fold,
        merge=merge_heads,
        verify=verify,
        options=HubOptions(revision, local_files_only=offline),
        overwrite=force,
    )
    if as_json:
        print_json({**report, "out": str(out)})
    else:
        print_fields(workflow.summary(report))
        print(f"written to {out}")
