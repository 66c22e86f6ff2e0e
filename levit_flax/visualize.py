"""Images of what a model looks at and what it has learned. Needs matplotlib: `pip install 'levit-flax[visualize]'`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from .classifier import ImageClassifier
from .inference import scores
from .modeling import LevitBase, LevitForImageClassificationWithTeacher
from .surgery import fold_batch_norm, merge_heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 1.6  # inches of one image in a figure
DPI = 120


def new_figure(rows: int, columns: int, cell: float = CELL) -> "tuple[Figure, np.ndarray]":
    """Return a figure and its axes [rows columns], without frames; `cell` is the width of one of them in inches.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> figure, axes = new_figure(2, 3)
        >>> axes.shape
        (2, 3)
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Images are drawn by matplotlib: pip install 'levit-flax[visualize]'.") from None
    figure = Figure(figsize=(cell * columns, cell * rows * 1.12), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def attention_names(model: LevitBase) -> list[str]:
    """Return the path of every attention in the order of `output_attentions`, such as "stage_0/block_1".

    Example:
        >>> from levit_flax import VARIANTS, LevitModel
        >>> attention_names(LevitModel(VARIANTS["levit-128S"]))[:4]
        ['stage_0/block_0', 'stage_0/block_1', 'downsample_0', 'stage_1/block_0']
    """
    names = []
    for stage, depth in enumerate(model.config.depths):
        names += [f"stage_{stage}/block_{block}" for block in range(depth)]
        names += [f"downsample_{stage}"] * (stage < model.config.num_stages - 1)
    return names


def attention_maps(
    model: LevitBase, variables: Mapping[str, Any], pixel_values: jax.Array, query: tuple[float, float] | None = None
) -> dict[str, np.ndarray]:
    """Return where every head of every attention looks.

    Args:
        model: any model, folded or not.
        variables: its variables.
        pixel_values: one prepared image, float [1 H W C].
        query: the point (y, x) that looks, as shares in [0, 1) of the image's height and width; None for the mean
            over all queries.

    Returns:
        For each attention, by its path ("stage_0/block_0", "downsample_0"), how much of the attention falls on each
        token, [H gh gw], with gh and gw the grid of the keys; each head's map sums to 1.

    Example:
        >>> from levit_flax import from_pretrained
        >>> maps = attention_maps(*from_pretrained("cifar10"), np.zeros((1, 144, 144, 3), np.float32), query=(0.5, 0.5))
        >>> maps["stage_0/block_0"].shape, maps["stage_2/block_0"].shape
        ((6, 9, 9), (10, 3, 3))
    """
    config = model.config
    output: Any = jax.jit(lambda v, x: model.apply(v, x, output_attentions=True))(variables, pixel_values)
    maps = {}
    for name, attention in zip(attention_names(model), output.attentions, strict=True):
        stage = int(name.partition("/")[0].rpartition("_")[2])
        weights = np.asarray(attention[0], np.float32)  # [H Q K]
        if query is None:
            looked = weights.mean(1)
        else:
            height, width = config.grids[stage + name.startswith("downsample")]
            looked = weights[:, int(query[0] * height) * width + int(query[1] * width)]
        maps[name] = looked.reshape(-1, *config.grids[stage])
    return maps


def bias_tables(model: LevitBase, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the attention biases of every attention by its path, as images [H 2*gh-1 2*gw-1].

    The middle is a token's bias toward itself; up and left of it lie the tokens above and to the left. The tables hold
    a quarter of this, because the bias does not tell left from right.

    Args:
        model: any model.
        variables: its variables.

    Example:
        >>> from levit_flax import from_pretrained
        >>> bias_tables(*from_pretrained("cifar10"))["stage_0/block_0"].shape  # of a grid of 9 x 9 tokens
        (6, 17, 17)
    """
    flat = flatten_dict(variables, sep="/")
    images = {}
    for name in attention_names(model):
        table = np.asarray(flat[f"params/{name}/attention/attention_biases"], np.float32)
        height, width = model.config.grids[int(name.partition("/")[0].rpartition("_")[2])]
        rows, columns = (np.abs(np.arange(-n + 1, n)) for n in (height, width))
        images[name] = table.reshape(height, width, -1)[rows][:, columns].transpose(2, 0, 1)
    return images


def saliency(
    model: LevitBase, variables: Mapping[str, Any], pixel_values: jax.Array, label: int | None = None
) -> np.ndarray:
    """Return how much each pixel moves a logit: the largest absolute gradient over the channels.

    Args:
        model: a model with a classifier.
        variables: its variables.
        pixel_values: prepared images, float [B H W C].
        label: the class whose logit is looked at; None for each image's likeliest.

    Returns:
        [B H W], 0 or more.

    Example:
        >>> from levit_flax import from_pretrained
        >>> saliency(*from_pretrained("cifar10"), jnp.zeros((1, 144, 144, 3)), label=3).shape
        (1, 144, 144)

    Source: Simonyan et al. 2013, "Deep inside convolutional networks".
    """

    @jax.jit
    @jax.grad
    def gradient(pixels: jax.Array, variables: Mapping[str, Any]) -> jax.Array:
        output: Any = model.apply(variables, pixels)
        chosen = output.logits.max(-1) if label is None else output.logits[:, label]
        return chosen.sum()

    return np.asarray(jnp.abs(gradient(jnp.asarray(pixel_values), variables)).max(-1))


def class_activation_map(
    model: LevitBase, variables: Mapping[str, Any], pixel_values: jax.Array, label: int | None = None
) -> np.ndarray:
    """Return how much each token of the last stage speaks for a class.

    LeViT's head is linear in the mean of the last tokens, so that a logit is the mean of what the tokens say singly.

    Args:
        model: a model with a classifier; two heads count as their average.
        variables: its variables.
        pixel_values: prepared images, float [B H W C].
        label: the class; None for each image's likeliest.

    Returns:
        [B gh gw], whose mean over the tokens is the class's logit.

    Example:
        >>> from levit_flax import from_pretrained
        >>> class_activation_map(*from_pretrained("cifar10"), jnp.zeros((1, 144, 144, 3)), label=3).shape
        (1, 3, 3)

    Source: Zhou et al. 2016, "Learning deep features for discriminative localization".
    """
    if isinstance(model, LevitForImageClassificationWithTeacher):
        model, variables = merge_heads(model, variables)
    if not model.folded:
        model, variables = fold_batch_norm(model, variables)
    head = variables["params"]["head"]["linear"]
    output: Any = jax.jit(lambda v, x: model.apply(v, x, output_features=True))(variables, pixel_values)
    says = np.asarray(output.features[-1]) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])  # [B gh gw classes]
    labels = np.asarray(output.logits).argmax(-1) if label is None else np.full(len(says), label)
    return np.take_along_axis(says, labels[:, None, None, None], -1)[..., 0]


def explain(classifier: ImageClassifier, image: Any, label: str | None = None) -> "Figure":
    """Draw what a classifier sees in an image.

    Args:
        classifier: the model and what prepares its images.
        image: a path, a PIL image or an array.
        label: the class to explain, by its name; None for the likeliest.

    Returns:
        A figure: the image as the model gets it; the class-activation map and the gradient saliency of the class;
        and the attention of every block over the image, the mean over its heads and queries.

    Raises:
        ValueError: the model knows no such class.
        ImageError: the image cannot be used.

    Example:
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
    row = scores(np.asarray(classifier.logits(np.asarray(pixel_values)))[0], model.config)
    index = int(row.argmax()) if label is None else names.index(label)
    variables = jax.device_get(classifier.variables)
    activation = class_activation_map(model, variables, pixel_values, index)[0]
    gradients = saliency(model, variables, pixel_values, index)[0]
    attention = attention_maps(model, variables, pixel_values)
    columns = max(4, *model.config.depths) + 1
    figure, axes = new_figure(1 + model.config.num_stages, columns)
    axes[0, 0].imshow(shown)
    axes[0, 0].set_title("image", fontsize=8)
    overlay(axes[0, 1], shown, activation, f"speaks for {names[index][:18]}")
    brightness = gradients / max(np.quantile(gradients, 0.995), np.finfo(np.float32).tiny)
    axes[0, 2].imshow(np.clip(brightness, 0, 1), cmap="gray")
    axes[0, 2].set_title("gradient", fontsize=8)
    draw_scores(axes[0, 3], row, names)
    for name, maps in attention.items():
        stage, _, block = name.partition("/")
        column = int(block.rpartition("_")[2]) if block else model.config.depths[int(stage.rpartition("_")[2])]
        overlay(axes[1 + int(stage.rpartition("_")[2]), column], shown, maps.mean(0), name.replace("_", " "))
    figure.suptitle(f"{names[index][:60]}: {row[index]:.1%}", fontsize=11)
    return figure


def overlay(ax: Any, image: np.ndarray, heat: np.ndarray, title: str) -> None:
    """Draw a coarse map over an image, in one color scale from its least to its largest value.

    Args:
        ax: matplotlib's axes.
        image: [H W C], uint8 levels or floats in [0, 1].
        heat: [gh gw], stretched over the image.
        title: what stands above it.

    Example:
        >>> figure, [[ax]] = new_figure(1, 1)
        >>> overlay(ax, np.zeros((80, 80, 3), np.uint8), heat=np.arange(25).reshape(5, 5), title="attention")
    """
    height, width = image.shape[:2]
    ax.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(heat, cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
    ax.set_title(title, fontsize=8)


def draw_scores(ax: Any, row: Any, names: Sequence[str], count: int = 5) -> None:
    """Draw the likeliest classes as bars.

    Args:
        ax: matplotlib's axes.
        row: scores [N].
        names: the names of the N classes.
        count: how many to draw.

    Example:
        >>> figure, [[ax]] = new_figure(1, 1)
        >>> draw_scores(ax, np.array([0.2, 0.7, 0.1]), ["ant", "bee", "cat"], count=2)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['bee', 'ant']
    """
    order = np.argsort(row)[::-1][:count]
    ax.set_axis_on()
    ax.barh(range(len(order)), row[order], color="tab:blue")
    ax.set_yticks(range(len(order)), [names[i][:16] for i in order], fontsize=6)
    ax.invert_yaxis()
    ax.tick_params(axis="x", labelsize=6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("score", fontsize=8)


def draw_bias_tables(model: LevitBase, variables: Mapping[str, Any]) -> "Figure":
    """Draw the attention biases: a row for each attention, a column for each head; red attracts, blue repels.

    Args:
        model: any model.
        variables: its variables.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from levit_flax import from_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_bias_tables(*from_pretrained("cifar10")).savefig(f"{folder}/biases.png")
    """
    images = bias_tables(model, variables)
    figure, axes = new_figure(len(images), max(map(len, images.values())), cell=1.0)
    for row, (name, heads) in zip(axes, images.items(), strict=True):
        largest = float(np.abs(heads).max()) or 1.0  # untrained biases are zero
        for ax, head in zip(row, heads, strict=False):
            ax.imshow(head, cmap="RdBu_r", vmin=-largest, vmax=largest)
        row[0].set_title(f"{name.replace('_', ' ')}  (±{largest:.1f})", fontsize=6, loc="left")
    return figure


def draw_confusion(confusion: np.ndarray, labels: Sequence[str]) -> "Figure":
    """Draw a confusion matrix [N N]: a row for each true class, as shares of its images.

    Args:
        confusion: number of images by true and by named class [N N], as in `evaluation.Evaluation`.
        labels: the names of the N classes.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> figure = draw_confusion(np.array([[2, 1], [0, 1]]), ["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['67%', '33%', '0%', '100%']
    """
    figure, axes = new_figure(1, 1, cell=min(3.5 + 0.2 * len(labels), 24))
    [[ax]] = axes
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    ax.set_axis_on()
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set_xlabel("named")
    ax.set_ylabel("true")
    if len(labels) <= 40:
        ax.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
        ax.set_yticks(range(len(labels)), labels, fontsize=7)
    if len(labels) <= 20:
        for (y, x), share in np.ndenumerate(shares):
            ax.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=6, color="white" if share > 0.5 else "0.3")
    figure.colorbar(image, ax=ax, shrink=0.8)
    return figure


def draw_curves(history: Sequence[Mapping[str, float]]) -> "Figure":
    """Draw the course of a training: loss, accuracy where there is one, and learning rate, by epoch.

    Args:
        history: one row for each evaluation, with "epoch" and the columns of metrics.csv.

    Returns:
        A figure.

    Example:
        >>> rows = [{"epoch": i, "train_loss": 1 / i, "validation_loss": 2 / i, "learning_rate": 1e-3} for i in (1, 2)]
        >>> len(draw_curves(rows).axes)
        2
    """
    panels = {
        title: [name for name in names if name in history[0]]
        for title, names in {
            "loss": ("train_loss", "validation_loss"),
            "accuracy": ("train_accuracy", "validation_accuracy"),
            "learning rate": ("learning_rate",),
        }.items()
    }
    panels = {title: names for title, names in panels.items() if names}
    figure, axes = new_figure(1, len(panels), cell=3.4)
    epochs = [row["epoch"] for row in history]
    for ax, (title, names) in zip(axes[0], panels.items(), strict=True):
        ax.set_axis_on()
        for name in names:
            ax.plot(epochs, [row[name] for row in history], marker=".", label=name.partition("_")[0])
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("epoch", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            ax.legend(fontsize=7, frameon=False)
    return figure
