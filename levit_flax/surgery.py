"""Transform a model and its variables: fold, merge, resize, replace heads.

All functions are pure. They compute in float64 with NumPy and return every array in its original dtype.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from .arguments import _check_types
from .layers import _BATCH_NORM_EPSILON, _NormLinear
from .modeling import LevitBase, LevitForImageClassification, LevitForImageClassificationWithTeacher, Variables

_Model = TypeVar("_Model", bound=LevitBase)


@_check_types
def fold_batch_norm(model: LevitBase, variables: Mapping[str, Any]) -> tuple[LevitBase, Variables]:
    """Fold every batch norm into the convolution or linear layer next to it.

    In evaluation, a batch norm scales and shifts each channel by constants, which the kernel and bias of the layer next
    to it can absorb. The folded model computes the same outputs faster, but can no longer be trained.

    Args:
        model: a model with `folded=False`.
        variables: its variables, {"params": ..., "batch_stats": ...}.

    Returns:
        The model with `folded=True` and its variables, {"params": ...}. Kernels keep their shapes, every layer has a
        bias [C], and attention biases are unchanged. Arrays keep their dtype, so float16 and bfloat16 weights are
        rounded once more.

    Raises:
        ValueError: the model is already folded.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> model, variables = fold_batch_norm(*from_pretrained("cifar10", dtype="float32"))
        >>> model.folded, list(variables), sorted(variables["params"]["head"]["linear"])
        (True, ['params'], ['bias', 'kernel'])

    Source: `Conv2d_BN.fuse`, `Linear_BN.fuse` and `BN_Linear.fuse` in facebookresearch/LeViT levit.py.
    """
    if model.folded:
        raise ValueError("The model is already folded: expected a model with folded=False, found folded=True.")
    flat = flatten_dict(variables, sep="/")
    folded = {path: leaf for path, leaf in flat.items() if path.startswith("params/") and "/norm/" not in path}
    for path in [path for path in flat if path.endswith("/norm/scale")]:
        layer = path.removeprefix("params/").removesuffix("/norm/scale")
        factor, shift = _scale_and_shift(flat, layer)
        linear = f"params/{layer}/" + ("conv" if f"params/{layer}/conv/kernel" in flat else "linear")
        kernel, bias = flat[f"{linear}/kernel"], flat.get(f"{linear}/bias")
        kernel64 = np.asarray(kernel, np.float64)
        if bias is None:  # the norm follows the layer
            new_kernel, new_bias = kernel64 * factor, shift
        else:  # a head: the norm precedes the layer
            new_kernel, new_bias = factor[:, None] * kernel64, shift @ kernel64 + np.asarray(bias, np.float64)
        folded[f"{linear}/kernel"] = _like(new_kernel, kernel)
        folded[f"{linear}/bias"] = _like(new_bias, kernel if bias is None else bias)
    return model.clone(folded=True, remat=False), _unflatten(folded, flat)


@_check_types
def merge_heads(model: LevitBase, variables: Mapping[str, Any]) -> tuple[LevitForImageClassification, Variables]:
    """Merge the two heads of a distilled model into one that averages their logits.

    The merged head of a model that is not folded can still be trained: its batch norm has the running statistics of
    `head`, scale 1 and bias 0, and its linear layer absorbs everything else.

    Args:
        model: a `LevitForImageClassificationWithTeacher`, folded or not.
        variables: its variables.

    Returns:
        A `LevitForImageClassification` and its variables. Arrays keep their dtype.

    Raises:
        ValueError: the model does not have two heads.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> model, variables = merge_heads(*from_pretrained("cifar10", dtype="float32"))
        >>> type(model).__name__, "head_dist" in variables["params"]
        ('LevitForImageClassification', False)

    Source: Graham et al. 2021, "No classification token": at test time, the outputs of both heads are averaged.
    """
    if not isinstance(model, LevitForImageClassificationWithTeacher) or not model.config.num_labels:
        raise ValueError(
            "The model does not have two heads to merge: expected a LevitForImageClassificationWithTeacher with"
            f" classes, found a {type(model).__name__} with num_labels={model.config.num_labels}."
        )
    flat = flatten_dict(variables, sep="/")
    merged = {path: leaf for path, leaf in flat.items() if path.split("/")[1] != "head_dist"}
    kernels = [np.asarray(flat[f"params/{head}/linear/kernel"], np.float64) for head in model.head_names]
    biases = [np.asarray(flat[f"params/{head}/linear/bias"], np.float64) for head in model.head_names]
    if not model.folded:
        # Express both heads as functions of the input normalized with the first head's statistics.
        mean, deviation = _statistics(flat, "head")
        for i, head in enumerate(model.head_names):
            factor, shift = _scale_and_shift(flat, head)
            biases[i] = biases[i] + (shift + mean * factor) @ kernels[i]
            kernels[i] = (deviation * factor)[:, None] * kernels[i]
        scale, bias = flat["params/head/norm/scale"], flat["params/head/norm/bias"]
        merged["params/head/norm/scale"] = _like(np.ones(scale.shape), scale)
        merged["params/head/norm/bias"] = _like(np.zeros(bias.shape), bias)
    for name, parts in (("kernel", kernels), ("bias", biases)):
        path = f"params/head/linear/{name}"
        merged[path] = _like((parts[0] + parts[1]) / 2, flat[path])
    return _as_class(model, LevitForImageClassification), _unflatten(merged, flat)


@_check_types
def resize_image(
    model: LevitBase, variables: Mapping[str, Any], image_size: int | tuple[int, int]
) -> tuple[LevitBase, Variables]:
    """Adapt a model to another image size by interpolating its attention biases.

    Only the attention-bias tables depend on the image size. They contain one bias for every offset (|dy|, |dx|) between
    two tokens. An offset d on the new grid of R' tokens corresponds to d * R / R' on the old grid of R tokens, along
    each axis. The new tables interpolate the old ones at these positions by cubic convolution. Biases are even in d, so
    values at negative offsets equal those at positive ones. Beyond the largest old offset, the last bias is repeated.

    Args:
        model: any model, folded or not.
        variables: its variables.
        image_size: the new size in pixels, one side or (height, width). It does not have to be a multiple of 16,
            because the stem rounds the number of tokens up.

    Returns:
        The model with the new size in its config, and its variables. If the size is unchanged, so are both.

    Raises:
        ValueError: the image size is invalid.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> model, variables = resize_image(*from_pretrained("cifar10"), (96, 128))
        >>> model.config.grids[0], variables["params"]["stage_0"]["block_0"]["attention"]["attention_biases"].shape
        ((6, 8), (48, 6))

    Source: Graham et al. 2021, "Attention bias instead of a positional embedding", for the tables; Keys 1981, "Cubic
        convolution interpolation for digital image processing", for the interpolation.
    """
    size: Any = image_size
    config = dataclasses.replace(model.config, image_size=size)
    flat, resized = flatten_dict(variables, sep="/"), {}
    for path, leaf in flat.items():
        if path.endswith("/attention_biases"):
            stage = int(path.split("/")[1].rpartition("_")[2])
            leaf = _resize_table(leaf, model.config.grids[stage], config.grids[stage])
        resized[path] = leaf
    return model.clone(config=config), _unflatten(resized, flat)


def _resize_table(table: Any, old: Sequence[int], new: Sequence[int]) -> Any:
    """Interpolate a table of attention biases [N H] from one grid (height, width) of tokens to another."""
    if tuple(old) == tuple(new):
        return table
    biases = np.asarray(table, np.float64).reshape(*old, -1)  # [|dy| |dx| H]
    rows, columns = (_cubic_weights(*sizes) for sizes in zip(old, new, strict=True))
    resized = np.einsum("ya,xb,abh->yxh", rows, columns, biases)
    return _like(resized.reshape(-1, table.shape[-1]), table)


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """Return the weights [new old] that interpolate biases along one axis."""
    weights = np.zeros((new, old))
    for offset in range(new):
        position = min(offset * old / new, old - 1)
        first = int(position) - 1
        for neighbor in range(first, first + 4):
            source = min(abs(neighbor), old - 1)
            weights[offset, source] += _cubic(abs(position - neighbor))
    return weights


def _cubic(x: float) -> float:
    """Return Keys' interpolation kernel with a = -1/2 at a distance of `x` >= 0 from the sample."""
    if x < 1:
        return 1 - 2.5 * x**2 + 1.5 * x**3
    return 2 - 4 * x + 2.5 * x**2 - 0.5 * x**3 if x < 2 else 0.0


