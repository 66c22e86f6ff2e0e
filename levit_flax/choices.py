"""Names that arguments may take, shared by the library and the command line.

The module imports nothing heavy: the command line lists the names in its help without importing JAX.
"""

from pathlib import Path
from typing import Literal, get_args

# Layouts of PyTorch checkpoints that can be written.
WrittenLayout = Literal["hf", "timm", "timm_conv", "facebook"]
WRITTEN_LAYOUTS: tuple[WrittenLayout, ...] = get_args(WrittenLayout)

# Data types that weights can be converted to.
WeightDType = Literal["float32", "float16", "bfloat16"]

# Rules for resizing and cropping images in an evaluation.
CropRule = Literal["model", "hf", "torchvision", "timm"]
CROP_RULES: tuple[CropRule, ...] = get_args(CropRule)

# Formats of exported artifacts.
ExportFormat = Literal["stablehlo", "onnx"]

# Platforms of a StableHLO artifact: the default ones, and all.
PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN_PLATFORMS = (*PLATFORMS, "rocm")

# Training recipes in the package, by the names of their files.
RECIPE_NAMES = tuple(sorted(path.stem for path in (Path(__file__).parent / "training" / "recipes").glob("*.toml")))
