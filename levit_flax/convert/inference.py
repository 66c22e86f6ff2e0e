"""Infer the config of a checkpoint from the shapes of its tensors."""

import dataclasses
import math
from collections.abc import Mapping

from levit_flax.configuration import LevitConfig
from levit_flax.down_ops import DownOp

from .errors import ConversionError, _explain_malformed
from .layouts import _Shape, _Structure

# The fields of a config that shapes determine. Labels, drop path and strides do not affect shapes.
_INFERRED_FIELDS = (
    "num_channels",
    "kernel_size",
    "hidden_sizes",
    "num_attention_heads",
    "depths",
    "key_dim",
    "mlp_ratio",
    "attention_ratio",
    "down_ops",
)


def _infer_config(
    shapes: Mapping[str, _Shape],
    names: Mapping[str, str],
    structure: _Structure,
    image_size: int | tuple[int, int] | None = None,
) -> LevitConfig:
    """Infer a config with labels LABEL_0, LABEL_1, ... from the shapes of a Flax tree.

    `shapes` contains the parameter shapes by path ("params/stem/conv_0/conv/kernel"), and `names` the checkpoint's
    names of the parameters for messages. The default image size is the square multiple of 16 that fits the attention
    biases.
    """
    known = _Shapes(shapes, names)
    kernel_size, _, num_channels, _ = known.get("stem/conv_0/conv/kernel", 4)
    widths = [known.get("stem/conv_3/conv/kernel", 4)[3]]
    stages, down_ops = [], []
    for index, has_mlp in enumerate(structure.mlp):
        if not structure.depths[index]:
            raise ConversionError(
                f"Stage {index} has no blocks, so its number of heads cannot be inferred: expected at least one block."
                " Add a config.json next to the weights."
            )
        stages.append(_infer_stage(known, index, widths[-1], has_mlp))
        if index < len(structure.mlp) - 1:
            down_op, width = _infer_downsampling(known, index, structure.downsample_mlp[index])
            down_ops.append(down_op)
            widths.append(width)
    with _explain_malformed("The architecture that the shapes describe"):
        return LevitConfig(
            image_size=_infer_image_size(stages[0].num_offsets) if image_size is None else image_size,
            num_channels=num_channels,
            kernel_size=kernel_size,
            padding=kernel_size // 2,
            hidden_sizes=tuple(widths),
            num_attention_heads=tuple(stage.num_heads for stage in stages),
            depths=structure.depths,
            key_dim=tuple(stage.key_dim for stage in stages),
            mlp_ratio=tuple(stage.mlp_ratio for stage in stages),
            attention_ratio=tuple(stage.attention_ratio for stage in stages),
            down_ops=tuple(down_ops),
            num_labels=known.get("head/linear/kernel", 2)[1] if "head" in structure.heads else 2,
        )


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """Parameter shapes by path, and the checkpoint's names of the parameters for messages."""

    shapes: Mapping[str, _Shape]
    names: Mapping[str, str]

    def get(self, path: str, rank: int) -> _Shape:
        path = f"params/{path}"
        shape = self.shapes.get(path)
        if shape is None or len(shape) != rank:
            raise ConversionError(
                f"The architecture cannot be inferred from the shapes: expected a tensor {self.names[path]} with"
                f" {rank} axes, found {'none' if shape is None else shape}. Add the tensor, or a config.json next to"
                " the weights."
            )
        return shape

    def kernel(self, path: str) -> _Shape:
        return self.get(f"{path}/linear/kernel", 2)


@dataclasses.dataclass(frozen=True)
class _Stage:
    num_offsets: int
    num_heads: int
    key_dim: int
    attention_ratio: int
    mlp_ratio: int


def _infer_stage(shapes: _Shapes, index: int, width: int, has_mlp: bool) -> _Stage:
    """Infer the fields of a stage from its first block."""
    block = f"stage_{index}/block_0"
    num_offsets, num_heads = shapes.get(f"{block}/attention/attention_biases", 2)
    qkv, proj = shapes.kernel(f"{block}/attention/qkv"), shapes.kernel(f"{block}/attention/proj")
    key_dim = _divide(qkv[1] - proj[0], 2 * num_heads, f"key_dim of stage {index}")
    ratio = _divide(proj[0], num_heads * key_dim, f"attention_ratio of stage {index}")
    mlp_ratio = 0
    if has_mlp:
        mlp_ratio = _divide(shapes.kernel(f"{block}/mlp/up")[1], width, f"mlp_ratio of stage {index}")
    return _Stage(num_offsets, num_heads, key_dim, ratio, mlp_ratio)


def _infer_downsampling(shapes: _Shapes, index: int, has_mlp: bool) -> tuple[DownOp, int]:
    """Infer a downsampling and the width after it."""
    down = f"downsample_{index}"
    num_heads = shapes.get(f"{down}/attention/attention_biases", 2)[1]
    q, kv = shapes.kernel(f"{down}/attention/q"), shapes.kernel(f"{down}/attention/kv")
    key_dim = _divide(q[1], num_heads, f"key_dim of downsampling {index}")
    ratio = _divide(kv[1] - q[1], q[1], f"attention_ratio of downsampling {index}")
    width = shapes.kernel(f"{down}/attention/proj")[1]
    mlp_ratio = 0
    if has_mlp:
        mlp_ratio = _divide(shapes.kernel(f"{down}/mlp/up")[1], width, f"mlp_ratio of downsampling {index}")
    return DownOp("Subsample", key_dim, num_heads, ratio, mlp_ratio, stride=2), width


def _infer_image_size(num_offsets: int) -> int:
    """Return the square multiple of 16 whose first stage has this many offsets between tokens."""
    side = math.isqrt(num_offsets)
    if side**2 != num_offsets:
        raise ConversionError(
            f"The image size cannot be inferred: expected a square number of offsets in the first table of attention"
            f" biases, found {num_offsets}. Pass source_image_size=..."
        )
    return 16 * side


def _divide(numerator: int, denominator: int, name: str) -> int:
    if denominator < 1 or numerator < 1 or numerator % denominator:
        raise ConversionError(
            f"The shapes contradict each other: expected an integer for {name}, found {numerator} / {denominator}."
        )
    return numerator // denominator
