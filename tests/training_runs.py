"""Tiny data, a tiny recipe and tiny trainings, in this process and in others, that the tests share."""

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

CLASSES = ("ant", "bee", "cat")
ARCHITECTURE = {
    "image_size": 32,
    "hidden_sizes": [16, 24],
    "num_attention_heads": [1, 2],
    "depths": [1, 1],
    "key_dim": [8, 8],
    "mlp_ratio": [2, 2],
    "attention_ratio": [2, 2],
}
VALUES = {"architecture": ARCHITECTURE, "epochs": 2, "batch_size": 8, "warmup_epochs": 1}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A directory in which the processes of these tests, and this one, keep what they compile."""
    directory = tmp_path_factory.mktemp("compiled")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(directory), 0.0), strict=True):
        jax.config.update(name, value)
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def _standard_promotion(compiled):
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        yield


def write_pictures(directory: Path, each: int | Sequence[int] = 10, classes: Sequence[str] = CLASSES, seed: int = 0):
    """Write pictures of noise over a grey that tells their class, and return the directory."""
    generator = np.random.default_rng(seed)
    counts = [each] * len(classes) if isinstance(each, int) else each
    for shade, (name, count) in enumerate(zip(classes, counts, strict=True)):
        (directory / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 100, (36, 40, 3)) + 150 * shade // len(classes)
            Image.fromarray(pixels.astype(np.uint8)).save(directory / name / f"{i}.png")
    return directory


def tiny_recipe(**changes: Any):
    from levit_flax.training.recipe import make_recipe

    return make_recipe({**VALUES, **changes}, "The tests' recipe")


def write_recipe(path: Path, **changes: Any) -> Path:
    """Write the tiny recipe as TOML."""
    values = {**VALUES, **changes}
    tables = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if name not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{_toml(str(key))} = {_toml(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: Any) -> str:
    import json

    return json.dumps(value)  # which TOML reads too, for what these recipes hold


def final_state(output: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Return every array of a run's last checkpoint, or of that of a step, by its path."""
    import orbax.checkpoint as ocp

    step = max(checkpoint_steps(output)) if step is None else step
    directory = output / "checkpoints" / str(step) / "state"
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(directory).item_metadata.tree
    as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restored = reader.restore(directory, ocp.args.PyTreeRestore(restore_args=as_arrays))
    flat = flatten_dict(_as_dicts(restored), sep="/")
    return {path: leaf for path, leaf in flat.items() if leaf is not None}


def _as_dicts(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return {str(i): _as_dicts(entry) for i, entry in enumerate(tree)}
    return {key: _as_dicts(entry) for key, entry in tree.items()} if isinstance(tree, dict) else tree


def checkpoint_steps(output: Path) -> list[int]:
    """Return the steps of the whole checkpoints of a run."""
    directory = output / "checkpoints"
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def assert_same_run(output: Path, expected: Path) -> None:
    """Assert that two runs ended with the same bits and measured the same on the way."""
    found, wanted = final_state(output), final_state(expected)
    assert found.keys() == wanted.keys() and len(found) > 100
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    for name in ("metrics.csv", "model/flax_model.safetensors", "model/metrics.json"):
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name


def start(arguments: Sequence[Any], compiled: Path, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """Start Python; what it compiles is kept."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **environment,
        },
    )