@_check_types
def replace_head(
    model: LevitBase, variables: Mapping[str, Any], num_labels: int, key: jax.Array | None = None
) -> tuple[LevitBase, Variables]:
    """Replace a model's heads with newly initialized ones for `num_labels` classes.

    Args:
        model: a model with one or two heads and, unless `num_labels` is 0, `folded=False`.
        variables: its variables.
        num_labels: number of classes, which are named LABEL_0, LABEL_1, ... With 0 the heads are removed, and the
            model's logits are the pooled features [B C].
        key: random key for the new weights; None for `jax.random.key(0)`.

    Returns:
        The model with the new classes in its config, and its variables. Only the heads differ.

    Raises:
        ValueError: the model has no heads or is folded, or `num_labels` is negative.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> model, variables = replace_head(*from_pretrained("cifar10"), num_labels=37, key=jax.random.key(0))
        >>> variables["params"]["head"]["linear"]["kernel"].shape
        (160, 37)
    """
    if (model.folded and num_labels) or not model.head_names:
        raise ValueError(
            "The heads of this model cannot be replaced: expected a model with heads and folded=False, found a"
            f" {'folded ' * model.folded}{type(model).__name__}."
        )
    labels: Any = {"num_labels": num_labels, "id2label": None}
    model = model.clone(config=dataclasses.replace(model.config, **labels))
    key = jax.random.key(0) if key is None else key
    pooled = jnp.zeros((1, model.config.hidden_sizes[-1]), model._shared["dtype"])
    flat = flatten_dict(variables, sep="/")
    replaced = dict(flat)
    for i, name in enumerate(model.head_names):
        head = _NormLinear(num_labels, **model._shared)
        initialized = head.init(jax.random.fold_in(key, i), pooled) if num_labels else {}
        replaced = {path: leaf for path, leaf in replaced.items() if path.split("/")[1] != name}
        replaced |= {
            f"{collection}/{name}/{path}": leaf
            for collection, tree in initialized.items()
            for path, leaf in flatten_dict(tree, sep="/").items()
        }
    return model, _unflatten(replaced, flat)


