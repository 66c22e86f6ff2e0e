"""The teacher of a distilled model: a model, a function, or logits that were stored before.

Source: Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention".
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from levit_flax import loading
from levit_flax.classifier import ImageClassifier
from levit_flax.configuration import SINGLE_LABEL, LevitConfig
from levit_flax.datasets import LabeledImages
from levit_flax.files import write_atomically
from levit_flax.hub import DEFAULTS, HubOptions
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.inference import prepare

from .recipe import Recipe, RecipeError
from .state import Teacher

STORED_SUFFIX = ".npz"


class TeacherSource(NamedTuple):
    """What training asks for the teacher's logits: a function and its variables, or what was stored for each image.

    Attributes:
        function: (variables, pixel_values [B H W C] as the student sees them) -> logits [B L]; or None.
        variables: the function's first argument.
        logits: [N L], one row for each training image; or None.
    """

    function: Teacher | None = None
    variables: Any = None
    logits: np.ndarray | None = None


def make_teacher(
    teacher: str | Path | Callable[[jax.Array], jax.Array] | None,
    recipe: Recipe,
    config: LevitConfig,
    processor: LevitImageProcessor,
    images: LabeledImages,
    root: Path,
    options: HubOptions = DEFAULTS,
) -> TeacherSource:
    """Prepare the teacher.

    Args:
        teacher: a checkpoint, as in `levit_flax.from_pretrained`; an .npz file of `store_logits`; or a function from
            pixel values [B H W C], normalized for the student, to logits [B L] in the order of its classes.
        recipe: says how the student learns from it.
        config: the student's.
        processor: the student's.
        images: the ones to train on.
        root: the directory that stored logits name the images relative to.
        options: how to access the Hub.

    Raises:
        RecipeError: the recipe distills and there is no teacher, or the other way round; it mixes images that
            logits were stored for; or the images do not have one class each.
        ValueError: the teacher does not know the student's classes.
    """
    check_teacher(teacher, recipe, images)
    if teacher is None:
        return TeacherSource()
    if callable(teacher):
        return TeacherSource(check_width(teacher, config.num_labels))
    if Path(teacher).suffix == STORED_SUFFIX:
        return TeacherSource(logits=read_logits(Path(teacher), images, root, config))
    return load_teacher(teacher, config, processor, options)


def check_teacher(
    teacher: str | Path | Callable[[jax.Array], jax.Array] | None, recipe: Recipe, images: LabeledImages
) -> None:
    """Raise RecipeError where a recipe, a teacher and the images do not fit each other; nothing is read."""
    if (teacher is None) == (recipe.distillation != "none"):
        expected = "a teacher (--teacher)" if teacher is None else 'distillation="hard" or "soft"'
        raise RecipeError(
            f"distillation is {recipe.distillation!r} and there is {'no' if teacher is None else 'a'} teacher: expected"
            f" {expected}."
        )
    if teacher is not None and images.problem_type != SINGLE_LABEL:
        raise RecipeError(
            f"A teacher's answer is one class, but {images.where} is for {images.problem_type}: expected"
            ' distillation = "none", or images of one class each.'
        )
    stored = isinstance(teacher, str | Path) and Path(teacher).suffix == STORED_SUFFIX
    if stored and (recipe.mixup or recipe.cutmix):
        raise RecipeError(
            f"{teacher} holds logits of whole images, and the recipe mixes images: expected mixup = 0 and cutmix = 0."
        )


def load_teacher(
    source: str | Path, config: LevitConfig, processor: LevitImageProcessor, options: HubOptions
) -> TeacherSource:
    """Load a model as a teacher; it sees the student's images, resized and normalized as it was trained with."""
    model, variables, own_processor, _ = loading.load_model(source, options, dtype="float32")
    model, variables = prepare(model, variables)
    order = match_labels(model.config.id2label, config.id2label, str(source))
    mean, std, own_mean, own_std = (
        np.asarray(value, np.float32).reshape(1, 1, 1, -1)
        for of in (processor, own_processor)
        for value in ((of.image_mean, of.image_std) if of.do_normalize else (0.0, 1.0))
    )
    size = model.config.image_height_width

    def teach(variables: Any, pixel_values: jax.Array) -> jax.Array:
        # As one multiplication and one addition, which are the identity for equal processors.
        pixel_values = pixel_values * (std / own_std) + (mean - own_mean) / own_std
        if pixel_values.shape[1:3] != size:
            shape = (pixel_values.shape[0], *size, pixel_values.shape[3])
            pixel_values = jax.image.resize(pixel_values, shape, "cubic")
        output: Any = model.apply(variables, pixel_values)
        return output.logits[:, jnp.array(order)]

    return TeacherSource(teach, variables)


