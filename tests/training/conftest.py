"""Fixtures that the tests of training runs share: data, a recipe, compiled steps and a finished run."""

import pickle

import jax
import pytest
import training_runs
from dataset_copies import Pairs, copy_to_parquet, copy_to_records
from filelock import FileLock
from training_runs import save_model, tiny_recipe, write_images, write_recipe


def made_once(path, make):
    """Return the result of `make`; the first worker that needs it calls `make`, the others read its result."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
        return pickle.loads(path.read_bytes())


@pytest.fixture(scope="module")
def compiled(compiled_directory):
    """The directory where this process and those that the tests start keep what they compile."""
    with training_runs.training_settings(compiled_directory), training_runs.without_curves():
        yield compiled_directory


@pytest.fixture(scope="module")
def standard_promotion():
    """The dtype promotion that optax needs."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def steps():
    """Compiled steps and newly initialized models, by what they depend on."""
    return {}, {}


@pytest.fixture(scope="module")
def shared_steps(compiled, steps):
    with training_runs.shared_steps(*steps):
        yield


@pytest.fixture(scope="session")
def folder(shared):
    return made_once(shared / "data.pickle", lambda: write_images(shared / "data"))


@pytest.fixture(scope="session")
def toml(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.toml")


@pytest.fixture(scope="session")
def whole(folder, compiled_directory, steps, shared):
    """The directory of an uninterrupted run, and its report."""
    from levit_flax.training import finetune

    output = shared / "whole"
    with training_runs.training_settings(compiled_directory), training_runs.shared_steps(*steps):
        report = made_once(shared / "whole.pickle", lambda: finetune(folder, output, recipe=tiny_recipe()))
    return output, report


@pytest.fixture(scope="session")
def one_head(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("one") / "model")


@pytest.fixture(scope="session")
def two_heads(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("two") / "model", "LevitForImageClassificationWithTeacher")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A model with the classes in another order and another normalization of colors."""
    from levit_flax import LevitImageProcessor

    own = LevitImageProcessor(size=28, crop_size=32, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.25])
    directory = tmp_path_factory.mktemp("teacher") / "model"
    return save_model(directory, seed=1, processor=own, id2label=("cat", "ant", "bee"))


@pytest.fixture(scope="session")
def stored(teacher, folder, compiled_directory, tmp_path_factory):
    """The teacher's logits for all images, in another order."""
    from levit_flax import ImageClassifier
    from levit_flax.training import store_logits

    path = tmp_path_factory.mktemp("stored") / "teacher.npz"
    with training_runs.training_settings(compiled_directory):
        images = sorted(folder.rglob("*.png"), reverse=True)
        store_logits(path, ImageClassifier.from_pretrained(teacher), folder, images)
    return path


@pytest.fixture(scope="session")
def parquet(folder, tmp_path_factory):
    pytest.importorskip("datasets")
    return copy_to_parquet({"train": folder}, tmp_path_factory.mktemp("parquet") / "zoo")


@pytest.fixture(scope="session")
def records(folder, tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    directory = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(directory))
        yield copy_to_records({"train": folder}, directory)


@pytest.fixture(scope="session")
def pairs(folder):
    return Pairs(folder)


@pytest.fixture(params=["parquet", "records", "pairs"])
def copy(request):
    return request.getfixturevalue(request.param)
