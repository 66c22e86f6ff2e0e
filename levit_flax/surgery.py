"""Turn a model and its variables into another model and its variables, which compute the same with less.

The functions are pure. They compute in float64 through NumPy and give every array back in the type that it came in.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .layers import BATCH_NORM_EPSILON
from .modeling import LevitBase, LevitForImageClassification, LevitForImageClassificationWithTeacher, Variables


def fold_batch_norm(model: LevitBase, variables: Mapping[str, Any]) -> tuple[LevitBase, Variables]:
    """Put every batch norm into the layer beside it.

    In evaluation a batch norm multiplies and shifts each channel by constants, which the kernel and a bias of the
    convolution or linear layer can do as well. The folded model computes the same, faster, and cannot be trained on.

    Args:
        model: a model that is not folded.
        variables: {"params": ..., "batch_stats": ...}.

    Returns:
        The model with `folded=True`, and {"params": ...}: kernels of the same shapes, a bias [C] beside each, and
        attention biases as they were. Arrays keep their type; narrow ones (float16) are rounded once more.

    Raises:
        ValueError: the model is folded already.

    Source: `Conv2d_BN.fuse`, `Linear_BN.fuse` and `BN_Linear.fuse` in facebookresearch/LeViT levit.py.
    """
    if model.folded:
        raise ValueError("The model's batch norms are folded already: expected a model with folded=False.")
    flat = flatten_dict(variables, sep="/")
    folded = {path: leaf for path, leaf in flat.items() if path.startswith("params/") and "/norm/" not in path}
    for path in [path for path in flat if path.endswith("/norm/scale")]:
        layer = path.removeprefix("params/").removesuffix("/norm/scale")
        factor, shift = scale_and_shift(flat, layer)
        linear = f"params/{layer}/" + ("conv" if f"params/{layer}/conv/kernel" in flat else "linear")
        kernel, bias = flat[f"{linear}/kernel"], flat.get(f"{linear}/bias")
        wide = np.asarray(kernel, np.float64)
        if bias is None:  # the norm comes after the layer
            new_kernel, new_bias = wide * factor, shift
        else:  # a head, whose norm comes before it
            new_kernel, new_bias = factor[:, None] * wide, shift @ wide + np.asarray(bias, np.float64)
        folded[f"{linear}/kernel"] = like(new_kernel, kernel)
        folded[f"{linear}/bias"] = like(new_bias, kernel if bias is None else bias)
    return model.clone(folded=True), unflatten_dict(folded, sep="/")


def merge_heads(model: LevitBase, variables: Mapping[str, Any]) -> tuple[LevitForImageClassification, Variables]:
    """Turn the two heads of a distilled model into one whose logits are their average.

    The published accuracies are those of the average. Folded heads are averaged as they are. Otherwise the merged head
    keeps the running statistics of the first one, with scale 1 and bias 0, and its linear layer takes in the rest, so
    that it can go on training.

    Args:
        model: a model with two heads, folded or not.
        variables: its variables.

    Returns:
        A `LevitForImageClassification` and its variables; arrays keep their type.

    Raises:
        ValueError: the model has no two heads.

    Source: Graham et al. 2021, section 4.3 ("classification"): at test time the outputs of both heads are averaged.
    """
    if not isinstance(model, LevitForImageClassificationWithTeacher) or not model.config.num_labels:
        raise ValueError(
            "The model has no two heads to merge: expected a LevitForImageClassificationWithTeacher with classes, found"
            f" a {type(model).__name__}."
        )
    flat = flatten_dict(variables, sep="/")
    merged = {path: leaf for path, leaf in flat.items() if path.split("/")[1] != "head_dist"}
    kernels = [np.asarray(flat[f"params/{head}/linear/kernel"], np.float64) for head in model.head_names]
    biases = [np.asarray(flat[f"params/{head}/linear/bias"], np.float64) for head in model.head_names]
    if not model.folded:
        # Both norms see the same vector, so the second is a multiple and a shift of what the first makes of it.
        mean, deviation = statistics(flat, "head")
        for i, head in enumerate(model.head_names):
            factor, shift = scale_and_shift(flat, head)
            biases[i] = biases[i] + (shift + mean * factor) @ kernels[i]
            kernels[i] = (deviation * factor)[:, None] * kernels[i]
        scale, bias = flat["params/head/norm/scale"], flat["params/head/norm/bias"]
        merged["params/head/norm/scale"] = like(np.ones(scale.shape), scale)
        merged["params/head/norm/bias"] = like(np.zeros(bias.shape), bias)
    for name, parts in (("kernel", kernels), ("bias", biases)):
        path = f"params/head/linear/{name}"
        merged[path] = like((parts[0] + parts[1]) / 2, flat[path])
    fields = {name: getattr(model, name) for name in ("folded", "dtype", "param_dtype", "precision")}
    return LevitForImageClassification(model.config, **fields), unflatten_dict(merged, sep="/")


def statistics(flat: Mapping[str, Any], layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the running mean and standard deviation [C] of a layer's batch norm in float64."""
    mean, var = (np.asarray(flat[f"batch_stats/{layer}/norm/{name}"], np.float64) for name in ("mean", "var"))
    return mean, np.sqrt(var + BATCH_NORM_EPSILON)


def scale_and_shift(flat: Mapping[str, Any], layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what a layer's batch norm multiplies by and then adds in evaluation, [C] each, in float64."""
    mean, deviation = statistics(flat, layer)
    factor = np.asarray(flat[f"params/{layer}/norm/scale"], np.float64) / deviation
    return factor, np.asarray(flat[f"params/{layer}/norm/bias"], np.float64) - mean * factor


def like(array: np.ndarray, example: Any) -> Any:
    """Return the array in the type of another one, and where that one lies."""
    narrow = array.astype(example.dtype)
    return jax.device_put(narrow, example.sharding) if isinstance(example, jax.Array) else narrow
