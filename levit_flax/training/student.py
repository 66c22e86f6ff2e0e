"""The model to train, from a checkpoint or newly initialized."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from levit_flax import loading
from levit_flax.configuration import _SINGLE_LABEL, LevitConfig
from levit_flax.datasets import LabeledImages, _match_names
from levit_flax.hub import _DEFAULTS, _HubOptions
from levit_flax.image_processing import LevitImageProcessor, _size_for_edge
from levit_flax.modeling import (
    LevitBase,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
    Variables,
)
from levit_flax.surgery import merge_heads, replace_head, resize_image
from levit_flax.variants import VARIANTS

from .recipe import Recipe, RecipeError


class _Student(NamedTuple):
    """A model ready to be trained.

    Attributes:
        model: the Flax module.
        variables: the model's variables, in float32.
        processor: the image processor.
    """

    model: LevitBase
    variables: Variables
    processor: LevitImageProcessor


def _make_student(
    source: str | Path | None, recipe: Recipe, data: LabeledImages, options: _HubOptions = _DEFAULTS
) -> _Student:
    """Return the model that a recipe trains on labeled data, from a checkpoint or newly initialized.

    If the classes of the data differ from the checkpoint's, new heads are initialized and a warning is issued.
    """
    student = _load_student(source, recipe, options) if source is not None else _new_student(recipe, data)
    model, variables = student.model, student.variables
    if recipe.image_size is not None:
        model, variables = resize_image(model, variables, recipe.image_size)
    model, variables = _set_classes(model, variables, data, jax.random.key(recipe.seed))
    changes: dict[str, Any] = {}
    if data.problem_type != (model.config.problem_type or _SINGLE_LABEL):
        changes["problem_type"] = data.problem_type
    if recipe.drop_path_rate is not None:
        changes["drop_path_rate"] = recipe.drop_path_rate
    dtype = None if recipe.compute_dtype == "float32" else jnp.dtype(recipe.compute_dtype)
    model = model.clone(config=dataclasses.replace(model.config, **changes), dtype=dtype, remat=recipe.remat)
    return _Student(model, variables, loading._resize_processor(student.processor, model.config))


def _head_class(recipe: Recipe) -> type[LevitBase]:
    """Return the class of the model that a recipe trains."""
    two = recipe.heads == "both" or recipe.distillation != "none"
    return LevitForImageClassificationWithTeacher if two else LevitForImageClassification


def _new_student(recipe: Recipe, data: LabeledImages) -> _Student:
    """Return a newly initialized model of the recipe's architecture."""
    architecture = recipe.architecture
    if architecture is None:
        raise RecipeError(
            "There is no model to train: expected a checkpoint (model=...), or a recipe with an architecture."
        )
    if isinstance(architecture, Mapping):
        try:
            config = LevitConfig(**architecture)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"architecture: {error}") from None
    elif architecture in VARIANTS:
        config = VARIANTS[architecture]
    else:
        raise RecipeError(f"architecture is {architecture!r}: expected one of {', '.join(VARIANTS)}, or a table.")
    config = dataclasses.replace(config, **_class_fields(data))
    model = _head_class(recipe)(config)
    height, width = config.image_height_width
    pixel_values = jnp.zeros((1, height, width, config.num_channels))
    variables = jax.jit(model.init)(jax.random.key(recipe.seed), pixel_values)
    if isinstance(architecture, str):
        return _Student(model, variables, loading._load_processor(None, config))
    # Resized to the crop size, because cropping small images would lose much of them.
    size = _size_for_edge(max(height, width))
    return _Student(model, variables, LevitImageProcessor(size=size, crop_size=(height, width)))


def _load_student(source: str | Path, recipe: Recipe, options: _HubOptions) -> _Student:
    """Return a checkpoint's model with the heads of the recipe."""
    model, variables, processor, _ = loading._load_model(source, options, dtype="float32")
    if model.folded:
        raise ValueError(
            f"{source} is folded and cannot be trained: expected a model with batch norms. Use the model before"
            " folding."
        )
    model_class = _head_class(recipe)
    if isinstance(model, LevitForImageClassificationWithTeacher) and model_class is LevitForImageClassification:
        if recipe.heads == "merge":
            model, variables = merge_heads(model, variables)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the recipe drops the second head on purpose
                model, variables = loading._change_heads(model, variables, model_class)
    else:
        model, variables = loading._change_heads(model, variables, model_class, jax.random.key(recipe.seed))
    return _Student(model, variables, processor)


def _class_fields(data: LabeledImages) -> dict[str, Any]:
    """Return the config fields that describe the classes of labeled data."""
    if data.labels:
        return {"num_labels": len(data.labels), "id2label": dict(enumerate(data.labels))}
    return {"num_labels": data.targets.shape[1], "id2label": None}


def _set_classes(
    model: LevitBase, variables: Variables, data: LabeledImages, key: jax.Array
) -> tuple[LevitBase, Variables]:
    """Return the model with the classes of the data; if they differ, its heads are newly initialized."""
    config = model.config
    fields = _class_fields(data)
    if data.labels:
        same = sorted(config.id2label) == sorted(data.labels)
    else:
        same = (config.num_labels, config.problem_type) == (fields["num_labels"], data.problem_type)
    if same:
        return model, variables
    warnings.warn(
        f"The model's {config.num_labels} classes are not the {fields['num_labels']} classes of {data.where}: its heads"
        " are newly initialized.",
        stacklevel=2,
    )
    model, variables = replace_head(model, variables, fields["num_labels"], key)
    return model.clone(config=dataclasses.replace(model.config, **fields)), variables


def _align_classes(data: LabeledImages, config: LevitConfig) -> LabeledImages:
    """Return labeled images with the targets in the order of a model's classes; the class names must be the same."""
    if not data.labels or data.labels == config.id2label:
        return data
    indices = _match_names(data.labels, config.id2label, f"The classes of {data.where} and of the model")
    if data.targets.ndim == 1:
        targets = data.targets.dtype.type(indices)[data.targets]
    else:
        targets = data.targets.copy()
        targets[:, indices] = data.targets
    return dataclasses.replace(data, targets=targets, labels=config.id2label)
