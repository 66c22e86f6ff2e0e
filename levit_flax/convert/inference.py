"""The configuration of a checkpoint, from the shapes of its tensors alone."""

import math
from collections.abc import Mapping

from levit_flax.configuration import DownOp, LevitConfig

from .errors import ConversionError
from .layouts import Structure

# What shapes tell of a config; the rest (labels, drop path, the stem's stride) they do not.
INFERRED_FIELDS = (
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


def infer_config(
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    structure: Structure,
    image_size: int | tuple[int, int] | None = None,
) -> LevitConfig:
    """Work out a config from shapes in the Flax tree.

    Args:
        shapes: the shape of every parameter by its path ("params/stem/conv_0/conv/kernel"), in Flax's order of axes.
        names: the name of each parameter in the checkpoint, by the same path, for messages.
        structure: the structure, from the names.
        image_size: input size in pixels; None for the square one, a multiple of 16, that fits the bias tables.

    Returns:
        The config, with labels LABEL_0, LABEL_1, ...

    Raises:
        ConversionError: a tensor that the inference needs is missing, or the shapes contradict each other.
    """

    def shape(path: str, rank: int) -> tuple[int, ...]:
        path = f"params/{path}"
        found = shapes.get(path)
        if found is None or len(found) != rank:
            raise ConversionError(
                f"The architecture cannot be read from the shapes: expected a tensor {names[path]} with {rank} axes,"
                f" found {'none' if found is None else found}. A config.json beside the weights tells what shapes do"
                " not."
            )
        return found

    def exact(numerator: int, denominator: int, what: str) -> int:
        if denominator < 1 or numerator < 1 or numerator % denominator:
            raise ConversionError(f"The shapes contradict each other: {what} would be {numerator} / {denominator}.")
        return numerator // denominator

    kernel_size, _, num_channels, _ = shape("stem/conv_0/conv/kernel", 4)
    hidden_sizes = [shape("stem/conv_3/conv/kernel", 4)[3]]
    heads, key_dims, mlp_ratios, ratios, offsets, down_ops = [], [], [], [], [], []
    for stage, has_mlp in enumerate(structure.mlp):
        block, width = f"stage_{stage}/block_0", hidden_sizes[-1]
        if not structure.depths[stage]:
            raise ConversionError(f"Stage {stage} has no block: its heads are asked for in a config.json.")
        num_offsets, num_heads = shape(f"{block}/attention/attention_biases", 2)
        qkv, proj = shape(f"{block}/attention/qkv/linear/kernel", 2), shape(f"{block}/attention/proj/linear/kernel", 2)
        offsets.append(num_offsets)
        heads.append(num_heads)
        key_dims.append(exact(qkv[1] - proj[0], 2 * num_heads, f"key_dim of stage {stage}"))
        ratios.append(exact(proj[0], num_heads * key_dims[-1], f"attention_ratio of stage {stage}"))
        up = shape(f"{block}/mlp/up/linear/kernel", 2)[1] if has_mlp else 0
        mlp_ratios.append(exact(up, width, f"mlp_ratio of stage {stage}") if has_mlp else 0)
        if stage == len(structure.mlp) - 1:
            break
        down = f"downsample_{stage}"
        num_heads = shape(f"{down}/attention/attention_biases", 2)[1]
        q, kv = shape(f"{down}/attention/q/linear/kernel", 2), shape(f"{down}/attention/kv/linear/kernel", 2)
        key_dim = exact(q[1], num_heads, f"key_dim of downsampling {stage}")
        ratio = exact(kv[1] - q[1], q[1], f"attention_ratio of downsampling {stage}")
        hidden_sizes.append(shape(f"{down}/attention/proj/linear/kernel", 2)[1])
        mlp_ratio = 0
        if structure.downsample_mlp[stage]:
            up = shape(f"{down}/mlp/up/linear/kernel", 2)[1]
            mlp_ratio = exact(up, hidden_sizes[-1], f"mlp_ratio of downsampling {stage}")
        down_ops.append(DownOp("Subsample", key_dim, num_heads, ratio, mlp_ratio, stride=2))
    if image_size is None:
        side = math.isqrt(offsets[0])
        if side**2 != offsets[0]:
            raise ConversionError(
                f"The first attention-bias table has {offsets[0]} offsets, which is no square: give the image size"
                " (--image-size HEIGHTxWIDTH, or image_size=)."
            )
        image_size = 16 * side
    return LevitConfig(
        image_size=image_size,
        num_channels=num_channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        hidden_sizes=tuple(hidden_sizes),
        num_attention_heads=tuple(heads),
        depths=structure.depths,
        key_dim=tuple(key_dims),
        mlp_ratio=tuple(mlp_ratios),
        attention_ratio=tuple(ratios),
        down_ops=tuple(down_ops),
        num_labels=shape("head/linear/kernel", 2)[1] if "head" in structure.heads else 2,
    )
