"""Plan a training run, and check everything before the first step."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax

from levit_flax.data_sources import _root_of
from levit_flax.datasets import LabeledImages, _DataOptions
from levit_flax.hub import _HubOptions
from levit_flax.visualize import _new_figure

from .data import _check_images, _find_images, _leave_out, _skip_keys
from .hosts import _check_hosts_agree, _run_on_hosts
from .optimizer import _match_patterns
from .recipe import Recipe, RecipeError, read_recipe
from .run_directory import _check_output, _check_same, _check_sources, _fingerprint, _read_run, _RunSettings
from .student import _align_classes, _make_student, _Student
from .teacher import _check_teacher, _make_teacher, _TeacherSource


@dataclasses.dataclass(frozen=True)
class _TrainingPlan:
    """A training run that has passed all checks.

    Attributes:
        output: absolute path of the run directory.
        recipe: how to train.
        settings: recorded in the run directory and compared when the run is resumed.
        student: the model to train.
        teacher: the source of the teacher's logits.
        train: the images to train on, with targets in the order of the student's classes.
        validation: the images to validate on, with targets in the same order.
        threads: threads that decode and augment images, in each process.
        processes: worker processes that decode and augment images; 0 decodes in this process.
        export_torch: PyTorch layout in which to write the best model as well, or None.
        resumed: whether the run directory already contains this run.
    """

    output: Path
    recipe: Recipe
    settings: _RunSettings
    student: _Student
    teacher: _TeacherSource
    train: LabeledImages
    validation: LabeledImages
    threads: int
    processes: int
    export_torch: str | None
    resumed: bool


def _make_plan(
    source: Any,
    output: str | Path,
    *,
    model: str | Path | None,
    recipe: Recipe | str | Path,
    teacher: str | Path | Callable[[jax.Array], jax.Array] | None,
    resume: bool,
    overwrite: bool,
    skip: Collection[Any],
    check_data: bool,
    export_torch: str | None,
    threads: int,
    processes: int,
    subset: _DataOptions,
    options: _HubOptions,
) -> _TrainingPlan:
    """Check the arguments of `finetune` on all hosts, load the models and list the images.

    Creates the run directory but writes nothing to it.
    """
    output = Path(output).expanduser().absolute()
    if threads < 1 or processes < 0:
        raise ValueError(
            f"threads must be at least 1 and processes at least 0, found threads={threads} and processes={processes}."
        )
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    skipped = _skip_keys(skip, source)
    _new_figure(1, 1)  # raises now, not after the first epoch, if Matplotlib is missing
    _run_on_hosts(lambda: _check_output(output, resume, overwrite), only_first=True)

    def find() -> tuple[_RunSettings | None, LabeledImages, LabeledImages]:
        if overwrite:
            _check_sources(output, model, teacher)
        previous = _read_run(output) if resume else None
        return previous, *_find_images(source, recipe, frozenset(previous.skip) if previous else skipped, subset)

    previous, train, validation = _run_on_hosts(find)
    settings = _RunSettings(
        recipe=recipe.to_dict(),
        model=str(model) if model is not None else None,
        revision=options.revision,
        teacher=str(teacher) if isinstance(teacher, str | Path) else bool(teacher),
        data=_fingerprint(train, validation),
        skip=tuple(sorted(skipped)),
    )
    _check_hosts_agree([settings.to_dict(), previous and previous.to_dict()])

    def load() -> tuple[_Student, _TeacherSource, LabeledImages, LabeledImages]:
        if previous:
            _check_same(output, previous, settings)
        _check_batch(recipe, train)
        _check_teacher(teacher, recipe, train)
        root = _root_of(source)
        parts = _leave_out(train, validation, root, skipped, previous.skip) if previous else (train, validation)
        for part in parts:
            _check_images(part, decode=check_data)
        student = _load_student(model, recipe, parts[0], export_torch, options)
        config, teacher_options = student.model.config, dataclasses.replace(options, revision=None)
        aligned = (_align_classes(parts[0], config), _align_classes(parts[1], config))
        return (
            student,
            _make_teacher(teacher, recipe, config, student.processor, aligned[0], root, teacher_options),
            *aligned,
        )

    loaded = _run_on_hosts(load)
    return _TrainingPlan(output, recipe, settings, *loaded, threads, processes, export_torch, resumed=bool(previous))


def _check_batch(recipe: Recipe, data: LabeledImages) -> None:
    """Raise RecipeError unless the images fill a batch that the devices can share equally."""
    part, devices, count = recipe.batch_size // recipe.accumulation, jax.device_count(), len(data)
    if recipe.batch_size > count:
        raise RecipeError(
            f"batch_size is {recipe.batch_size}, but {data.where} has {count} images: expected {count} or less."
        )
    if part < 2 and recipe.batch_norm != "freeze":
        raise RecipeError(
            "The batch norm of the head cannot be trained on batches of one image: expected batch_size / accumulation"
            ' of at least 2, or batch_norm = "freeze".'
        )
    if part % devices:
        raise RecipeError(
            f"batch_size / accumulation is {part}: expected a multiple of the number of devices, {devices}."
        )


def _load_student(
    model: str | Path | None, recipe: Recipe, train: LabeledImages, export_torch: str | None, options: _HubOptions
) -> _Student:
    """Load the model to train, and check the recipe and the PyTorch layout against it."""
    student = _make_student(model, recipe, train, options)
    _match_patterns(recipe.learning_rates, student.variables["params"], "learning_rates")
    if export_torch:
        # Imported here because only export_torch needs the converter.
        from levit_flax.convert.writing import _check_layout, _check_transformers_size

        _check_layout(student.model, export_torch)
        if export_torch == "hf":
            _check_transformers_size(student.model.config)
    return student