def check_width(function: Callable[[jax.Array], jax.Array], width: int) -> Teacher:
    """Return a function from pixel values [B H W C] to logits [B width] as a teacher without variables."""

    def teach(_: Any, pixel_values: jax.Array) -> jax.Array:
        logits = function(pixel_values)
        expected = (pixel_values.shape[0], width)
        if logits.shape != expected:
            raise ValueError(
                f"The teacher's logits have the shape {logits.shape}: expected {expected}, a row for each image and a"
                " column for each of the student's classes, in their order."
            )
        return logits

    return teach


def match_labels(own: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    """Return the teacher's index of each class of the student."""
    indices = {label: i for i, label in enumerate(own)}
    missing = [label for label in wanted if label not in indices]
    if missing:
        raise ValueError(
            f"The teacher {where} has {len(own)} classes, and {missing[0]} is none of them: expected one that knows the"
            f" student's {len(wanted)} classes by name."
        )
    return [indices[label] for label in wanted]


def store_logits(path: str | Path, classifier: ImageClassifier, data: str | Path, files: Sequence[str | Path]) -> None:
    """Store a classifier's logits for images, for `finetune` to learn from.

    Args:
        path: the .npz file to write: "files", paths relative to `data`; "labels", the classes; "logits" [N L].
        classifier: the teacher.
        data: the directory that training will be given.
        files: the images, below `data`.

    Raises:
        ImageError: an image cannot be used.
        OSError: a file cannot be read, or the result not be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (80, 80)).save(f"{folder}/1.png")
        ...     classifier = ImageClassifier.from_pretrained("cifar10")
        ...     store_logits(f"{folder}/teacher.npz", classifier, folder, [f"{folder}/1.png"])
        ...     np.load(f"{folder}/teacher.npz")["logits"].shape
        (1, 10)
    """
    rows = []
    for logits in classifier.stream_logits(files):
        if isinstance(logits, Exception):
            raise logits
        rows.append(logits)
    names = [Path(file).relative_to(data).as_posix() for file in files]
    labels = classifier.model.config.id2label

    def write(staging: Path) -> None:
        with staging.open("wb") as file:
            np.savez_compressed(file, files=np.array(names), labels=np.array(labels), logits=np.stack(rows))

    write_atomically(Path(path), write)


def read_logits(path: Path, images: LabeledImages, root: Path, config: LevitConfig) -> np.ndarray:
    """Return the stored logits [N L] of the training images, in the order of the student's classes.

    Raises:
        ValueError: the file is not one of `store_logits`, or lacks an image or a class.
    """
    if not isinstance(images.images, list):
        raise ValueError(f"{path} names images by their paths, which those of {images.where} do not have.")
    try:
        with np.load(path) as stored:
            files, labels, logits = (stored[name] for name in ("files", "labels", "logits"))
        if logits.shape != (len(files), len(labels)):
            raise ValueError(f"{len(files)} files and {len(labels)} labels, but logits of the shape {logits.shape}")
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises whatever its reader stumbles over
        raise ValueError(f"{path} is not a file of stored logits: {error}") from None
    rows = {name: row for row, name in enumerate(files.tolist())}
    names = [Path(image).relative_to(root).as_posix() for image in images.images]
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(
            f"{path} has no logits for {len(missing)} of the {len(names)} training images, the first of which is"
            f" {missing[0]}: store them for all."
        )
    order = match_labels(labels.tolist(), config.id2label, str(path))
    found: np.ndarray = logits[[rows[name] for name in names]][:, order]
    return found
