"""The model that is trained: made of a recipe's architecture, or of a checkpoint."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from levit_flax import loading
from levit_flax.configuration import SINGLE_LABEL, VARIANTS, LevitConfig
from levit_flax.datasets import LabeledImages
from levit_flax.hub import DEFAULTS, HubOptions
from levit_flax.image_processing import LevitImageProcessor, size_for_edge
from levit_flax.modeling import (
    LevitBase,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
    Variables,
)
from levit_flax.surgery import merge_heads, replace_head, resize_image

from .recipe import Recipe, RecipeError


class Student(NamedTuple):
    """A model ready to be trained.

    Attributes:
        model: the module.
        variables: in float32.
        processor: prepares its images.
    """

    model: LevitBase
    variables: Variables
    processor: LevitImageProcessor


def make_student(
    source: str | Path | None, recipe: Recipe, images: LabeledImages, options: HubOptions = DEFAULTS
) -> Student:
    """Make the model that a recipe trains on labeled images.

    Args:
        source: a checkpoint, as in `levit_flax.from_pretrained`; None for the recipe's architecture from scratch.
        recipe: says what becomes of the heads, the image size and stochastic depth.
        images: give the classes. Heads for other classes are fresh, which a warning says.
        options: how to access the Hub.

    Raises:
        RecipeError: there is neither a checkpoint nor an architecture, or it is not a legal one.
        ValueError: the checkpoint cannot be trained.
        OSError: there is no such checkpoint, or it cannot be read or fetched.
    """
    student = load_student(source, recipe, options) if source is not None else new_student(recipe, images)
    model, variables = student.model, student.variables
    if recipe.image_size is not None:
        model, variables = resize_image(model, variables, recipe.image_size)
    model, variables = set_classes(model, variables, images, jax.random.key(recipe.seed))
    changes: dict[str, Any] = {}
    if images.problem_type != (model.config.problem_type or SINGLE_LABEL):
        changes["problem_type"] = images.problem_type
    if recipe.drop_path_rate is not None:
        changes["drop_path_rate"] = recipe.drop_path_rate
    dtype = None if recipe.compute_dtype == "float32" else jnp.dtype(recipe.compute_dtype)
    model = model.clone(config=dataclasses.replace(model.config, **changes), dtype=dtype)
    return Student(model, variables, loading.resize_processor(student.processor, model.config))


def head_class(recipe: Recipe) -> type[LevitBase]:
    """Return the class of the model that a recipe trains."""
    two = recipe.heads == "both" or recipe.distillation != "none"
    return LevitForImageClassificationWithTeacher if two else LevitForImageClassification


def new_student(recipe: Recipe, images: LabeledImages) -> Student:
    """Make a fresh model of the recipe's architecture."""
    architecture = recipe.architecture
    if architecture is None:
        raise RecipeError("There is no model to train: expected --model with a checkpoint, or a recipe's architecture.")
    if isinstance(architecture, Mapping):
        try:
            config = LevitConfig(**architecture)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"architecture: {error}") from None
    elif architecture in VARIANTS:
        config = VARIANTS[architecture]
    else:
        raise RecipeError(f"architecture is {architecture!r}: expected one of {', '.join(VARIANTS)}, or a table.")
    config = dataclasses.replace(config, **class_fields(images))
    model = head_class(recipe)(config)
    height, width = config.image_height_width
    pixel_values = jnp.zeros((1, height, width, config.num_channels))
    variables = jax.jit(model.init)(jax.random.key(recipe.seed), pixel_values)
    if isinstance(architecture, str):
        return Student(model, variables, loading.load_processor(None, config))
    # The shorter edge fills the crop: small images have no border to spare.
    size = size_for_edge(max(height, width))
    return Student(model, variables, LevitImageProcessor(size=size, crop_size=(height, width)))


def load_student(source: str | Path, recipe: Recipe, options: HubOptions) -> Student:
    """Load a checkpoint, with the heads that the recipe asks for."""
    model, variables, processor, _ = loading.load_model(source, options, dtype="float32")
    if model.folded:
        raise ValueError(
            f"{source} has folded batch norms, which cannot be trained: expected the model before folding."
        )
    wanted = head_class(recipe)
    if isinstance(model, LevitForImageClassificationWithTeacher) and wanted is LevitForImageClassification:
        if recipe.heads == "merge":
            model, variables = merge_heads(model, variables)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the second head is left out is what was asked for
                model, variables = loading.change_heads(model, variables, wanted)
    else:
        model, variables = loading.change_heads(model, variables, wanted, jax.random.key(recipe.seed))
    return Student(model, variables, processor)


def class_fields(images: LabeledImages) -> dict[str, Any]:
    """Return the fields of a config that say what the classes of the images are."""
    if images.labels:
        return {"num_labels": len(images.labels), "id2label": dict(enumerate(images.labels))}
    return {"num_labels": images.targets.shape[1], "id2label": None}


def set_classes(
    model: LevitBase, variables: Variables, images: LabeledImages, key: jax.Array
) -> tuple[LevitBase, Variables]:
    """Give the model the classes of the images, with fresh heads where it has others."""
    config = model.config
    fields = class_fields(images)
    if images.labels:
        same = sorted(config.id2label) == sorted(images.labels)
    else:
        same = (config.num_labels, config.problem_type) == (fields["num_labels"], images.problem_type)
    if same:
        return model, variables
    warnings.warn(
        f"The model's {config.num_labels} classes are not the {fields['num_labels']} of {images.where}: its heads are"
        " fresh.",
        stacklevel=2,
    )
    model, variables = replace_head(model, variables, fields["num_labels"], key)
    return model.clone(config=dataclasses.replace(model.config, **fields)), variables


def align_classes(images: LabeledImages, config: LevitConfig) -> LabeledImages:
    """Return the images with their targets in the order of a model's classes, which have the same names."""
    if not images.labels or images.labels == config.id2label:
        return images
    indices = [config.label2id[label] for label in images.labels]
    if images.targets.ndim == 1:
        targets = images.targets.dtype.type(indices)[images.targets]
    else:
        targets = images.targets.copy()
        targets[:, indices] = images.targets
    return dataclasses.replace(images, targets=targets, labels=config.id2label)
