"""Datasets of the same images as a folder train the same bits, and take the same options."""

import os
import re
import signal
import warnings

import pytest

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

import jax
import numpy as np
from dataset_copies import copy_to_parquet
from training_runs import STEPS_PER_EPOCH, assert_same_run, random_config, run, tiny_recipe

import levit_flax as lf
from configs import random_variables
from levit_flax.imagenet import _imagenet_labels, _imagenet_wordnet_ids
from levit_flax.training import (
    DataError,
    LabeledImages,
    RecipeError,
    TrainingStopped,
    finetune,
    read_images,
)
from levit_flax.training.student import _align_classes, _set_classes

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def other_splits(folder, tmp_path_factory):
    pytest.importorskip("datasets")
    directory = tmp_path_factory.mktemp("splits") / "zoo"
    return copy_to_parquet({"train": folder, "extra": folder, "validation": folder}, directory)


def test_copies_of_a_folder_train_the_same_bits(whole, copy, tmp_path):
    finetune(copy, tmp_path / "run", recipe=tiny_recipe())
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_copies_resume_in_worker_processes_to_the_same_bits(whole, copy, tmp_path):
    def stop(now):
        if now.step == STEPS_PER_EPOCH + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"recipe": tiny_recipe(), "processes": 1}
    with pytest.raises(TrainingStopped):
        finetune(copy, tmp_path / "run", show=stop, **options)
    finetune(copy, tmp_path / "run", resume=True, **options)
    assert_same_run(tmp_path / "run", whole[0])


def test_skipped_rows_are_those_of_the_folder(folder, copy):
    images = sorted(folder.rglob("*.png"))
    left_out = [3, 17]
    wanted = read_images(folder, tiny_recipe(), skip=[images[i] for i in left_out])
    for names in ([f"train/{i}" for i in left_out], [f"image train/{i} of {copy}, train" for i in left_out]):
        found = read_images(copy, tiny_recipe(), skip=names)
        for part, expected in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(part.targets, expected.targets)
            for i in range(len(part)):
                np.testing.assert_array_equal(part.load(i), expected.load(i))
    with pytest.raises(DataError, match=r"^1 entries of skip=\.\.\. match no image of .* found train/30\."):
        read_images(copy, tiny_recipe(), skip=["train/30"])


def test_run_is_not_resumed_on_other_images(folder, parquet, tmp_path):
    first, *others = sorted(folder.rglob("*.png"))
    for path in (first, *others):
        (tmp_path / "data" / path.parent.name).mkdir(parents=True, exist_ok=True)
        source = others[0] if path == first else path
        (tmp_path / "data" / path.relative_to(folder)).write_bytes(source.read_bytes())
    recipe = tiny_recipe(epochs=2)
    finetune(parquet, tmp_path / "run", recipe=recipe)
    changed = copy_to_parquet({"train": tmp_path / "data"}, tmp_path / "zoo")
    with pytest.raises(RecipeError, match=r"was started with other settings: data\.sha256 \(was "):
        finetune(changed, tmp_path / "run", recipe=recipe, resume=True)


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
