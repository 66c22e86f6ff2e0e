"""The run directory, and the settings that a training run was started with.

It contains `checkpoints/` for resuming, `model/` with the best model so far, `metrics.csv`, `curves.png`,
`tensorboard/`, `run.json` with the settings, and at the end `report.json`.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from levit_flax import files
from levit_flax.datasets import LabeledImages

from .outputs import (
    _CURVES_FILE,
    _METRICS_FILE,
    _MODEL_DIRECTORY,
    _REPORT_FILE,
    _TENSORBOARD_DIRECTORY,
    _TORCH_DIRECTORY,
)
from .recipe import RecipeError

_RUN_FILE = "run.json"
_CHECKPOINT_DIRECTORY = "checkpoints"

# A run writes only these names, and overwrite=True removes only these.
_OWN_NAMES = (
    _RUN_FILE,
    _REPORT_FILE,
    _METRICS_FILE,
    _CURVES_FILE,
    _CHECKPOINT_DIRECTORY,
    _MODEL_DIRECTORY,
    _TORCH_DIRECTORY,
    _TENSORBOARD_DIRECTORY,
)
_SAMPLED_IMAGES = 16  # of a dataset, to recognize it when the run is resumed
_LISTED_DIFFERENCES = 5  # maximum number of differences in an error message


@dataclasses.dataclass(frozen=True)
class _DataFingerprint:
    """Identifies the images of a run.

    Attributes:
        training_images: number of images.
        validation_images: number of images.
        classes: number of classes; 0 for regression.
        sha256: digest of the targets, and of the names of files or of a sample of the encoded images of a dataset.
    """

    training_images: int
    validation_images: int
    classes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class _RunSettings:
    """The settings that a run was started with; to resume it, all except `skip` must be the same.

    Attributes:
        recipe: `Recipe.to_dict()`.
        model: path or Hub id of the checkpoint to start from; None for training from scratch.
        revision: revision of `model` on the Hub.
        teacher: path or Hub id of the teacher; True for a function, False without a teacher.
        data: identifies the images.
        skip: images left out when the run was started, sorted.
    """

    recipe: Mapping[str, Any]
    model: str | None
    revision: str | None
    teacher: str | bool
    data: _DataFingerprint
    skip: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "_RunSettings":
        """Return the settings that `to_dict` was called on."""
        return cls(**{**values, "data": _DataFingerprint(**values["data"]), "skip": tuple(values["skip"])})

    def provenance(self) -> dict[str, Any]:
        """Return the settings that identify the run, JSON-ready: all except `skip`."""
        values = self.to_dict()
        del values["skip"]
        return values

    def differences(self, other: "_RunSettings") -> Iterator[tuple[str, Any, Any]]:
        """Yield (dotted name, own value, other value) of each difference in the settings that identify a run."""
        own, others = (json.loads(json.dumps(settings.provenance())) for settings in (self, other))
        yield from _differences(own, others)


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def _fingerprint(train: LabeledImages, validation: LabeledImages) -> _DataFingerprint:
    """Return the fingerprint of the images of a run."""
    digest = hashlib.sha256()
    for data in (train, validation):
        listed = isinstance(data.images, list)
        sample = np.linspace(0, len(data) - 1, min(len(data), _SAMPLED_IMAGES)).astype(int)
        for index in range(len(data)) if listed else sample:
            image = data.images[index]
            if listed:
                path = Path(image)
                digest.update(os.fsencode(f"{path.parent.name}/{path.name}\n"))
            elif isinstance(image, bytes):  # decoded images may be augmented at random
                digest.update(image)
        digest.update(data.targets.tobytes())
    return _DataFingerprint(len(train), len(validation), len(train.labels), digest.hexdigest())


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Create the run directory, or raise OSError if it cannot be used.

    It must not contain other files, or a run if neither `resume` nor `overwrite` is set.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file: expected a directory, or a path that does not exist.")
    names = [entry.name for entry in output.iterdir()] if output.is_dir() else []
    # A run that was killed at its start may leave a temporary file, which does not count.
    occupied = any(not name.startswith(f".{_RUN_FILE}.") for name in names)
    if occupied and not (output / _RUN_FILE).is_file():
        raise FileExistsError(f"{output} is not empty and holds no training run. Choose another directory.")
    if occupied and not resume and not overwrite:
        raise FileExistsError(
            f"{output} already holds a training run. Resume it with resume=True, replace it with overwrite=True, or"
            " choose another directory."
        )
    files._make_directory(output)
    try:
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise files._cannot_write(output, error) from None


def _check_sources(output: Path, *sources: Any) -> None:
    """Raise FileExistsError if `overwrite=True` would remove one of the models to start from."""
    for source in sources:
        if isinstance(source, str | Path) and output in Path(source).expanduser().absolute().parents:
            raise FileExistsError(
                f"{source} is inside {output}, which overwrite=True would empty before training. Choose another"
                " directory for the new run, or move the model."
            )


def _read_run(output: Path) -> _RunSettings | None:
    """Return the settings of the run in a directory, or None if there is no run."""
    path = output / _RUN_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return _RunSettings.from_dict(json.loads(text))
    except (ValueError, TypeError, KeyError):
        keys = ", ".join(field.name for field in dataclasses.fields(_RunSettings))
        raise ValueError(
            f"{path} does not hold the settings of a training run: expected a JSON object with the keys {keys}. Start"
            " the run again with overwrite=True."
        ) from None


def _check_same(output: Path, old: _RunSettings, new: _RunSettings) -> None:
    """Raise RecipeError if the settings of a run differ from the ones it was started with."""
    differing = [f"{name} (was {before!r}, is {after!r})" for name, before, after in old.differences(new)]
    if differing:
        raise RecipeError(
            f"{output} was started with other settings: {'; '.join(differing[:_LISTED_DIFFERENCES])}. Resume with the"
            " same settings, or start again with overwrite=True."
        )


def _prepare_output(output: Path, settings: _RunSettings, resumed: bool) -> None:
    """Remove temporary files of a killed run. For a new run, also remove an older run and write the settings."""
    for entry in output.iterdir():
        temporary = entry.name.startswith(tuple(f".{name}." for name in _OWN_NAMES))
        old = not resumed and entry.name in _OWN_NAMES and entry.name != _RUN_FILE
        if temporary or old:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if not resumed:
        files._write_text(output / _RUN_FILE, json.dumps(settings.to_dict(), indent=2) + "\n")
