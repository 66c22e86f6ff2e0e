"""Fixtures that the tests of training runs share: data, a recipe, compiled steps and a finished run."""

import pytest
import training_runs
from training_runs import tiny_recipe, write_images, write_recipe


@pytest.fixture(scope="session")
def compiled_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled(compiled_directory):
    """The directory where this process and those that the tests start keep what they compile."""
    with training_runs.training_settings(compiled_directory):
        yield compiled_directory


@pytest.fixture(scope="session")
def steps():
    """Compiled steps and newly initialized models, by what they depend on."""
    return {}, {}


@pytest.fixture(scope="module")
def shared_steps(compiled, steps):
    with training_runs.shared_steps(*steps):
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def toml(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.toml")


@pytest.fixture(scope="session")
def whole(folder, compiled_directory, steps, tmp_path_factory):
    """The directory of an uninterrupted run, and its report."""
    from levit_flax.training import finetune

    output = tmp_path_factory.mktemp("whole") / "run"
    with training_runs.training_settings(compiled_directory), training_runs.shared_steps(*steps):
        return output, finetune(folder, output, recipe=tiny_recipe())
