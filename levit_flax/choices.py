"""Valid values of arguments, shared by the library and the command line.

This module does not import JAX, so that the command line can list the values in its help without waiting for it.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args


class _CallError(ValueError):
    """The base class of errors that only a changed call can avoid. The command line exits with 2."""


def _suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the known name that is most similar, or an empty string."""
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return f" Did you mean {by_lower[close[0]]}?" if close else ""


# Layouts of PyTorch checkpoints that can be written.
_WrittenLayout = Literal["hf", "timm", "timm_conv", "facebook"]
WRITTEN_LAYOUTS: tuple[_WrittenLayout, ...] = get_args(_WrittenLayout)

# Dtypes that weights can be converted to.
_WeightDType = Literal["float32", "float16", "bfloat16"]

# Rules for resizing and cropping images in an evaluation.
_CropRule = Literal["model", "hf", "torchvision", "timm"]
_CROP_RULES: tuple[_CropRule, ...] = get_args(_CropRule)

# Formats of exported artifacts.
_ExportFormat = Literal["stablehlo", "onnx", "openvino"]

# Libraries that compute the logits of `ImageClassifier`.
_Runtime = Literal["jax", "openvino", "onnxruntime"]
_RUNTIMES: tuple[_Runtime, ...] = get_args(_Runtime)

# Platforms of a StableHLO artifact: the defaults, and all that are supported.
_PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN_PLATFORMS = (*_PLATFORMS, "rocm")

# Names of the training recipes in the package.
_RECIPE_NAMES = tuple(sorted(path.stem for path in (Path(__file__).parent / "training" / "recipes").glob("*.toml")))
