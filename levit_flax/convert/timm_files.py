"""Read and write timm's `config.json`: architecture, preprocessing, class names.

Source: timm models/_hub.py (`save_config_for_hf`), models/levit.py (`Levit`), data/transforms_factory.py.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from levit_flax.configuration import LevitConfig
from levit_flax.image_processing import (
    _TIMM_CROP_PCT,
    LevitImageProcessor,
    _size_for_edge,
)
from levit_flax.variants import VARIANTS

from .errors import ConversionError, _explain_malformed

# Our names for the arguments of timm's model that define the architecture.
_ARGUMENTS = {
    "img_size": "image_size",
    "in_chans": "num_channels",
    "num_classes": "num_labels",
    "embed_dim": "hidden_sizes",
    "key_dim": "key_dim",
    "depth": "depths",
    "num_heads": "num_attention_heads",
    "attn_ratio": "attention_ratio",
    "mlp_ratio": "mlp_ratio",
    "drop_path_rate": "drop_path_rate",
}
_PER_STAGE = ("key_dim", "num_attention_heads", "attention_ratio", "mlp_ratio")
# Arguments that change the architecture, with the values that levit-flax supports.
_FIXED_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "act_layer": ("hard_swish",),
    "attn_act_layer": (None, "hard_swish"),
    "stem_type": ("s16",),
    "stem_backbone": (None,),
    "down_op": ("subsample",),
    "global_pool": ("avg",),
}
# Arguments that do not affect the architecture or its parameters.
_FREE_ARGUMENTS = ("use_conv", "distilled", "drop_rate", "stem_stride", "out_indices", "features_only")

_VARIANT_NAMES = {name.lower().replace("-", "_"): name for name in VARIANTS}  # levit_128s -> levit-128S

_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


def _is_timm_config(values: Mapping[str, Any]) -> bool:
    """Return whether the parsed config.json is timm's."""
    return isinstance(values.get("architecture"), str) and "model_type" not in values


