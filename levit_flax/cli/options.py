"""Options that several commands share."""

from typing import Annotated, Any

import typer

from levit_flax.choices import _Runtime
from levit_flax.config_values import _MOST_PIXELS

DEFAULT_MODEL = "facebook/levit-128S"


def _parse_image_size(text: str) -> int | tuple[int, int]:
    """Read "224" or "224x320"."""
    sides = text.lower().split("x")
    if not all(side.isdecimal() for side in sides) or len(sides) > 2:
        raise typer.BadParameter(f"expected SIDE or HEIGHTxWIDTH in pixels, such as 224 or 224x320, found {text!r}")
    if not all(1 <= int(side) <= _MOST_PIXELS for side in sides):
        raise typer.BadParameter(f"expected sides from 1 to {_MOST_PIXELS} pixels, found {text:.40}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Model directory or Hub id; cifar10 is the small model in the package.")
]
ImageSizeOption = Annotated[
    Any,
    typer.Option(
        parser=_parse_image_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="Input size in pixels, to which the model is resized; the default is the checkpoint's.",
    ),
]
SourceImageSizeOption = Annotated[
    Any,
    typer.Option(
        parser=_parse_image_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="Input size of the checkpoint, if its attention biases fit several sizes and it has no config.",
    ),
]
ImageColumnOption = Annotated[str | None, typer.Option(help="Image column of a dataset, if it has several.")]
LabelColumnOption = Annotated[str | None, typer.Option(help="Label column of a dataset, if it has several.")]
DataRevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face dataset.")]
RuntimeOption = Annotated[
    _Runtime, typer.Option(help="Library that computes; OpenVINO and onnxruntime are faster on many CPUs.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use cached files only, without network access.")]


def _set_max_pixels(value: int | None) -> int | None:
    """Set the limit of image sizes in this process."""
    if value is not None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = value
    return value


MaxPixelsOption = Annotated[
    int | None,
    typer.Option(
        "--max-image-pixels",
        min=1,
        callback=_set_max_pixels,
        help="Pixels of the largest image that is decoded; the default is Pillow's limit, 89 million.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
