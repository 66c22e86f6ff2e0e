"""Figures that explain predictions and show training metrics.

Requires matplotlib, which the extra `visualize` installs.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from .arguments import _check_types
from .classifier import ImageClassifier
from .inference import _scores
from .modeling import LevitBase, LevitForImageClassificationWithTeacher
from .surgery import fold_batch_norm, merge_heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 1.8  # inches
_DPI = 120


def _new_figure(rows: int, columns: int, cell: float = _CELL) -> "tuple[Figure, np.ndarray]":
    """Return a figure and its frameless axes [rows columns]; `cell` is the width of a column in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "Drawing requires matplotlib, which is not installed. Run: pip install 'levit-flax[visualize]'"
        ) from None
    figure = Figure(figsize=(cell * columns, cell * rows * 1.12), dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def _attention_names(model: LevitBase) -> list[str]:
    """Return the paths of all attentions ("stage_0/block_0", "downsample_0") in the order of `output_attentions`."""
    names = []
    for stage, depth in enumerate(model.config.depths):
        names += [f"stage_{stage}/block_{block}" for block in range(depth)]
        names += [f"downsample_{stage}"] * (stage < model.config.num_stages - 1)
    return names


@_check_types
def attention_maps(
    model: LevitBase, variables: Mapping[str, Any], pixel_values: jax.Array, query: tuple[float, float] | None = None
) -> dict[str, np.ndarray]:
    """Return the attention weights of every head of every attention as maps.

    Args:
        model: any model, folded or not.
        variables: variables of the model.
        pixel_values: one preprocessed image, float [1 H W C].
        query: position (y, x) of the query token, as fractions in [0, 1) of the image's height and width. None
            averages over all queries.

    Returns:
        Attention weights [heads gh gw] by the path of the attention ("stage_0/block_0", "downsample_0"). gh and gw
        are the size of the key grid. The weights of each head sum to 1.

    Raises:
        ValueError: the query is outside the image, or `pixel_values` does not fit the model.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> maps = attention_maps(*from_pretrained("cifar10"), np.zeros((1, 144, 144, 3), np.float32), query=(0.5, 0.5))
        >>> maps["stage_0/block_0"].shape, maps["stage_2/block_0"].shape
        ((6, 9, 9), (10, 3, 3))
    """
    config = model.config
    if query is not None and not (len(query) == 2 and all(0 <= position < 1 for position in query)):
        raise ValueError(f"query must be None or (y, x) with fractions in [0, 1), found {query!r}.")
    output: Any = jax.jit(lambda v, x: model.apply(v, x, output_attentions=True, return_dict=True))(
        variables, pixel_values
    )
    maps = {}
    for name, attention in zip(_attention_names(model), output.attentions, strict=True):
        stage = int(name.partition("/")[0].rpartition("_")[2])
        weights = np.asarray(attention[0], np.float32)  # [H Q K]
        if query is None:
            selected = weights.mean(1)
        else:
            height, width = config.grids[stage + name.startswith("downsample")]
            selected = weights[:, int(query[0] * height) * width + int(query[1] * width)]
        maps[name] = selected.reshape(-1, *config.grids[stage])
    return maps


@_check_types
def bias_tables(model: LevitBase, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the learned attention biases as images, one per head.

    Args:
        model: any model.
        variables: variables of the model.

    Returns:
        Biases [heads 2*gh-1 2*gw-1] by the path of the attention. The center is the bias of a token toward itself;
        the pixel dy rows below and dx columns right of it is the bias toward the token at that offset. Each image is
        symmetric in both directions, because LeViT only stores the absolute offsets.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> bias_tables(*from_pretrained("cifar10"))["stage_0/block_0"].shape  # a grid of 9 x 9 tokens
        (6, 17, 17)
    """
    flat = flatten_dict(variables, sep="/")
    images = {}
    for name in _attention_names(model):
        table = np.asarray(flat[f"params/{name}/attention/attention_biases"], np.float32)
        height, width = model.config.grids[int(name.partition("/")[0].rpartition("_")[2])]
        rows, columns = (np.abs(np.arange(-n + 1, n)) for n in (height, width))
        images[name] = table.reshape(height, width, -1)[rows][:, columns].transpose(2, 0, 1)
    return images


def _check_label(label: int | None, model: LevitBase) -> None:
    """Raise ValueError unless `label` is None or the index of one of the model's classes."""
    count = model.config.num_labels
    if label is not None and not (isinstance(label, int | np.integer) and 0 <= label < count):
        raise ValueError(f"label must be None or the index of a class: expected 0 to {count - 1}, found {label!r}.")


@_check_types
def saliency(
    model: LevitBase, variables: Mapping[str, Any], pixel_values: jax.Array, label: int | None = None
) -> np.ndarray:
    """Return the gradient saliency of each pixel.

    The saliency is the largest absolute gradient of a logit over the channels of the pixel.

    Args:
        model: a model with a classification head.
        variables: variables of the model.
        pixel_values: preprocessed images, float [B H W C].
        label: index of the class. None selects the most likely class of each image.

    Returns:
        Nonnegative values [B H W].

    Raises:
        ValueError: `label` is not the index of a class.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> saliency(*from_pretrained("cifar10"), jnp.zeros((1, 144, 144, 3)), label=3).shape
        (1, 144, 144)

    Source: Simonyan et al. 2013, "Deep inside convolutional networks".
    """
    _check_label(label, model)

    @jax.jit
    @jax.grad
    def gradient(pixels: jax.Array, variables: Mapping[str, Any]) -> jax.Array:
        output: Any = model.apply(variables, pixels, return_dict=True)
        selected = output.logits.max(-1) if label is None else output.logits[:, label]
        return jnp.sum(selected)

    return np.asarray(jnp.abs(gradient(jnp.asarray(pixel_values), variables)).max(-1))


@_check_types
def class_activation_map(
    model: LevitBase, variables: Mapping[str, Any], pixel_values: jax.Array, label: int | None = None
) -> np.ndarray:
    """Return the contribution of each token of the last stage to a logit.

    LeViT's head is linear in the mean of the last tokens, so the logit is the mean of the tokens' own logits.

    Args:
        model: a model with a classification head. Two heads are averaged.
        variables: variables of the model.
        pixel_values: preprocessed images, float [B H W C].
        label: index of the class. None selects the most likely class of each image.

    Returns:
        Logits [B gh gw] of the tokens. Their mean is the logit of the class.

    Raises:
        ValueError: `label` is not the index of a class.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> class_activation_map(*from_pretrained("cifar10"), jnp.zeros((1, 144, 144, 3)), label=3).shape
        (1, 3, 3)

    Source: Zhou et al. 2016, "Learning deep features for discriminative localization".
    """
    _check_label(label, model)
    if isinstance(model, LevitForImageClassificationWithTeacher):
        model, variables = merge_heads(model, variables)
    if not model.folded:
        model, variables = fold_batch_norm(model, variables)
    head = variables["params"]["head"]["linear"]
    output: Any = jax.jit(lambda v, x: model.apply(v, x, output_features=True, return_dict=True))(
        variables, pixel_values
    )
    logits = np.asarray(output.features[-1]) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])  # [B gh gw L]
    labels = np.asarray(output.logits).argmax(-1) if label is None else np.full(len(logits), label)
    return np.take_along_axis(logits, labels[:, None, None, None], -1)[..., 0]


