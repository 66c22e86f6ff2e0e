"""Datasets of the same images as a folder train the same bits, and take the same options."""

import re
import warnings

import pytest

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

import jax
import numpy as np
from dataset_copies import Pairs, copy_to_parquet, copy_to_records
from training_runs import assert_same_run, random_config, run, tiny_recipe

import levit_flax as lf
from configs import random_variables
from levit_flax.imagenet import _imagenet_labels, _imagenet_wordnet_ids
from levit_flax.training import DataError, LabeledImages, finetune, read_images
from levit_flax.training.student import _align_classes, _set_classes

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def parquet(folder, tmp_path_factory):
    pytest.importorskip("datasets")
    return copy_to_parquet({"train": folder}, tmp_path_factory.mktemp("parquet") / "zoo")


@pytest.fixture(scope="module")
def records(folder, tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    directory = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(directory))
        yield copy_to_records({"train": folder}, directory)


@pytest.fixture(scope="module")
def other_splits(folder, tmp_path_factory):
    pytest.importorskip("datasets")
    directory = tmp_path_factory.mktemp("splits") / "zoo"
    return copy_to_parquet({"train": folder, "extra": folder, "validation": folder}, directory)


@pytest.fixture(scope="module")
def pairs(folder):
    return Pairs(folder)


@pytest.fixture(params=["parquet", "records", "pairs"])
def copy(request):
    return request.getfixturevalue(request.param)


def test_copies_of_a_folder_train_the_same_bits(whole, copy, tmp_path):
    finetune(copy, tmp_path / "run", recipe=tiny_recipe())
    assert_same_run(tmp_path / "run", whole[0])


def test_split_selects_the_images_to_train_on(other_splits):
    sizes = {}
    for split in (None, "extra", "train[:50%]+extra", "train+validation", "all"):
        train, validation = read_images(other_splits, tiny_recipe(), split=split)
        sizes[split] = len(train), len(validation)
        assert train.where.startswith(f"{other_splits}, {split or 'train'}")
    assert sizes == {
        None: (30, 30),
        "extra": (30, 30),
        "train[:50%]+extra": (45, 30),
        "train+validation": (54, 6),  # the split that would validate is among the images to train on
        "all": (81, 9),
    }
    train, _ = read_images(other_splits, tiny_recipe(), split="train[10:12]", skip=["train[10:12]/1", "validation/3"])
    assert len(train) == 1 and train.key(0) == "train[10:12]/0"


def test_split_of_a_folder_is_a_folder_in_it(folder, tmp_path):
    for name in ("first", "val"):
        (tmp_path / name).symlink_to(folder)
    train, validation = read_images(tmp_path, tiny_recipe(), split="first")
    assert (train.where, validation.where) == (str(tmp_path / "first"), str(tmp_path / "val"))
    assert len(read_images(tmp_path, tiny_recipe(), split="val")[1]) == 3  # a tenth of the same folder
    with pytest.raises(DataError, match=r"has the folders first, val: expected one named second\. Change split="):
        read_images(tmp_path, tiny_recipe(), split="second")


def test_classes_named_by_wordnet_ids_get_the_names_of_imagenet(folder, tmp_path):
    ids = {"n01440764": "tench, Tinca tinca", "n02012849": "n02012849", "n02123045": "tabby, tabby cat"}
    for name, source in zip(ids, sorted(folder.iterdir()), strict=True):
        (tmp_path / name).symlink_to(source)
    assert read_images(tmp_path, tiny_recipe())[0].labels == tuple(ids.values())  # crane is the name of two classes
    (tmp_path / "dog").symlink_to(source)
    assert read_images(tmp_path, tiny_recipe())[0].labels == ("dog", *ids)


def test_all_classes_of_imagenet_keep_the_heads_of_a_checkpoint(tmp_path):
    ids, names = _imagenet_wordnet_ids(), _imagenet_labels()
    images = LabeledImages([np.zeros((8, 8, 3), np.uint8)] * 2000, np.arange(2000, dtype=np.int32) % 1000, ids)
    train, validation = read_images({"train": images, "val": images}, tiny_recipe())
    assert train.labels == validation.labels == names
    model = lf.LevitForImageClassification(random_config(num_labels=1000, id2label=names))
    variables = random_variables(model)
    with warnings.catch_warnings(action="error"):  # a warning would announce new heads
        kept, same = _set_classes(model, variables, train, jax.random.key(0))
    assert kept is model and same is variables
    assert _align_classes(train, model.config) is train


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("gs://bucket/zoo", [], r"The scheme of gs://bucket/zoo is not known: .*, found gs://\.$"),
        ("hfds/", [], r"hfds/ names no dataset: expected hfds/NAME\.$"),
        (
            "hfds/ZOO",
            ["--split", "nowhere"],
            r"hfds/ZOO has the splits train: expected one named nowhere\. .* with --split$",
        ),
        ("hfds/ZOO", ["--split", "train[:x]"], r"The Hugging Face dataset ZOO cannot be loaded: .*train\[:x\].*"),
        ("hfds/ZOO:small", [], r"The Hugging Face dataset ZOO:small cannot be loaded: .*small.*"),
        ("hfds/ZOO", ["--label-column", "kind"], r"The column kind cannot be used: .* Change --label-column$"),
        ("FOLDER", ["--data-revision", "main"], r"FOLDER has no revision to choose: expected no --data-revision$"),
        ("FOLDER", ["--label-column", "label"], r"FOLDER has no label column to choose: expected no --label-column$"),
        ("hfds/FOLDER/nowhere", [], r"There is no Hugging Face dataset FOLDER/nowhere, or it cannot be loaded: .*"),
    ],
)
def test_wrong_sources_are_one_sentence_before_the_first_step(
    folder, parquet, toml, tmp_path, capsys, source, options, message
):
    names = {"ZOO": parquet.removeprefix("hfds/"), "FOLDER": str(folder)}
    for name, path in names.items():
        source = source.replace(name, path)
    status, out, err = run(capsys, "finetune", source, "--recipe", toml, "--output", tmp_path / "run", *options)
    for name, path in names.items():
        err = err.replace(path, name)
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert status in (1, 2) and out == "" and len(lines) == 1, err
    assert re.search(f"^error: {message}", lines[0]), lines[0]
    assert not list((tmp_path / "run").glob("*"))
