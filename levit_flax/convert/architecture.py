"""Choose a checkpoint's architecture, from a config or from the tensor shapes."""

import dataclasses
from typing import Any, NamedTuple

from levit_flax.configuration import LevitConfig
from levit_flax.imagenet import _imagenet_labels
from levit_flax.modeling import _MODEL_CLASSES, LevitBase

from .errors import ConversionError, _explain_malformed
from .inference import _INFERRED_FIELDS, _infer_config
from .layouts import _CheckpointLayout, _Shape, _Structure
from .sources import _Source
from .timm_files import _is_timm_config, _read_timm_config


class _Architecture(NamedTuple):
    """The architecture of a checkpoint and how it was found.

    Attributes:
        layout: the checkpoint's layout.
        model: the module, with the default dtypes.
        inferred: whether the config was inferred from the shapes.
        notes: the assumptions made, as sentences for the report.
    """

    layout: _CheckpointLayout
    model: LevitBase
    inferred: bool
    notes: tuple[str, ...]

    @property
    def structure(self) -> _Structure:
        """The structure of the module."""
        return _Structure.of(self.model.config, self.model.head_names, self.model.folded)


def _choose_architecture(
    source: _Source,
    layout: _CheckpointLayout,
    config: LevitConfig | None,
    image_size: int | tuple[int, int] | None,
) -> _Architecture:
    """Return the architecture given by `config`, the stored config.json or the shapes, in this order.

    A config is checked against the shapes. `image_size` overrides the config's.
    """
    structure = layout.structure(source.shapes)
    model_class = _model_class(structure, source.where)
    given = _read_config(source, structure) if config is None else config
    if given is not None and image_size is not None:
        given = dataclasses.replace(given, image_size=image_size)
    chosen, notes = _infer(source, layout, structure, image_size) if given is None else (given, ())
    if given is not None:
        _check_agreement(given, source, layout, structure)
    if config is None and structure.heads:
        chosen, labeled = _with_imagenet_labels(chosen)
        notes += labeled
    return _Architecture(layout, model_class(chosen, folded=structure.folded), given is None, notes)


def _model_class(structure: _Structure, where: str) -> type[LevitBase]:
    classes = {model.head_names: model for model in _MODEL_CLASSES}
    if structure.heads not in classes:
        raise ConversionError(
            f"{where} has a distillation head but no classifier head: expected both heads, the classifier head alone,"
            " or none."
        )
    return classes[structure.heads]


def _read_config(source: _Source, structure: _Structure) -> LevitConfig | None:
    """Parse the config.json next to the weights, which is transformers' or timm's."""
    if source.config is None:
        return None
    read = _read_timm_config if _is_timm_config(source.config) else LevitConfig.from_dict
    with _explain_malformed(f"The config.json of {source.where}"):
        config = read(source.config)
    _check_heads(source.config.get("architectures"), config, structure, source.where)
    return config


def _check_heads(architectures: Any, config: LevitConfig, structure: _Structure, where: str) -> None:
    """Raise ConversionError if transformers' config names a class with other heads than the checkpoint has."""
    for model_class in _MODEL_CLASSES:
        heads = _Structure.of(config, model_class.head_names).heads
        if architectures == [model_class.__name__] and structure.heads != heads:
            raise ConversionError(
                f"The config of {where} is for another model: expected the heads of {model_class.__name__} with"
                f" {config.num_labels} classes ({', '.join(heads) or 'none'}), found"
                f" {', '.join(structure.heads) or 'none'} in the tensors. Use the config and the weights of the same"
                " model, or remove the config."
            )


def _infer(
    source: _Source, layout: _CheckpointLayout, structure: _Structure, image_size: int | tuple[int, int] | None
) -> tuple[LevitConfig, tuple[str, ...]]:
    """Return the config inferred from the shapes, and a note if the image size was inferred as well."""
    names = {row.flax: row.torch for row in layout.rows(structure)}
    config = _infer_config(_inferable_shapes(source, layout, structure), names, structure, image_size)
    if image_size is not None:
        return config, ()
    note = (
        f"The checkpoint does not store its image size. {config.image_size} is the square multiple of 16 that fits"
        " the attention biases; pass source_image_size=... to set another."
    )
    return config, (note,)


def _inferable_shapes(source: _Source, layout: _CheckpointLayout, structure: _Structure) -> dict[str, _Shape]:
    """Return the shapes of a checkpoint's parameters by their path, in Flax's axis order."""
    shapes = {}
    for row in layout.rows(structure):
        if row.torch in source.shapes and row.flax.startswith("params/"):
            shape = source.shapes[row.torch]
            shapes[row.flax] = row.permutation.flax_shape(shape) or shape
    return shapes


def _check_agreement(given: LevitConfig, source: _Source, layout: _CheckpointLayout, structure: _Structure) -> None:
    """Raise ConversionError if a config and the shapes describe different models."""
    try:
        # No shape depends on the image size, and one token is always valid.
        inferred, _ = _infer(source, layout, structure, image_size=16)
    except ConversionError:
        return  # the checks of the tensors list all problems
    fields = _INFERRED_FIELDS + (("num_labels",) if structure.heads else ())
    pairs = {name: (getattr(given, name), getattr(inferred, name)) for name in fields}
    # Shapes do not determine the stride of a downsampling.
    as_strided = [op._replace(stride=g.stride) for op, g in zip(inferred.down_ops, given.down_ops, strict=False)]
    pairs["down_ops"] = (given.down_ops, tuple(as_strided))
    differing = [f"{name} is {a} in the config and {b} in the tensors" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise ConversionError(f"The config of {source.where} does not match its tensors: {'; '.join(differing)}.")


def _with_imagenet_labels(config: LevitConfig) -> tuple[LevitConfig, tuple[str, ...]]:
    """Assign ImageNet's class names if there are 1000 classes without names, and return a note about it."""
    labels = _imagenet_labels()
    numbered = tuple(f"LABEL_{i}" for i in range(config.num_labels))
    if config.num_labels != len(labels) or config.id2label != numbered:
        return config, ()
    note = "The checkpoint does not name its 1000 classes: ImageNet's names were assigned."
    return dataclasses.replace(config, id2label=labels), (note,)
