"""Tiny data, a tiny recipe and tiny training runs, in this process and in others, that the tests share."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from quick_compiler import compiler_environment, quick_compiler

import levit_flax as lf
from configs import random_variables

TESTS = Path(__file__).parent
PROGRAMS = TESTS / "programs"

CLASSES = ("ant", "bee", "cat")
ARCHITECTURE = {
    "image_size": 32,
    "hidden_sizes": [16, 24],
    "num_attention_heads": [1, 2],
    "depths": [0, 1],
    "key_dim": [8, 8],
    "mlp_ratio": [2, 2],
    "attention_ratio": [2, 2],
    "down_ops": [["Subsample", 8, 2, 2, 0, 2]],
}
# 27 of 30 images are for training: three steps per epoch, with three images left over. Tests use these values if they
# can, because compilation takes most of a tiny run's time.
VALUES = {
    "architecture": ARCHITECTURE,
    "epochs": 6,
    "batch_size": 8,
    "warmup_epochs": 1,
    "learning_rate": 5e-3,
    "adaptive_clip": 0.0,
    "ema_decay": 0.9,
}
STEPS_PER_EPOCH, STEPS = 3, 18

PROCESSOR = lf.LevitImageProcessor(size=28, crop_size=32)
NOTHING = {"crop_scale": (), "flip": 0.0, "color_jitter": 0.0, "drop_path_rate": 0.0}
# One step of the heads alone, on all of the 27 images, so that their order does not matter.
ONE_STEP = {
    **NOTHING,
    "epochs": 1,
    "warmup_epochs": 0,
    "batch_size": 27,
    "batch_norm": "freeze",
    "learning_rates": {"head(_dist)?/.*": 1.0, ".*": 0.0},
    "ema_decay": 0.0,
}
DISTILLED = {**ONE_STEP, "distillation_alpha": 0.3, "distillation_temperature": 2.0}


@contextlib.contextmanager
def training_settings(directory: Path):
    """Configure JAX for tiny training runs, and to keep what it compiles in a directory."""
    with quick_compiler(directory), jax.numpy_dtype_promotion("standard"):  # as optax needs it
        yield


class BlankFigure:
    """Stands in for the figure of a run's curves, which take longer to draw than a tiny training takes."""

    def savefig(self, file, format):
        file.write_bytes(b"")


@contextlib.contextmanager
def without_curves():
    from levit_flax.training import outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "draw_curves", lambda history: BlankFigure())
        yield


@contextlib.contextmanager
def shared_steps(sessions: dict[str, Any], students: dict[str, Any]):
    """Make equal trainings of this process share what is traced and compiled for them; draw no curves."""
    from levit_flax.training import loop, plan

    make_student = plan._make_student

    class Session(loop._Session):
        def __init__(self, plan, show):
            super().__init__(plan, show)
            key = f"{plan.recipe} {plan.student.model} {self.rows.steps_per_epoch}"
            self.train_step, self.evaluate_step = sessions.setdefault(key, (self.train_step, self.evaluate_step))

    def make_student_once(source, recipe, train, options):
        key = f"{source} {recipe} {train.labels}"
        if key not in students:
            students[key] = make_student(source, recipe, train, options)
        return students[key]

    with pytest.MonkeyPatch.context() as patch, without_curves():
        patch.setattr(loop, "_Session", Session)
        patch.setattr(plan, "_make_student", make_student_once)
        yield


def random_config(**changes: Any) -> lf.LevitConfig:
    values = {**ARCHITECTURE, "num_labels": 3, "id2label": CLASSES, "drop_path_rate": 0.25, **changes}
    return lf.LevitConfig(**values)


def save_model(
    directory: Path,
    model_class: str = "LevitForImageClassification",
    seed: int = 0,
    processor: lf.LevitImageProcessor = PROCESSOR,
    **changes: Any,
) -> Path:
    """Save a tiny model with random weights, and return its directory."""
    model = getattr(lf, model_class)(random_config(**changes))
    lf.save_pretrained(directory, model, random_variables(model, seed), processor)
    return directory


def write_images(directory: Path, each: int | Sequence[int] = 10, classes: Sequence[str] = CLASSES, seed: int = 0):
    """Write noisy images whose gray level depends on their class, and return the directory."""
    generator = np.random.default_rng(seed)
    counts = [each] * len(classes) if isinstance(each, int) else each
    for shade, (name, count) in enumerate(zip(classes, counts, strict=True)):
        (directory / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 100, (36, 40, 3)) + 150 * shade // len(classes)
            Image.fromarray(pixels.astype(np.uint8)).save(directory / name / f"{i}.png")
    return directory


def truncate(path: Path) -> bytes:
    """Truncate an image after its header; return its original bytes."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def tiny_recipe(**changes: Any):
    from levit_flax.training.recipe import _make_recipe

    return _make_recipe({**VALUES, **changes}, "The tests' recipe")


def write_recipe(path: Path, **changes: Any) -> Path:
    """Write the tiny recipe as TOML."""
    values = {**VALUES, **changes}
    tables = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if name not in tables]
    for name, table in tables.items():  # for what these recipes hold, JSON is TOML
        lines += [f"[{name}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def checkpoint_steps(output: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run."""
    directory = output / "checkpoints"
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def final_state(output: Path) -> dict[str, np.ndarray]:
    """Return every array of a run's last checkpoint by its path."""
    import orbax.checkpoint as ocp

    directory = output.absolute() / "checkpoints" / str(max(checkpoint_steps(output))) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(directory).item_metadata.tree
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = reader.restore(directory, ocp.args.PyTreeRestore(restore_args=as_arrays))
    flat = flatten_dict(_as_dicts(restored), sep="/")
    return {path: leaf for path, leaf in flat.items() if leaf is not None}


def _as_dicts(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return {str(i): _as_dicts(entry) for i, entry in enumerate(tree)}
    return {key: _as_dicts(entry) for key, entry in tree.items()} if isinstance(tree, dict) else tree


def assert_same_run(output: Path, expected: Path) -> None:
    """Assert that two runs have the same final bits and the same metrics."""
    found, wanted = final_state(output), final_state(expected)
    assert found.keys() == wanted.keys() and len(found) > 100
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    for name in ("metrics.csv", "model/flax_model.safetensors", "model/metrics.json"):
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name


def start(
    arguments: Sequence[Any], compiled: Path, devices: int | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start Python, with a number of virtual devices if one is given; programs find what the tests share."""
    settings = compiler_environment(compiled)
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    if devices is not None:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings, **environment},
    )


def run(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """Run `levit-flax` in this process; return its exit status and what it printed to stdout and stderr."""
    from levit_flax.cli import main

    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def tensorboard_scalars(output: Path) -> dict[tuple[int, str], float]:
    """Return the value that TensorBoard shows for each (step, name); a restart hides later steps of earlier files."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for path in sorted((output / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                shown[event.step, value.tag] = value.simple_value
    return shown
