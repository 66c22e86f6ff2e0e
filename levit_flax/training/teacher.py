"""The teacher of a distilled model: a model, a function, or stored logits.

Source: Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention".
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from levit_flax import loading
from levit_flax.arguments import _check_types
from levit_flax.checkpoint import _find_fault
from levit_flax.classifier import ImageClassifier
from levit_flax.configuration import _SINGLE_LABEL, LevitConfig
from levit_flax.datasets import LabeledImages, _match_names
from levit_flax.files import _check_regular, _write_atomically
from levit_flax.hub import _DEFAULTS, _HubOptions
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.inference import _prepare

from .recipe import Recipe, RecipeError
from .state import _Teacher

_STORED_SUFFIX = ".npz"


class _TeacherSource(NamedTuple):
    """The source of the teacher's logits: a function with its variables, or an array.

    Attributes:
        function: (variables, pixel_values [B H W C] normalized for the student) -> logits [B L]; or None.
        variables: the function's first argument.
        logits: [N L], one row for each training image; or None.
    """

    function: _Teacher | None = None
    variables: Any = None
    logits: np.ndarray | None = None


def _make_teacher(
    teacher: str | Path | Callable[[jax.Array], jax.Array] | None,
    recipe: Recipe,
    config: LevitConfig,
    processor: LevitImageProcessor,
    train: LabeledImages,
    root: Path,
    options: _HubOptions = _DEFAULTS,
) -> _TeacherSource:
    """Load and check the teacher; `root` is the directory that the paths of stored logits are relative to."""
    _check_teacher(teacher, recipe, train)
    if teacher is None:
        return _TeacherSource()
    if callable(teacher):
        return _TeacherSource(_check_width(teacher, config.num_labels))
    if Path(teacher).suffix == _STORED_SUFFIX:
        return _TeacherSource(logits=_read_logits(Path(teacher), train, root, config))
    return _load_teacher(teacher, config, processor, options)


def _check_teacher(
    teacher: str | Path | Callable[[jax.Array], jax.Array] | None, recipe: Recipe, train: LabeledImages
) -> None:
    """Raise RecipeError unless the recipe, the teacher and the images fit each other; reads no files."""
    if (teacher is None) == (recipe.distillation != "none"):
        expected = "a teacher (teacher=...)" if teacher is None else 'distillation = "hard" or "soft"'
        raise RecipeError(
            f"distillation is {recipe.distillation!r} and there is {'no' if teacher is None else 'a'} teacher: expected"
            f" {expected}."
        )
    if teacher is not None and train.problem_type != _SINGLE_LABEL:
        raise RecipeError(
            f"Distillation needs images with one class each, but {train.where} is for {train.problem_type}: expected"
            ' distillation = "none".'
        )
    stored = isinstance(teacher, str | Path) and Path(teacher).suffix == _STORED_SUFFIX
    if stored and (recipe.mixup or recipe.cutmix):
        raise RecipeError(
            f"{teacher} has logits of unmixed images, but the recipe mixes images: expected mixup = 0 and cutmix = 0."
        )


def _load_teacher(
    source: str | Path, config: LevitConfig, processor: LevitImageProcessor, options: _HubOptions
) -> _TeacherSource:
    """Load a model as a teacher. The student's images are resized and normalized for it."""
    model, variables, own_processor, _ = loading._load_model(source, options, dtype="float32")
    model, variables = _prepare(model, variables)
    order = _match_names(config.id2label, model.config.id2label, f"The classes of the teacher {source}")
    mean, std, own_mean, own_std = (
        np.asarray(value, np.float32).reshape(1, 1, 1, -1)
        for each in (processor, own_processor)
        for value in ((each.image_mean, each.image_std) if each.do_normalize else (0.0, 1.0))
    )
    size = model.config.image_height_width

    def teach(variables: Any, pixel_values: jax.Array) -> jax.Array:
        # One multiplication and one addition, so that nothing is rounded if both processors are equal.
        pixel_values = pixel_values * (std / own_std) + (mean - own_mean) / own_std
        if pixel_values.shape[1:3] != size:
            shape = (pixel_values.shape[0], *size, pixel_values.shape[3])
            pixel_values = jax.image.resize(pixel_values, shape, "cubic")
        output: Any = model.apply(variables, pixel_values, return_dict=True)
        logits: jax.Array = output.logits[:, jnp.array(order)]
        return logits

    return _TeacherSource(teach, variables)


