"""Turn a model and its variables into another model and its variables.

The functions are pure. Their arithmetic is float64 in NumPy, and every array comes back in the type that it came in.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .layers import BATCH_NORM_EPSILON, NormLinear
from .modeling import LevitBase, LevitForImageClassification, LevitForImageClassificationWithTeacher, Variables

Model = TypeVar("Model", bound=LevitBase)


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

    Example:
        >>> from levit_flax import from_pretrained
        >>> model, variables = fold_batch_norm(*from_pretrained("cifar10", dtype="float32"))
        >>> model.folded, list(variables), sorted(variables["params"]["head"]["linear"])
        (True, ['params'], ['bias', 'kernel'])

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

    Example:
        >>> from levit_flax import from_pretrained
        >>> model, variables = merge_heads(*from_pretrained("cifar10", dtype="float32"))
        >>> type(model).__name__, "head_dist" in variables["params"]
        ('LevitForImageClassification', False)

    Source: Graham et al. 2021, "No classification token": at test time the outputs of both heads are averaged.
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
    return as_class(model, LevitForImageClassification), unflatten_dict(merged, sep="/")


def resize_image(
    model: LevitBase, variables: Mapping[str, Any], image_size: int | tuple[int, int]
) -> tuple[LevitBase, Variables]:
    """Make a model for images of another size, square or not.

    Only the tables of attention biases depend on the size of the image: they hold a bias for every distance
    (|dy|, |dx|) between two tokens. The new tables read the old ones where the same share of the image lies between
    the tokens: a distance d on a grid of R' tokens stands at d * R / R' on the old grid of R, along each axis. Between
    the old distances runs a cubic curve through them, even at zero, because the bias belongs to distances either way;
    beyond the largest old distance the last bias is held.

    Args:
        model: any model, folded or not.
        variables: its variables.
        image_size: the new size in pixels, a side or (height, width). It need not be a multiple of 16: the stem rounds
            up.

    Returns:
        The model with the new size in its config, and its variables; at the same size these are the same.

    Raises:
        ValueError: the size is not legal; the message says how.

    Example:
        >>> from levit_flax import from_pretrained
        >>> model, variables = resize_image(*from_pretrained("cifar10"), (96, 128))
        >>> model.config.grids[0], variables["params"]["stage_0"]["block_0"]["attention"]["attention_biases"].shape
        ((6, 8), (48, 6))

    Source: Graham et al. 2021, "Attention bias instead of a positional embedding", for the tables; Keys 1981, "Cubic
        convolution interpolation for digital image processing", for the curve.
    """
    size: Any = image_size
    config = dataclasses.replace(model.config, image_size=size)
    resized = {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        if path.endswith("/attention_biases"):
            stage = int(path.split("/")[1].rpartition("_")[2])
            leaf = resize_table(leaf, model.config.grids[stage], config.grids[stage])
        resized[path] = leaf
    return model.clone(config=config), unflatten_dict(resized, sep="/")


def resize_table(table: Any, old: Sequence[int], new: Sequence[int]) -> Any:
    """Interpolate a table of attention biases [N H] from one grid (height, width) of tokens to another."""
    if tuple(old) == tuple(new):
        return table
    distances = np.asarray(table, np.float64).reshape(*old, -1)  # [|dy| |dx| H]
    rows, columns = (cubic_weights(*sizes) for sizes in zip(old, new, strict=True))
    resized = np.einsum("ya,xb,abh->yxh", rows, columns, distances)
    return like(resized.reshape(-1, table.shape[-1]), table)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Return the weights [new old] with which each new distance reads the old ones, along one axis."""
    weights = np.zeros((new, old))
    for distance in range(new):
        place = min(distance * old / new, old - 1)
        first = int(place) - 1
        for neighbor in range(first, first + 4):
            held = min(abs(neighbor), old - 1)
            weights[distance, held] += cubic(abs(place - neighbor))
    return weights


def cubic(x: float) -> float:
    """Return Keys' kernel at a distance of `x` from the sample: 1 at 0, 0 at 1 and from 2 on."""
    if x < 1:
        return 1 - 2.5 * x**2 + 1.5 * x**3
    return 2 - 4 * x + 2.5 * x**2 - 0.5 * x**3 if x < 2 else 0.0


def replace_head(
    model: LevitBase, variables: Mapping[str, Any], num_labels: int, key: jax.Array
) -> tuple[LevitBase, Variables]:
    """Give a model fresh heads for another number of classes.

    Args:
        model: a model with heads, not folded.
        variables: its variables.
        num_labels: the number of classes, 1 or more; they are named LABEL_0, LABEL_1, ...
        key: random key for the new weights.

    Returns:
        The model with the new classes in its config, and its variables: every head as `init` makes it, all else as it
        was.

    Raises:
        ValueError: the model has no heads or is folded, or the number is not positive.

    Example:
        >>> from levit_flax import from_pretrained
        >>> model, variables = replace_head(*from_pretrained("cifar10"), num_labels=37, key=jax.random.key(0))
        >>> variables["params"]["head"]["linear"]["kernel"].shape
        (160, 37)
    """
    if model.folded or not model.head_names:
        raise ValueError(
            "Fresh heads need a model with heads whose batch norms are not folded: expected a"
            f" LevitForImageClassification, found a {'folded ' * model.folded}{type(model).__name__}."
        )
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}.")
    labels: Any = {"num_labels": num_labels, "id2label": None}
    model = model.clone(config=dataclasses.replace(model.config, **labels))
    pooled = jnp.zeros((1, model.config.hidden_sizes[-1]), model.shared["dtype"])
    fresh = dict(flatten_dict(variables, sep="/"))
    for i, name in enumerate(model.head_names):
        head = NormLinear(num_labels, **model.shared)
        made = head.init(jax.random.fold_in(key, i), pooled)
        fresh = {path: leaf for path, leaf in fresh.items() if path.split("/")[1] != name}
        fresh |= {
            f"{collection}/{name}/{path}": leaf
            for collection, tree in made.items()
            for path, leaf in flatten_dict(tree, sep="/").items()
        }
    return model, unflatten_dict(fresh, sep="/")


def as_class(model: LevitBase, model_class: type[Model]) -> Model:
    """Return a model of another class with the same fields."""
    fields = {name: getattr(model, name) for name in ("folded", "dtype", "param_dtype", "precision")}
    return model_class(model.config, **fields)


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