@_check_types
def explain(classifier: ImageClassifier, image: Any, label: str | None = None) -> "Figure":
    """Draw the evidence that a classifier uses for an image.

    Args:
        classifier: the model and its image processor.
        image: a path, a PIL image or an array.
        label: name of the class to explain. None selects the most likely class.

    Returns:
        A figure with the preprocessed image, the class activation map and the gradient saliency of the class, the
        scores of the most likely classes, and one attention map per block, averaged over its heads and queries.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the model has no class of this name.
        ImageError: the image cannot be decoded.

    Examples:
        >>> classifier = ImageClassifier.from_pretrained("cifar10")
        >>> figure = explain(classifier, np.zeros((60, 90, 3), np.uint8), label="cat")
        >>> figure.get_suptitle().partition(":")[0]
        'cat'
    """
    model, processor = classifier.model, classifier.processor
    names = model.config.id2label
    if label is not None and label not in names:
        raise ValueError(f"The model has no class {label!r}: its classes are {', '.join(names[:8])}, ...")
    shown = processor.resize_and_crop(image)
    pixel_values = jnp.asarray(processor.rescale_and_normalize(shown), jnp.float32)[None]
    row = _scores(np.asarray(classifier.logits(np.asarray(pixel_values)))[0], model.config)
    index = int(row.argmax()) if label is None else names.index(label)
    variables = jax.device_get(classifier.variables)
    activation = class_activation_map(model, variables, pixel_values, index)[0]
    gradients = saliency(model, variables, pixel_values, index)[0]
    attention = attention_maps(model, variables, pixel_values)
    count = 4 + len(attention)
    columns = _columns(count)
    figure, axes = _new_figure(-(-count // columns), columns)
    panels = iter(axes.flat)
    _draw_image(next(panels), shown, "input image")
    overlay(next(panels), shown, activation, f"class activation: {_literal(names[index], 16)}")
    brightness = gradients / max(np.quantile(gradients, 0.995), np.finfo(np.float32).tiny)
    _draw_image(next(panels), np.clip(brightness, 0, 1), "gradient saliency")
    _draw_scores(next(panels), row, names)
    for ax, (name, maps) in zip(panels, attention.items(), strict=False):
        overlay(ax, shown, maps.mean(0), f"attention: {_title(name)}")
    figure.suptitle(f"{_literal(names[index], 60)}: {row[index]:.1%}", fontsize=11)
    return figure


def _columns(panels: int) -> int:
    """Return the number of columns from 4 to 7 that leaves the fewest cells empty."""
    return min(range(4, 8), key=lambda columns: -panels % columns)


def _title(path: str) -> str:
    return path.replace("_", " ").replace("/", ", ")


def _literal(name: str, length: int) -> str:
    """Return a class name for a figure, shortened, in which Matplotlib finds no formulas and only text."""
    name = name.encode("utf-8", "backslashreplace").decode()
    shown = name if len(name) <= length else f"{name[: length - 1]}…"
    return shown.replace("$", r"\$")


def _draw_image(ax: Any, image: np.ndarray, title: str) -> None:
    ax.imshow(image, cmap="gray")
    ax.set_title(title, fontsize=8)


@_check_types
def overlay(ax: Any, image: np.ndarray, heat: np.ndarray, title: str) -> None:
    """Draw a coarse heat map over an image, scaled from its minimum to its maximum.

    Args:
        ax: a matplotlib `Axes`.
        image: [H W C], uint8 or float in [0, 1].
        heat: [gh gw], stretched to the size of the image.
        title: title of the axes.

    Raises:
        ValueError: an array has another number of axes.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> overlay(ax, np.zeros((80, 80, 3), np.uint8), heat=np.arange(25).reshape(5, 5), title="attention")
    """
    if image.ndim != 3 or heat.ndim != 2:
        raise ValueError(
            "The image or the heat map has the wrong shape: expected [H W C] and [gh gw], found"
            f" {list(image.shape)} and {list(heat.shape)}."
        )
    height, width = image.shape[:2]
    ax.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(heat, cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
    ax.set_title(title, fontsize=8)


def _draw_scores(ax: Any, row: np.ndarray, names: Sequence[str], count: int = 5) -> None:
    """Draw the scores [N], in [0, 1], of the `count` most likely classes as bars."""
    order = np.argsort(row)[::-1][:count]
    ax.set_axis_on()
    ax.set_box_aspect(1)
    ax.barh(range(len(order)), row[order], color="tab:blue", alpha=0.4)
    for place, i in enumerate(order):
        ax.text(0.03, place, f"{_literal(names[i], 20)} {row[i]:.0%}", va="center", fontsize=8)
    ax.set(xlim=(0, 1), xticks=[], yticks=[])
    ax.invert_yaxis()
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.set_title("scores", fontsize=8)


@_check_types
def draw_bias_tables(model: LevitBase, variables: Mapping[str, Any]) -> "Figure":
    """Draw the learned attention biases: a row per attention, a column per head.

    Red is a positive bias, which increases attention; blue is a negative one.

    Args:
        model: any model.
        variables: variables of the model.

    Returns:
        A figure. The title of each row ends with the largest absolute bias of the row.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> import tempfile
        >>> from levit_flax import from_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_bias_tables(*from_pretrained("cifar10")).savefig(f"{folder}/biases.png")
    """
    images = bias_tables(model, variables)
    figure, axes = _new_figure(len(images), max(map(len, images.values())), cell=1.0)
    for row, (name, heads) in zip(axes, images.items(), strict=True):
        largest = float(np.abs(heads).max()) or 1.0  # biases are initialized to zero
        for ax, head in zip(row, heads, strict=False):
            ax.imshow(head, cmap="RdBu_r", vmin=-largest, vmax=largest)
        row[0].set_title(f"{_title(name)}  (±{largest:.1f})", fontsize=7, loc="left")
    return figure


@_check_types
def draw_confusion(confusion: np.ndarray, labels: Sequence[str]) -> "Figure":
    """Draw a confusion matrix in percent of the images of each true class.

    Args:
        confusion: number of images by true class and predicted class [N N], as in `Evaluation`.
        labels: names of the N classes.

    Returns:
        A figure with one row per true class. With up to 20 classes, each cell of at least 0.5% shows its percentage.
        With up to 40 classes, the axes show the class names.

    Raises:
        ValueError: the matrix is not square, or has another size than `labels`.
        ImportError: matplotlib is not installed.

    Examples:
        >>> figure = draw_confusion(np.array([[2, 1], [0, 1]]), ["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['67', '33', '100']
    """
    if confusion.shape != (len(labels), len(labels)):
        raise ValueError(
            f"The confusion matrix does not fit the labels: expected {[len(labels)] * 2}, found"
            f" {list(confusion.shape)}."
        )
    size = min(3.5 + 0.2 * len(labels), 16)
    figure, [[ax]] = _new_figure(1, 1)
    figure.set_size_inches(1.15 * size, size)
    figure.set_layout_engine("compressed")  # fits the color bar to the square matrix
    percent = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    ax.set_axis_on()
    image = ax.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    if len(labels) <= 40:
        names = [_literal(label, 24) for label in labels]
        ax.set_xticks(range(len(labels)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        ax.set_yticks(range(len(labels)), names, fontsize=8)
    if len(labels) <= 20:
        for (y, x), share in np.ndenumerate(percent):
            if share >= 0.5:
                ax.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8, color="w" if share > 60 else "k")
    figure.colorbar(image, ax=ax, label="images of the true class (%)")
    return figure


_PANELS = {
    "loss": ("train_loss", "validation_loss"),
    "accuracy": ("train_accuracy", "validation_accuracy"),
    "learning rate": ("learning_rate",),
}


@_check_types
def draw_curves(history: Sequence[Mapping[str, float]]) -> "Figure":
    """Draw the loss, the accuracy and the learning rate of a training run by epoch.

    Args:
        history: one row per evaluation, with "epoch" and the other columns of metrics.csv. Panels without a column
            are left out.

    Returns:
        A figure. A run with a single evaluation shows its values as numbers.

    Raises:
        ValueError: there are no rows, no columns to draw, or a row lacks a column of the first one.
        ImportError: matplotlib is not installed.

    Examples:
        >>> rows = [{"epoch": i, "train_loss": 1 / i, "validation_loss": 2 / i, "learning_rate": 1e-3} for i in (1, 2)]
        >>> len(draw_curves(rows).axes)
        2
    """
    first = history[0] if history else {}
    panels = {title: [name for name in names if name in first] for title, names in _PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    columns = ["epoch", *(name for names in panels.values() for name in names)]
    incomplete = [i for i, row in enumerate(history) if not all(name in row for name in columns)]
    if not panels or incomplete:
        found = f"row {incomplete[0]} has {', '.join(history[incomplete[0]]) or 'none'}" if incomplete else "none"
        raise ValueError(
            "The history cannot be drawn: expected rows with epoch and the same other columns of metrics.csv, found"
            f" {found}."
        )
    figure, axes = _new_figure(1, len(panels), cell=3.4)
    for ax, (title, names) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(ax, history, title, names)
    return figure


def _draw_panel(ax: Any, history: Sequence[Mapping[str, float]], title: str, names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    ax.set_axis_on()
    for name in names:
        values = [row[name] for row in history]
        label = {"train": "training", "validation": "validation"}.get(name.partition("_")[0])
        ax.plot(epochs, values, marker=".", label=label)
        if len(history) == 1:
            ax.annotate(f"{values[0]:.4g}", (epochs[0], values[0]), (6, 4), textcoords="offset points", fontsize=8)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("epoch", fontsize=8)
    if len(history) == 1:
        ax.set_xticks(epochs)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.ticklabel_format(axis="y", scilimits=(-2, 4))
    ax.yaxis.get_offset_text().set_fontsize(7)
    ax.tick_params(labelsize=7)
    ax.margins(y=0.1)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        ax.legend(fontsize=7, frameon=False)