@_check_types
def change_channels(model: LevitBase, variables: Mapping[str, Any], num_channels: int) -> tuple[LevitBase, Variables]:
    """Change the number of input channels, converting the weights of the first convolution.

    From three channels to one, the weights are summed, so that grey images give the same result as in all three
    channels. To any other number, the weights are repeated over the new channels and scaled by the ratio of the numbers
    of channels.

    Args:
        model: a model, folded or not.
        variables: its variables.
        num_channels: number of channels of the input images, at least 1.

    Returns:
        The model for images with `num_channels` channels, and its variables. Only the first convolution differs.

    Raises:
        ValueError: `num_channels` is less than 1 or too large.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> model, variables = change_channels(*from_pretrained("cifar10"), num_channels=1)
        >>> variables["params"]["stem"]["conv_0"]["conv"]["kernel"].shape[2]
        1

    Source: `adapt_input_conv` in timm/models/_manipulate.py.
    """
    old = model.config.num_channels
    model = model.clone(config=model.config.replace(num_channels=num_channels))
    num_channels = model.config.num_channels
    flat = flatten_dict(variables, sep="/")
    path = "params/stem/conv_0/conv/kernel"
    kernel = np.asarray(flat[path], np.float64)  # [h w C features]
    if num_channels == 1:
        changed = kernel.sum(2, keepdims=True)
    elif num_channels == old:
        changed = kernel
    else:
        changed = kernel[:, :, np.arange(num_channels) % old] * (old / num_channels)
    return model, _unflatten({**flat, path: _like(changed, flat[path])}, flat)


def _as_class(model: LevitBase, model_class: type[_Model]) -> _Model:
    """Return a model of another class with the same fields."""
    fields = {name: getattr(model, name) for name in ("folded", "dtype", "param_dtype", "precision", "remat")}
    return model_class(model.config, **fields)


def _statistics(flat: Mapping[str, Any], layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the running mean and standard deviation [C] of a layer's batch norm in float64."""
    mean, var = (np.asarray(flat[f"batch_stats/{layer}/norm/{name}"], np.float64) for name in ("mean", "var"))
    return mean, np.sqrt(var + _BATCH_NORM_EPSILON)


def _scale_and_shift(flat: Mapping[str, Any], layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and shift [C] that a layer's batch norm applies in evaluation mode, in float64."""
    mean, deviation = _statistics(flat, layer)
    factor = np.asarray(flat[f"params/{layer}/norm/scale"], np.float64) / deviation
    return factor, np.asarray(flat[f"params/{layer}/norm/bias"], np.float64) - mean * factor


def _unflatten(flat: Mapping[str, Any], source: Mapping[str, Any]) -> Variables:
    """Return the nested tree of `flat`, with copies of the arrays that it shares with `source`."""
    owned = {path: _copy(leaf) if leaf is source.get(path) else leaf for path, leaf in flat.items()}
    tree: Variables = unflatten_dict(owned, sep="/")
    return tree


def _copy(leaf: Any) -> Any:
    """Return a copy of an array that shares no memory with it and, if it is a JAX array, keeps its sharding."""
    return jax.device_put(leaf, may_alias=False) if isinstance(leaf, jax.Array) else np.array(leaf)


def _like(array: np.ndarray, example: Any) -> Any:
    """Return the array with the dtype of another one and, if that is a JAX array, placed like it."""
    converted = array.astype(example.dtype)
    if not isinstance(example, jax.Array):
        return converted
    # An uncommitted array stays uncommitted, so that JAX can move it to the devices of a later computation.
    return jax.device_put(converted, _sharding_for(converted.shape, example) if example.committed else None)


def _sharding_for(shape: tuple[int, ...], example: jax.Array) -> jax.sharding.Sharding:
    """Return the sharding of an array for another shape: the same for its last axes, if they can be divided."""
    sharding = example.sharding
    if shape == example.shape or not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *(None,) * (example.ndim - len(sharding.spec)))[-len(shape) :]
    divided = (axis if _divides(sharding.mesh, axis, size) else None for axis, size in zip(spec, shape, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*divided))


def _divides(mesh: Any, axis: Any, size: int) -> bool:
    names = axis if isinstance(axis, tuple) else (axis,)
    return bool(size % math.prod(mesh.shape[name] for name in names if name is not None) == 0)