def _check_width(function: Callable[[jax.Array], jax.Array], width: int) -> _Teacher:
    """Return a function from pixel values [B H W C] to logits [B width] as a teacher that checks the shape."""

    def teach(_: Any, pixel_values: jax.Array) -> jax.Array:
        logits = function(pixel_values)
        expected = (pixel_values.shape[0], width)
        if logits.shape != expected:
            raise ValueError(
                f"The teacher's logits have the shape {logits.shape}: expected {expected}, one row per image and one"
                " column per class of the student, in the student's order."
            )
        return logits

    return teach


@_check_types
def store_logits(path: str | Path, classifier: ImageClassifier, data: str | Path, files: Sequence[str | Path]) -> None:
    """Write a classifier's logits to a file that `finetune` accepts as a teacher.

    Args:
        path: the .npz file to write. It contains "files", paths relative to `data`; "labels", the class names; and
            "logits" [N L].
        classifier: the teacher.
        data: the directory that will be passed to `finetune`.
        files: paths of the N images, inside `data`.

    Raises:
        ImageError: an image cannot be decoded.
        ValueError: there are no files, or one is not inside `data`.
        OSError: a file cannot be read or written.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (80, 80)).save(f"{folder}/1.png")
        ...     classifier = ImageClassifier.from_pretrained("cifar10")
        ...     store_logits(f"{folder}/teacher.npz", classifier, folder, [f"{folder}/1.png"])
        ...     np.load(f"{folder}/teacher.npz")["logits"].shape
        (1, 10)
    """
    paths = [Path(file) for file in files]
    outside = [file for file in paths if not file.is_relative_to(data)]
    if not paths or outside:
        raise ValueError(
            f"The logits cannot be stored: expected the paths of one or more images in {data}, found"
            f" {outside[0] if outside else 'none'}."
        )
    rows = []
    for logits in classifier.stream_logits(paths):
        if isinstance(logits, Exception):
            raise logits
        rows.append(logits)
    names = [file.relative_to(data).as_posix() for file in paths]
    labels = classifier.model.config.id2label

    def write(staging: Path) -> None:
        with staging.open("wb") as file:
            np.savez_compressed(file, files=np.array(names), labels=np.array(labels), logits=np.stack(rows))

    _write_atomically(Path(path), write)


def _read_logits(path: Path, train: LabeledImages, root: Path, config: LevitConfig) -> np.ndarray:
    """Return stored logits [N L] of the training images, in the order of the student's classes."""
    if not isinstance(train.images, list):
        raise ValueError(
            f"{path} stores logits by image path, but the images of {train.where} are not files: expected a directory."
        )
    _check_regular(path)
    try:
        with np.load(path) as stored:
            files, labels, logits = (stored[name] for name in ("files", "labels", "logits"))
        if logits.shape != (len(files), len(labels)):
            raise ValueError(f"{len(files)} files and {len(labels)} labels, but logits of the shape {logits.shape}")
        fault = _find_fault("logits", logits)
        if fault:
            raise ValueError(f"the logits are invalid, {fault}")
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - the reader of a damaged archive may raise any error
        raise ValueError(f"{path} is not a file of stored logits: {error}") from None
    rows = {name: row for row, name in enumerate(files.tolist())}
    names = [train.key(index, root) for index in range(len(train))]
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(
            f"{path} has no logits for {len(missing)} of the {len(names)} training images, such as {missing[0]}. Store"
            " the logits of all images."
        )
    order = _match_names(config.id2label, labels.tolist(), f"The classes of the teacher {path}")
    selected: np.ndarray = logits[[rows[name] for name in names]][:, order]
    return selected
