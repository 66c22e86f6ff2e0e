"""The names that settings may take, for the library and the command line.

This module imports nothing heavy, so that the command line can list the names in its help without loading JAX.
"""

from pathlib import Path
from typing import Literal, get_args

# Layouts of PyTorch checkpoints that can be written.
WrittenLayout = Literal["hf", "timm", "timm_conv", "facebook"]
WRITTEN_LAYOUTS: tuple[WrittenLayout, ...] = get_args(WrittenLayout)

# Types that weights can be converted to.
WeightDType = Literal["float32", "float16", "bfloat16"]

# Rules to resize and crop images in an evaluation.
CropRule = Literal["model", "hf", "torchvision", "timm"]
CROP_RULES: tuple[CropRule, ...] = get_args(CropRule)

# Formats of exported models, and the platforms that a StableHLO artifact supports by default.
ExportFormat = Literal["stablehlo", "onnx"]
PLATFORMS = ("cpu", "cuda", "tpu")

# The training recipes in the package: the names of the TOML files.
RECIPE_NAMES = tuple(sorted(path.stem for path in (Path(__file__).parent / "training" / "recipes").glob("*.toml")))