def _pretrained_cfg(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section of timm's config about the weights; old files have it at the top level."""
    cfg = values.get("pretrained_cfg", values)
    if not isinstance(cfg, Mapping):
        raise ConversionError(f"timm's config has a malformed pretrained_cfg: expected an object, found {cfg!r}.")
    return cfg


def _read_timm_config(values: Mapping[str, Any]) -> LevitConfig:
    """Build a config from timm's parsed config.json, with its labels, or LABEL_0, LABEL_1, ... if it has none."""
    name = values["architecture"]
    variant = _VARIANT_NAMES.get(name.replace("levit_conv_", "levit_"))
    if variant is None:
        raise ConversionError(
            f"timm's config has an unsupported architecture: expected one of {', '.join(_VARIANT_NAMES)} or its"
            f" levit_conv_ counterpart, found {name!r}. timm's other LeViTs have no published weights."
        )
    cfg = _pretrained_cfg(values)
    arguments: dict[str, Any] = {"drop_path_rate": 0.0, **values.get("model_args", {})}
    arguments["num_classes"] = values.get("num_classes", cfg.get("num_classes", 1000))
    channels, *size = cfg.get("input_size", (3, 224, 224))
    arguments.setdefault("in_chans", channels)
    arguments.setdefault("img_size", size)
    fields: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in _ARGUMENTS:
            fields[_ARGUMENTS[key]] = value
        elif value not in _FIXED_ARGUMENTS.get(key, (value,) if key in _FREE_ARGUMENTS else ()):
            expected = f": expected {_FIXED_ARGUMENTS[key][0]!r}" if key in _FIXED_ARGUMENTS else ""
            raise ConversionError(
                f"timm's config has the argument {key}={value!r}, which levit-flax does not support{expected}."
            )
    stages = len(fields.get("hidden_sizes", VARIANTS[variant].hidden_sizes))
    for field in _PER_STAGE:
        if isinstance(fields.get(field), int | float):
            fields[field] = (fields[field],) * stages
    fields["id2label"] = _read_labels(values, cfg, fields["num_labels"])
    derived: dict[str, Any] = {"down_ops": None}  # computed from the widths
    return dataclasses.replace(VARIANTS[variant], **derived, **fields)


def _read_labels(values: Mapping[str, Any], cfg: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    """Return the class names in timm's config, or None unless there is one for every class."""
    names = values.get("label_names", cfg.get("label_names"))
    descriptions = values.get("label_descriptions", cfg.get("label_descriptions")) or {}
    if isinstance(names, Mapping):
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not names or len(names) != count:
        return None
    return tuple(str(descriptions.get(name, name)) for name in names)


def _read_timm_processor(values: Mapping[str, Any], where: str = "timm's config.json") -> LevitImageProcessor:
    """Build the processor that prepares images like timm's evaluation transform.

    timm resizes the shorter edge to size / crop_pct and crops the center. `LevitImageProcessor` multiplies its `size`
    by 256 / 224 first, so its size 217 corresponds to 224 pixels with crop_pct 0.9. If no size gives the exact edge,
    the resized edge is one pixel shorter.
    """
    with _explain_malformed(f"The preprocessing in {where}"):
        return _read_processor(_pretrained_cfg(values))


def _read_processor(cfg: Mapping[str, Any]) -> LevitImageProcessor:
    _, height, width = cfg.get("input_size", (3, 224, 224))
    interpolation, mode = cfg.get("interpolation", "bicubic"), cfg.get("crop_mode", "center")
    if interpolation not in _RESAMPLE or mode != "center":
        raise ConversionError(
            f"timm's config has unsupported preprocessing: expected one of {', '.join(_RESAMPLE)} and a center crop,"
            f" found {interpolation} and a {mode} crop."
        )
    edge = math.floor(max(height, width) / cfg.get("crop_pct", _TIMM_CROP_PCT))
    default = LevitImageProcessor()
    return LevitImageProcessor(
        size=_size_for_edge(edge),
        crop_size=(height, width),
        resample=_RESAMPLE[interpolation],
        image_mean=cfg.get("mean", default.image_mean),
        image_std=cfg.get("std", default.image_std),
    )


def _model_arguments(config: LevitConfig, heads: tuple[str, ...]) -> dict[str, Any]:
    """Return the arguments of timm's model class, JSON-ready, or raise ConversionError for unsupported models."""
    published: dict[str, Any] = {"down_ops": None, "kernel_size": 3, "stride": 2, "padding": 1, "patch_size": 16}
    standard = dataclasses.replace(config, **published)
    unsupported = {
        "a key_dim that differs between stages": len(set(config.key_dim)) > 1,
        "downsamplings other than the published ones": config.down_ops != standard.down_ops,
        "a stem other than four 3x3 convolutions of stride 2": config.grids[0] != standard.grids[0]
        or config.kernel_size != 3,
        "blocks without an MLP": 0 in config.mlp_ratio,
        "an image size that is not a multiple of 16": any(side % 16 for side in config.image_height_width),
    }
    reasons = [name for name, present in unsupported.items() if present]
    if reasons:
        raise ConversionError(
            f"timm's LeViT does not support {'; '.join(reasons)}: write another layout with layout=..., or change the"
            " model."
        )
    return {
        "img_size": list(config.image_height_width),
        "in_chans": config.num_channels,
        "num_classes": config.num_labels if heads else 0,
        "embed_dim": list(config.hidden_sizes),
        "key_dim": config.key_dim[0],
        "depth": list(config.depths),
        "num_heads": list(config.num_attention_heads),
        "attn_ratio": list(config.attention_ratio),
        "mlp_ratio": list(config.mlp_ratio),
        "drop_path_rate": config.drop_path_rate,
    }


def _write_timm_config(
    config: LevitConfig, heads: tuple[str, ...], processor: LevitImageProcessor, convolutional: bool
) -> str:
    """Return the config.json that lets `timm.create_model("local-dir:...")` open a directory.

    If the architecture is not a published variant, the file names levit_128 and overrides its arguments. The
    processor's resize becomes timm's crop_pct. `convolutional` selects timm's model with 1x1 convolutions as linear
    layers.
    """
    arguments = _model_arguments(config, heads)
    name = next((name for name, variant in _VARIANT_NAMES.items() if _is_variant(config, variant)), "levit_128")
    height, width = config.image_height_width
    edge = processor.size.get("shortest_edge")
    resized = int(256 / 224 * edge) if edge else max(processor.size.values())
    cfg = {
        "tag": "levit_flax",
        "custom_load": False,
        "input_size": [config.num_channels, height, width],
        "fixed_input_size": True,
        "interpolation": Image.Resampling(processor.resample).name.lower(),
        "crop_pct": max(height, width) / resized,
        "crop_mode": "center",
        "mean": _per_channel(processor.image_mean, config.num_channels),
        "std": _per_channel(processor.image_std, config.num_channels),
        "num_classes": arguments["num_classes"],
        "pool_size": None,
        "first_conv": "stem.conv1.linear",
        "classifier": [f"{head}.linear" for head in heads],
    }
    values = {
        "architecture": name.replace("levit_", "levit_conv_") if convolutional else name,
        "num_classes": arguments["num_classes"],
        "num_features": config.hidden_sizes[-1],
        "global_pool": "avg",
        "label_names": list(config.id2label) if heads else None,
        # timm builds two heads by default, and none without classes.
        "model_args": arguments | ({} if len(heads) == 2 else {"distilled": False}),
        "pretrained_cfg": cfg,
    }
    return json.dumps({key: value for key, value in values.items() if value is not None}, indent=2) + "\n"


def _per_channel(value: float | Sequence[float], channels: int) -> list[float]:
    """Return one number per channel."""
    return [value] * channels if isinstance(value, int | float) else list(value)


def _is_variant(config: LevitConfig, name: str) -> bool:
    """Return whether a config has the widths, depths and heads of a published variant."""
    fields = ("hidden_sizes", "depths", "num_attention_heads", "key_dim")
    return all(getattr(config, field) == getattr(VARIANTS[name], field) for field in fields)
