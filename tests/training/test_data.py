"""The data of a training, the models and teachers that it begins with, and what is said where something is wrong.

Images are known by their color. The trainings change the heads alone, since most of a tiny training's time is the
compiler's.
"""

import csv
import json
import os
import re
import shutil
import struct
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

import training_runs
from training_runs import ARCHITECTURE, CLASSES, tiny_recipe, truncate, write_images, write_recipe

import levit_flax as lf
from configs import random_variables
from levit_flax.cli import main
from levit_flax.training import DataError, LabeledImages, RecipeError, finetune, outputs, store_logits
from levit_flax.training.data import (
    Shard,
    TrainingRows,
    evaluation_batches,
    find_images,
    read_skip_list,
    training_batches,
)
from levit_flax.training.student import align_classes, make_student
from levit_flax.training.teacher import make_teacher

compiled, standard_promotion = training_runs.compiled, training_runs.standard_promotion

ONE_HEAD, TWO_HEADS = lf.LevitForImageClassification, lf.LevitForImageClassificationWithTeacher
CONFIG = lf.LevitConfig(**ARCHITECTURE, num_labels=3, id2label=CLASSES, drop_path_rate=0.25)
PROCESSOR = lf.LevitImageProcessor(size=28, crop_size=32)
ROUNDING = 1e-5  # float32, through a small model
NOTHING = {"crop_scale": (), "flip": 0.0, "color_jitter": 0.0, "drop_path_rate": 0.0}
# One step of the heads, on all of the 27 images, so that the order of these is of no consequence.
QUICK = {
    **NOTHING,
    "epochs": 1,
    "warmup_epochs": 0,
    "batch_size": 27,
    "batch_norm": "freeze",
    "learning_rates": {"head(_dist)?/.*": 1.0, ".*": 0.0},
    "ema_decay": 0.0,
}
DISTILLED = {**QUICK, "distillation_alpha": 0.3, "distillation_temperature": 2.0}


@pytest.fixture(scope="module", autouse=True)
def _no_curves():
    class Figure:
        def savefig(self, file, format):
            file.write_bytes(b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "draw_curves", lambda history: Figure())
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def save(directory, model_class=ONE_HEAD, seed=0, processor=PROCESSOR, **changes):
    values = {**ARCHITECTURE, "num_labels": 3, "id2label": CLASSES, "drop_path_rate": 0.25, **changes}
    model = model_class(lf.LevitConfig(**values))
    lf.save_pretrained(directory, model, random_variables(model, seed), processor)
    return directory


@pytest.fixture(scope="module")
def one_head(tmp_path_factory):
    return save(tmp_path_factory.mktemp("one") / "model")


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    return save(tmp_path_factory.mktemp("two") / "model", TWO_HEADS)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model that counts its classes in another order and sees colors on another scale."""
    own = lf.LevitImageProcessor(size=28, crop_size=32, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.25])
    return save(tmp_path_factory.mktemp("teacher") / "model", seed=1, processor=own, id2label=("cat", "ant", "bee"))


@pytest.fixture(scope="module")
def stored(teacher, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "teacher.npz"
    store_logits(path, lf.ImageClassifier.from_pretrained(teacher), folder, sorted(folder.rglob("*.png"), reverse=True))
    return path


def apply(student, pixel_values):
    return jax.device_get(jax.jit(student.model.apply)(student.variables, pixel_values))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# Which images there are


def touch(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


def listed(images, root):
    """Return (path, class) of every image, in order."""
    names = [path.relative_to(root).as_posix() for path in images.images]
    return [(name, images.labels[target]) for name, target in zip(names, images.targets, strict=True)]


def test_images_are_found_by_their_endings_at_any_depth(tmp_path):
    touch(
        tmp_path, "train/fly/b.png", "train/fly/a.JPG", "train/fly/c.txt", "train/fly/png", "train/fly/deep/er/d.webp"
    )
    touch(tmp_path, "train/ant/2.png", "train/ant/10.jpeg", "train/Bee/1.gif", "train/.cache/1.png", "train/1.png")
    touch(tmp_path, "train/ant/._2.png", "train/ant/.checkpoints/2.png")
    touch(tmp_path, "val/fly/1.png", "val/ant/1.png", "val/Bee/1.png", "elsewhere/yak/1.png")
    (tmp_path / "train" / "ant" / "folder.png").mkdir()
    train, validation = find_images(tmp_path, tiny_recipe(), ())
    assert train.labels == validation.labels == ("Bee", "ant", "fly")
    assert listed(train, tmp_path / "train") == [
        ("Bee/1.gif", "Bee"),
        ("ant/10.jpeg", "ant"),
        ("ant/2.png", "ant"),
        ("fly/a.JPG", "fly"),
        ("fly/b.png", "fly"),
        ("fly/deep/er/d.webp", "fly"),
    ]
    assert [name for name, _ in listed(validation, tmp_path / "val")] == ["Bee/1.png", "ant/1.png", "fly/1.png"]


def test_the_part_for_validation_has_four_names(tmp_path):
    names = [f"{name}/{i}.png" for name in CLASSES for i in range(3)]
    touch(tmp_path, *(f"train/{name}" for name in names))
    for part in ("test", "valid", "val", "validation"):  # each before the ones that are there already
        touch(tmp_path, f"{part}/ant/{part}.png", f"{part}/bee/1.png", f"{part}/cat/1.png")
        train, validation = find_images(tmp_path, tiny_recipe(), ())
        assert [name for name, _ in listed(train, tmp_path / "train")] == names
        assert listed(validation, tmp_path)[0] == (f"{part}/ant/{part}.png", "ant") and len(validation) == 3
    (tmp_path / "validation" / "dog").mkdir()
    touch(tmp_path, "validation/dog/1.png")
    with pytest.raises(DataError, match=r"train has 3 classes and .*validation has 4: .* but only one has dog"):
        find_images(tmp_path, tiny_recipe(), ())


def test_a_train_folder_alone_is_divided(tmp_path):
    touch(tmp_path, *(f"train/{name}/{i}.png" for name in CLASSES for i in range(4)), "other/1.png")
    train, validation = find_images(tmp_path, tiny_recipe(), ())
    assert (len(train), len(validation), train.labels) == (9, 3, CLASSES)


def test_a_share_of_each_class_is_held_back(tmp_path):
    counts = {"ant": 20, "bee": 11, "cat": 2}
    touch(tmp_path, *(f"{name}/{i}.png" for name, count in counts.items() for i in range(count)))
    chosen = []
    for seed in (3, 3, 4):
        train, validation = find_images(tmp_path, tiny_recipe(validation_share=0.25, seed=seed), ())
        rest, back = listed(train, tmp_path), listed(validation, tmp_path)
        assert sorted(rest + back) == sorted((f"{c}/{i}.png", c) for c, count in counts.items() for i in range(count))
        assert [[label for _, label in back].count(name) for name in CLASSES] == [5, 3, 1]
        chosen.append((rest, back))
    assert chosen[0] == chosen[1] != chosen[2]
    assert [int(name.split("/")[1][:-4]) for name, _ in chosen[0][1][:5]] != list(range(5))  # at random
    train, validation = find_images(tmp_path, tiny_recipe(validation_share=0.9), ())
    assert train.targets.tolist() == [0, 0, 1, 2]  # one of each at least, on either side


def test_a_skip_list(tmp_path):
    names = [f"{part}/{name}/{i} x.png" for part in ("train", "val") for name in CLASSES for i in range(3)]
    touch(tmp_path, *names)
    path = tmp_path / "skip.txt"
    path.write_bytes(b"\xef\xbb\xbftrain/ant/1 x.png\n\n  \t\r\nval/cat/0 x.png \r\nnowhere/1.png\ntrain/bee\n1 x.png")
    skip = read_skip_list(path)
    assert skip == {"train/ant/1 x.png", "val/cat/0 x.png", "nowhere/1.png", "train/bee", "1 x.png"}
    found = [name for part in find_images(tmp_path, tiny_recipe(), skip) for name, _ in listed(part, tmp_path)]
    assert found == [name for name in names if name not in ("train/ant/1 x.png", "val/cat/0 x.png")]
    everything = {name for name in names if name.startswith("train/bee")}
    with pytest.raises(
        DataError, match=r"train/bee has no images: expected at least one per class\. Add images, or remove the folder"
    ):
        find_images(tmp_path, tiny_recipe(), everything)


# Which rows a step sees


UNTOUCHED = lf.LevitImageProcessor(do_resize=False, do_center_crop=False)


def numbered(count):
    """Return images whose red tells their number, as their class does."""
    images = [Image.new("RGB", (6, 5), (i, 0, 0)) for i in range(count)]
    return LabeledImages(images, np.arange(count, dtype=np.int32), tuple(map(str, range(count))), "the data")


def numbers(rows):
    """Return the number of the image in every row, [steps B]."""
    batches = list(training_batches(rows, 2))
    found = np.array([batch["pixels"][..., 0, 0, 0].ravel() for batch in batches])
    np.testing.assert_array_equal(found, [batch["targets"].ravel() for batch in batches])
    return found


@pytest.mark.parametrize("count", [24, 29])
def test_every_image_once_an_epoch_in_another_order(count):
    def orders(seed):
        found = numbers(TrainingRows(numbered(count), tiny_recipe(**NOTHING, epochs=5, seed=seed), UNTOUCHED))
        assert found.shape == (5 * 3, 8)
        return found.reshape(5, 24).tolist()

    epochs = orders(0)
    for order in epochs:
        assert len(set(order)) == 24  # what does not fill a batch is left out
    assert {number for order in epochs for number in order} == set(range(count))
    assert len(set(map(tuple, epochs))) == 5
    assert orders(0) == epochs
    assert not set(map(tuple, epochs)) & set(map(tuple, orders(1)))


def test_repeated_augmentation_is_the_references(monkeypatch):
    """Timm's sampler, given our order of the images."""
    sampler = pytest.importorskip("timm.data.distributed_sampler")
    torch = pytest.importorskip("torch")
    changes = {**NOTHING, "epochs": 2}
    orders = numbers(TrainingRows(numbered(24), tiny_recipe(**changes), UNTOUCHED)).reshape(2, 24)
    found = numbers(TrainingRows(numbered(24), tiny_recipe(**changes, repeats=3), UNTOUCHED)).reshape(2, 3, 8)
    for order, steps in zip(orders, found, strict=True):
        monkeypatch.setattr(torch, "randperm", lambda count, generator, order=order: torch.from_numpy(order))
        for replicas in (1, 2, 4):
            each = 8 // replicas
            ranks = [
                list(sampler.RepeatAugSampler(range(24), replicas, rank, num_repeats=3, selected_round=0))
                for rank in range(replicas)
            ]
            for i, step in enumerate(steps):
                wanted = [number for rank in ranks for number in rank[i * each : (i + 1) * each]]
                assert sorted(step) == sorted(wanted)


def noise(count):
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (12, 14, 3), np.uint8)) for _ in range(count)]
    return LabeledImages(images, np.arange(count, dtype=np.int32), tuple(map(str, range(count))), "the data")


SMALL_CROPS = lf.LevitImageProcessor(size=7, crop_size=8)


def test_every_row_of_a_training_is_augmented_anew():
    """Of images that are all the same, so that only the augmentation can tell the rows apart."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    images = LabeledImages([image] * 16, np.zeros(16, np.int32), ("one", "two"), "the data")
    for repeats in (1, 4):
        rows = TrainingRows(images, tiny_recipe(epochs=4, repeats=repeats), SMALL_CROPS)
        seen = [pixels.tobytes() for batch in training_batches(rows, 2) for pixels in batch["pixels"][0]]
        assert len(set(seen)) == len(seen) == 64


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_together_read_what_one_reads(hosts, accumulation):
    recipe = tiny_recipe(epochs=3, repeats=3, accumulation=accumulation)
    logits = np.random.default_rng(1).standard_normal((27, 3)).astype(np.float32)

    def batches(shard, first=0):
        return list(training_batches(TrainingRows(noise(27), recipe, SMALL_CROPS, logits, shard), 2, first=first))

    whole = batches(Shard())
    parts = [batches(Shard(index, hosts)) for index in range(hosts)]
    assert len(whole) == len(parts[0]) == 9 and whole[0]["pixels"].shape == (accumulation, 8 // accumulation, 8, 8, 3)
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            joined = np.concatenate([part[step][name] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, array, err_msg=f"{name}, step {step}")
        np.testing.assert_array_equal(batch["teacher_logits"], logits[batch["targets"]])
    for begun, again in zip(parts[1][4:], batches(Shard(1, hosts), first=4), strict=True):
        np.testing.assert_array_equal(begun["pixels"], again["pixels"])


@pytest.mark.parametrize("count", [11, 8, 3])
def test_evaluation_weighs_each_image_once(count):
    images = numbered(count)
    whole = list(evaluation_batches(images, UNTOUCHED, 4))
    weights = np.concatenate([batch["weights"].ravel() for batch in whole])
    found = np.concatenate([batch["pixels"][..., 0, 0, 0].ravel() for batch in whole])
    assert {batch["pixels"].shape for batch in whole} == {(1, 4, 5, 6, 3)}
    assert set(weights) <= {0, 1} and found[weights > 0].tolist() == list(range(count))
    np.testing.assert_array_equal(np.concatenate([batch["targets"].ravel() for batch in whole]), found)
    parts = [list(evaluation_batches(images, UNTOUCHED, 4, Shard(index, 2))) for index in range(2)]
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts], axis=1), array)


# The model that a training begins with


def student_of(source, images, **changes):
    return make_student(source, tiny_recipe(**changes), images)


def same_but_heads(variables, source):
    _, before = lf.from_pretrained(source)
    before, after = (flatten_dict(tree, sep="/") for tree in (before, variables))
    paths = [path for path in before if not path.split("/")[1].startswith("head")]
    assert len(paths) > 20
    return all(np.array_equal(before[path], after[path]) for path in paths)


def test_two_heads_become_what_the_recipe_says(two_heads, folder):
    train, _ = find_images(folder, tiny_recipe(), ())
    pixel_values = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
    model, variables = lf.from_pretrained(two_heads)
    given = jax.device_get(jax.jit(model.apply)(variables, pixel_values))
    wanted = {
        "merge": (given.cls_logits + given.distillation_logits) / 2,
        "first": given.cls_logits,
        "both": (given.cls_logits + given.distillation_logits) / 2,
    }
    assert np.abs(given.cls_logits - given.distillation_logits).max() > 0.1
    for heads, logits in wanted.items():
        student = student_of(two_heads, train, heads=heads)
        assert type(student.model) is (TWO_HEADS if heads == "both" else ONE_HEAD)
        out = apply(student, pixel_values)
        np.testing.assert_allclose(out.logits, logits, rtol=ROUNDING, atol=ROUNDING, err_msg=heads)
        assert same_but_heads(student.variables, two_heads)
    np.testing.assert_allclose(out.distillation_logits, given.distillation_logits, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("changes", [{"heads": "both"}, {"distillation": "hard"}])
def test_a_head_that_is_lacking_is_announced(one_head, folder, changes):
    train, _ = find_images(folder, tiny_recipe(), ())
    with pytest.warns(UserWarning, match="The checkpoint has no head_dist: these heads are newly initialized"):
        student = student_of(one_head, train, **changes)
    _, before = lf.from_pretrained(one_head)
    after = student.variables["params"]
    np.testing.assert_array_equal(after["head"]["linear"]["kernel"], before["params"]["head"]["linear"]["kernel"])
    assert after["head_dist"]["linear"]["kernel"].shape == (24, 3) and same_but_heads(student.variables, one_head)


@pytest.mark.parametrize("names", [("ant", "bee"), ("ant", "bee", "dog"), ("ant", "bee", "cat", "dog")])
def test_other_classes_are_announced(two_heads, tmp_path, names):
    train, _ = find_images(write_images(tmp_path / "data", 2, names), tiny_recipe(), ())
    said = rf"3 classes are not the {len(names)} classes of .*data, for training: its heads are newly initialized\.$"
    with pytest.warns(UserWarning, match=said) as caught:
        student = student_of(two_heads, train, heads="both")
    assert len(caught) == 1
    config = student.model.config
    assert (config.num_labels, config.id2label, config.label2id["bee"]) == (len(names), names, 1)
    _, before = lf.from_pretrained(two_heads)
    for head in ("head", "head_dist"):
        leaves = student.variables["params"][head]["linear"]
        assert leaves["kernel"].shape == (24, len(names)) and leaves["bias"].shape == (len(names),)
        assert not np.isin(leaves["kernel"], before["params"][head]["linear"]["kernel"]).any()
    assert same_but_heads(student.variables, two_heads)


def test_the_same_classes_in_another_order_go_on(teacher, folder):
    """In the order of the model: its heads stay, the images' targets change."""
    train, _ = find_images(folder, tiny_recipe(), ())
    student = student_of(teacher, train)  # without a warning
    assert student.model.config.id2label == ("cat", "ant", "bee")
    _, before = lf.from_pretrained(teacher)
    head = student.variables["params"]["head"]["linear"]
    np.testing.assert_array_equal(head["kernel"], before["params"]["head"]["linear"]["kernel"])
    aligned = align_classes(train, student.model.config)
    assert [aligned.labels[target] for target in aligned.targets] == [path.parent.name for path in train.images]
    assert aligned.labels == ("cat", "ant", "bee") and aligned.targets.dtype == np.int32
    rows = np.array([[1, 0, 0], [0, 1, 1]], np.float32)  # ant; bee and cat
    several = align_classes(LabeledImages([], rows, CLASSES, "", "multi_label_classification"), student.model.config)
    assert several.targets.tolist() == [[0, 1, 0], [1, 0, 1]]


def test_the_image_size_of_a_recipe(one_head, folder):
    train, _ = find_images(folder, tiny_recipe(), ())
    recipe = tiny_recipe(image_size=64)
    student = make_student(one_head, recipe, train)
    assert student.model.config.image_height_width == (64, 64)
    assert student.processor.size == {"shortest_edge": 56} and student.processor.crop_size == {
        "height": 64,
        "width": 64,
    }
    biases = [leaf for path, leaf in flatten_dict(student.variables, sep="/").items() if path.endswith("_biases")]
    assert sorted(leaf.shape for leaf in biases) == [(4, 2), (16, 2)]  # grids of 4 x 4 and 2 x 2 tokens
    assert next(training_batches(TrainingRows(train, recipe, student.processor), 1))["pixels"].shape[2:4] == (64, 64)
    assert student_of(one_head, train).model.config.image_height_width == (32, 32)


@pytest.mark.parametrize(("given", "wanted"), [(None, 0.25), (0.0, 0.0), (0.5, 0.5)])
def test_stochastic_depth_is_the_recipes_or_else_the_checkpoints(one_head, folder, given, wanted):
    train, _ = find_images(folder, tiny_recipe(), ())
    student = student_of(one_head, train, drop_path_rate=given)
    assert student.model.config.drop_path_rate == wanted and student.model.config.id2label == CLASSES


# Other problems than one class


def answers(problem_type, count):
    generator = np.random.default_rng(count)
    if problem_type == "regression":
        return generator.uniform(0, 3, (count, 2)).astype(np.float32)
    return generator.integers(0, 2, (count, 4)).astype(np.float32)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_other_problems_from_the_dataset_to_the_model(two_heads, tmp_path, monkeypatch, problem_type):
    datasets = pytest.importorskip("datasets")
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (36, 40, 3), np.uint8)) for _ in range(34)]
    names = ["red", "big", "old", "new"]

    def part(targets, images):
        if problem_type == "regression":
            kind, values = datasets.List(datasets.Value("float32"), length=2), targets.tolist()
        else:
            kind = datasets.List(datasets.ClassLabel(names=names))
            values = [np.flatnonzero(row).tolist() for row in targets]
        features = datasets.Features({"image": datasets.Image(), "answer": kind})
        return datasets.Dataset.from_dict({"image": images, "answer": values}, features=features)

    targets = answers(problem_type, 34)
    whole = {"train": part(targets[:27], images[:27]), "test": part(targets[27:], images[27:])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"zoo/answers": datasets.DatasetDict(whole)}[name])
    recipe = tiny_recipe(**{**QUICK, "epochs": 3, "batch_size": 9, "learning_rate": 0.1})
    with pytest.warns(UserWarning, match=f"3 classes are not the {targets.shape[1]} classes of zoo/answers, train"):
        report = finetune("zoo/answers", tmp_path / "run", model=two_heads, recipe=recipe)

    classifier = lf.ImageClassifier.from_pretrained(tmp_path / "run" / "model")
    config = classifier.model.config
    assert (config.problem_type, config.num_labels) == (problem_type, targets.shape[1])
    logits = np.array(list(classifier.stream_logits(images[27:])), np.float64)
    best, held_back = report["best"], targets[27:]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        metrics = list(csv.DictReader(file))
    if problem_type == "regression":
        loss = ((logits - held_back) ** 2).mean()
        assert not any("accuracy" in name for name in best)
        assert best["validation_loss"] == min(float(row["validation_loss"]) for row in metrics)
    else:
        loss = (np.log1p(np.exp(logits)) - held_back * logits).mean()
        assert config.id2label == tuple(names)
        assert best["validation_accuracy"] == ((logits > 0) == held_back).all(1).mean()
    assert best["validation_loss"] == pytest.approx(loss, rel=ROUNDING)
    losses = [float(row["train_loss"]) for row in metrics]
    assert losses[-1] < 0.97 * losses[0]

    taught = tiny_recipe(**{**QUICK, "distillation": "hard"})
    with pytest.raises(RecipeError, match="Distillation needs images with one class each"):
        finetune("zoo/answers", tmp_path / "taught", model=two_heads, recipe=taught, teacher=lambda x: x)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_a_checkpoint_of_another_problem_learns_one_class(folder, tmp_path, problem_type):
    source = save(tmp_path / "model", problem_type=problem_type)
    train, _ = find_images(folder, tiny_recipe(), ())
    config = student_of(source, train).model.config
    assert config.problem_type in (None, "single_label_classification")
    assert (config.num_labels, config.id2label) == (3, CLASSES)


def test_regression_of_as_many_numbers_as_there_were_classes(one_head):
    images = LabeledImages([], np.zeros((0, 3), np.float32), (), "the data", "regression")
    with pytest.warns(
        UserWarning, match="3 classes are not the 3 classes of the data: its heads are newly initialized"
    ):
        model = student_of(one_head, images).model
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 3)


# Teachers


def by_hand(two_heads, teacher, folder, kind):
    """Return the loss of the first step, from the logits of both models for all images to train on."""
    train, _ = find_images(folder, tiny_recipe(), ())
    pixels = np.stack([PROCESSOR.resize_and_crop(path) for path in train.images])
    model, variables = lf.from_pretrained(two_heads)
    prepared = PROCESSOR.rescale_and_normalize(pixels)
    out = jax.device_get(jax.jit(model.apply)(variables, prepared))
    taught = lf.ImageClassifier.from_pretrained(teacher).logits(pixels)[:, [1, 2, 0]]
    own = -(np.eye(3)[train.targets] * 0.9 + 0.1 / 3) * log_softmax(out.cls_logits)
    if kind == "hard":
        distilled = -log_softmax(out.distillation_logits)[np.arange(27), taught.argmax(1)].mean()
    else:
        ours, theirs = (log_softmax(logits / 2.0) for logits in (out.distillation_logits, taught))
        distilled = (np.exp(theirs) * (theirs - ours)).mean() * 2.0**2
    return 0.7 * own.sum(1).mean() + 0.3 * distilled


def as_function(teacher):
    """Return what the teacher computes as a function of the student's pixel values."""
    classifier = lf.ImageClassifier.from_pretrained(teacher)
    model, variables, own = classifier.model, classifier.variables, classifier.processor

    def per_channel(values):
        return np.float32(values).reshape(1, 1, 1, 3)

    def teach(pixel_values):
        levels = pixel_values * per_channel(PROCESSOR.image_std) + per_channel(PROCESSOR.image_mean)
        out = model.apply(variables, (levels - per_channel(own.image_mean)) / per_channel(own.image_std))
        return out.logits[:, np.array([1, 2, 0])]

    return teach


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_every_kind_of_teacher_teaches_the_same(two_heads, teacher, stored, folder, tmp_path, kind):
    wanted = by_hand(two_heads, teacher, folder, kind)
    recipe = tiny_recipe(**DISTILLED, distillation=kind)
    for name, source in {"directory": teacher, "function": as_function(teacher), "stored": stored}.items():
        report = finetune(folder, tmp_path / name, model=two_heads, recipe=recipe, teacher=source)
        assert report["last"]["step"] == 1
        assert report["last"]["train_loss"] == pytest.approx(wanted, rel=ROUNDING), name


def test_a_function_of_other_classes(two_heads, folder, tmp_path):
    recipe = tiny_recipe(**DISTILLED, distillation="soft")
    with pytest.raises(ValueError, match=r"logits have the shape \(27, 10\): expected \(27, 3\), one row per image"):
        finetune(folder, tmp_path / "run", model=two_heads, recipe=recipe, teacher=lambda x: jnp.zeros((len(x), 10)))


def test_stored_logits_follow_the_images(teacher, stored, folder):
    """In whatever order either comes, and in the student's order of classes."""
    train, held_back = find_images(folder, tiny_recipe(), ())
    classifier = lf.ImageClassifier.from_pretrained(teacher)
    for images in (train, held_back):
        wanted = np.array(list(classifier.stream_logits(images.images)))[:, [1, 2, 0]]
        recipe = tiny_recipe(distillation="soft")
        found = make_teacher(stored, recipe, CONFIG, PROCESSOR, images, folder).logits
        np.testing.assert_allclose(found, wanted, rtol=ROUNDING, atol=ROUNDING)


# What is exported


@pytest.fixture(scope="module")
def exported(two_heads, stored, folder, tmp_path_factory):
    """A run with two heads, through the command, and what it was begun with."""
    directory = tmp_path_factory.mktemp("exported")
    toml = write_recipe(directory / "tiny.toml", **DISTILLED)
    arguments = ["finetune", folder, "--recipe", toml, "--model", two_heads, "--teacher", stored]
    arguments = [*map(str, arguments), "--set", "distillation=hard", "--output"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        assert main([*arguments, str(directory / "run"), "--export-torch", "hf"]) == 0
    return directory / "run", arguments


@pytest.mark.parametrize("size", [40, [32, 48]])
def test_what_transformers_could_not_open_is_refused_before_the_training(folder, tmp_path, capsys, size):
    toml = write_recipe(tmp_path / "tiny.toml", architecture={**ARCHITECTURE, "image_size": size})
    arguments = ["finetune", folder, "--recipe", toml, "--output", tmp_path / "run"]
    assert main([*map(str, arguments), "--export-torch", "hf"]) == 1
    height, width = size if isinstance(size, list) else (size, size)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: transformers' LeViT does not support this image size: expected a square multiple of 16, found"
        f" {height}x{width}. Change the model's image_size."
    )
    assert not list((tmp_path / "run").iterdir())


def test_transformers_opens_what_is_exported(exported, two_heads, folder):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    classifier = lf.ImageClassifier.from_pretrained(exported[0] / "model")
    paths = sorted(folder.rglob("*.png"))[::7]
    wanted = np.array(list(classifier.stream_logits(paths)))
    directory = exported[0] / "torch"
    model = transformers.LevitForImageClassificationWithTeacher.from_pretrained(directory).eval()
    assert model.config.architectures == [type(model).__name__] and tuple(model.config.id2label.values()) == CLASSES
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    given = processor([Image.open(path) for path in paths], return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits.numpy()
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
    before = np.array(list(lf.ImageClassifier.from_pretrained(two_heads).stream_logits(paths)))
    assert np.abs(wanted - before).max() > 1e-3  # the step changed it


# What is wrong


def refused(capsys, output, *arguments):
    """Return the one sentence with which the command refuses, having written nothing."""
    before = contents(output)
    capsys.readouterr()
    status = main([*map(str, arguments), "--output", str(output)])
    out, err = capsys.readouterr()
    assert status in (1, 2) and out == "", (status, out)
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert contents(output) == before
    return err.removeprefix("error: ").strip()


def contents(output):
    """Return every file of a place, but for what is under another name."""
    if output.is_file():
        return output.read_bytes()
    return {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()} if output.is_dir() else {}


@pytest.fixture(scope="module")
def arguments(one_head, tmp_path_factory):
    """What is right of a command that is to be refused, but for the data."""
    toml = write_recipe(tmp_path_factory.mktemp("recipe") / "quick.toml", **QUICK)
    return ["--recipe", toml, "--model", one_head]


def images_of(*counts):
    return lambda directory: write_images(directory, counts, CLASSES[: len(counts)])


def with_an_empty_class(directory):
    write_images(directory)
    (directory / "dog").mkdir()


def with_a_text(directory):
    write_images(directory)
    (directory / "bee" / "3.png").write_text("no image")
    (directory / "cat" / "4.png").write_bytes(b"")


def with_broken_pixels(directory):
    write_images(directory)
    truncate(directory / "cat" / "4.png")


def with_other_classes(directory):
    write_images(directory / "train", 10)
    write_images(directory / "val", 2, ("ant", "bee", "yak"))


BAD_DATA = {
    "empty": (Path.mkdir, "{data} has no folders: expected one folder of images per class."),
    "an empty class": (
        with_an_empty_class,
        "{data}/dog has no images: expected at least one per class. Add images, or remove the folder.",
    ),
    "one class": (images_of(10), "{data} has one class, ant: expected two or more."),
    "one image in a class": (
        images_of(30, 30, 1),
        "{data} has 1 image of the class cat: expected at least two, one for training and one for validation.",
    ),
    "too few images": (
        images_of(10, 10, 9),
        "batch_size is 27, but {data}, for training has 26 images: expected 26 or less.",
    ),
    "headers of no image": (with_a_text, "2 of the 27 images of {data}, for training cannot be used: "),
    "other classes to validate on": (
        with_other_classes,
        "{data}/train has 3 classes and {data}/val has 3: expected the same classes, but only one has cat, yak.",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_used(capsys, arguments, tmp_path, name):
    prepare, sentence = BAD_DATA[name]
    data = tmp_path / "data"
    prepare(data)
    said = refused(capsys, tmp_path / "run", "finetune", data, *arguments)
    assert said.startswith(sentence.format(data=data)), said
    assert said.endswith(".") and said.count(". ") <= 1


def test_unusable_images_are_named(capsys, arguments, tmp_path):
    """By their headers; by their pixels where that is asked for."""
    with_a_text(tmp_path / "data")
    said = refused(capsys, tmp_path / "run", "finetune", tmp_path / "data", *arguments)
    for name in ("bee/3.png", "cat/4.png"):
        assert f"{tmp_path}/data/{name}" in said
    with_broken_pixels(tmp_path / "broken")
    said = refused(capsys, tmp_path / "run", "finetune", tmp_path / "broken", *arguments, "--check-data")
    assert f"{tmp_path}/broken/cat/4.png" in said and re.match(r"1 of the (27|3) images of ", said)


BAD_RECIPES = {
    "batch_size=28": "batch_size is 28, but .*, for training has 27 images: expected 27 or less",
    "batch_norm=train; batch_size=1": "The batch norm of the head cannot be trained on batches of one image: expected",
    "batch_norm=train; accumulation=27": "The batch norm of the head cannot be trained on batches of one image",
    "accumulation=2": "batch_size is 27: expected a multiple of accumulation, 2",
    "epoch=3": "has the unknown key epoch: expected epochs, batch_size,",
    "epochs=many": "epochs is 'many': expected int",
    "epochs=2.5": "epochs is 2.5: expected int",
    "flip=true": "flip is True: expected float",
    "crop_scale=0.5": "crop_scale is 0.5: expected tuple",
    "architecture=7": "architecture is 7: expected str or Mapping or NoneType",
    "learning_rates=1.0": "learning_rates is 1.0: expected Mapping",
    "epochs=0": "epochs is 0: expected more than 0",
    "heads=three": "heads is 'three': expected one of merge, first, both",
    "epochs": "Expected KEY=VALUE, such as epochs=10; found 'epochs'",
    'learning_rates={"head/.*"=1.0}': r"learning_rates does not cover .*: expected a pattern for every parameter\.",
    'learning_rates={".*"=1.0,"head/.*"=2.0}': r"learning_rates: 'head/\.\*' matches no parameter, or only those of",
    'learning_rates={"("=1.0}': r"learning_rates: '\(' is not a valid regular expression",
    "validation_share=0.0": "has no validation part and validation_share is 0. Add a validation part",
    "image_size=-3": "image_size is -3: expected a non-negative number",
    "distillation=hard": r"distillation is 'hard' and there is no teacher: expected a teacher \(--teacher\)",
}


@pytest.mark.parametrize("change", BAD_RECIPES)
def test_recipes_that_cannot_be_used(capsys, arguments, folder, tmp_path, change):
    settings = [part for setting in change.split("; ") for part in ("--set", setting)]
    said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments, *settings)
    assert re.search(BAD_RECIPES[change], said) and said.endswith("."), said


def test_recipes_that_cannot_be_read(capsys, folder, tmp_path):
    (tmp_path / "broken.toml").write_text("epochs = = 3\n")
    output = tmp_path / "run"
    said = refused(capsys, output, "finetune", folder, "--recipe", tmp_path / "broken.toml")
    assert said.startswith(f"The recipe {tmp_path}/broken.toml is not valid TOML: ") and "line 1" in said
    said = refused(capsys, output, "finetune", folder, "--recipe", "finetone")
    assert said == (
        "There is no recipe finetone: expected finetune, paper, small_images, small_images_finish, or the path of a"
        " TOML file."
    )
    said = refused(capsys, output, "finetune", folder, "--set", "batch_size=8")
    assert said.startswith(
        "There is no model to train: expected a checkpoint (--model), or a recipe with an architecture."
    )
    said = refused(capsys, output, "finetune", folder, "--set", "batch_size=8", "--set", "architecture=levit-1")
    assert said.startswith("architecture is 'levit-1': expected one of levit-128S, ")
    changes = ("--set", "batch_size=8", "--set", "architecture={hidden_sizes=[8]}")
    assert refused(capsys, output, "finetune", folder, *changes).startswith("architecture: ")


def test_a_skip_list_that_is_not_there(capsys, arguments, folder, tmp_path):
    path = tmp_path / "nowhere.txt"
    said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments, "--skip", path)
    assert "No such file" in said and str(path) in said


# Teachers that do not fit


def test_a_teacher_of_other_classes(capsys, arguments, folder, tmp_path):
    other = save(tmp_path / "teacher", num_labels=4, id2label=("ant", "bee", "dog", "elk"))
    distills = ("--set", "distillation=soft")
    arguments = [*arguments[:3], save(tmp_path / "student", TWO_HEADS)]
    said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments, *distills, "--teacher", other)
    assert said == (
        f"The teacher {other} has 4 classes, and cat is not one of them: expected a teacher with the names of all 3"
        " classes of the student."
    )


def test_a_teacher_that_is_not_asked_for(capsys, arguments, folder, teacher, tmp_path):
    said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments, "--teacher", teacher)
    assert said == 'distillation is \'none\' and there is a teacher: expected distillation = "hard" or "soft".'


def loaded(stored):
    with np.load(stored) as arrays:
        return dict(arrays)


NOT_STORED = "is not a file of stored logits: "
BAD_STORED = {
    "images that are missing": (
        lambda a: {"files": a["files"][:20], "logits": a["logits"][:20]},
        r"has no logits for \d+ of the 27 training images, such as ant/\d\.png. Store the logits of all images\.",
    ),
    "a class that is missing": (
        lambda a: {"labels": a["labels"][:2], "logits": a["logits"][:, :2]},
        "has 2 classes, and bee is not one of them",
    ),
    "no names": (lambda a: {"files": None}, NOT_STORED),
    "fewer columns than classes": (lambda a: {"logits": a["logits"][:, :2]}, NOT_STORED),
    "more columns than classes": (lambda a: {"logits": np.tile(a["logits"], 2)}, NOT_STORED),
    "fewer rows than names": (lambda a: {"logits": a["logits"][:5]}, NOT_STORED),
    "one dimension": (lambda a: {"logits": a["logits"][:, 0]}, NOT_STORED),
    "damaged data": (lambda a: b"\xff", NOT_STORED),
    "text": (lambda a: b"no archive", NOT_STORED),
    "half an archive": (lambda a: None, NOT_STORED),
    "nothing": (lambda a: b"", NOT_STORED),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # NumPy's, of half an archive
@pytest.mark.parametrize("name", BAD_STORED)
def test_stored_logits_that_do_not_fit(capsys, arguments, folder, two_heads, stored, tmp_path, name):
    change, sentence = BAD_STORED[name]
    path, changed = tmp_path / "bad.npz", change(loaded(stored))
    if changed is None:
        path.write_bytes(stored.read_bytes())
        truncate(path)
    elif changed == b"\xff":
        content = bytearray(stored.read_bytes())
        begin = 30 + sum(struct.unpack_from("<HH", content, 26))  # of the first array's deflated bytes
        content[begin] = 0xFF  # no legal kind of block
        path.write_bytes(content)
    elif isinstance(changed, bytes):
        path.write_bytes(changed)
    else:
        arrays = {key: value for key, value in {**loaded(stored), **changed}.items() if value is not None}
        np.savez(path, **arrays)
    arguments = [*arguments[:3], two_heads, "--set", "distillation=soft", "--teacher", path]
    said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments)
    assert str(path) in said and re.search(sentence, said), said


# Places that cannot be written to, and runs that are others


def test_outputs_that_are_files(capsys, arguments, folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    said = refused(capsys, tmp_path / "file", "finetune", folder, *arguments)
    assert said == f"{tmp_path}/file is a file: expected a directory, or a path that does not exist."
    said = refused(capsys, tmp_path / "file" / "deeper", "finetune", folder, *arguments)
    assert said.startswith(f"Cannot write {tmp_path}/file/deeper: ") and said.endswith("with enough space.")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_outputs_that_hold_something_else(capsys, arguments, folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    for more in ((), ("--force",), ("--resume",)):
        said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments, *more)
        assert said == f"{tmp_path}/run is not empty and holds no training run. Choose another directory."


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"data": 1}'])
def test_damaged_run_file_is_named(capsys, arguments, folder, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments, "--resume")
    assert said.startswith(f"{tmp_path}/run/run.json does not hold the settings of a training run: ")
    assert said.endswith(". Start the run again with --force.")


def test_outputs_that_hold_a_training(capsys, exported, folder, one_head, tmp_path):
    output, begun = exported
    begun = begun[:-1]
    said = refused(capsys, output, *begun)
    assert said.startswith(f"{output} already holds a training run. Resume it with --resume, replace it with --force")
    other = shutil.copytree(folder, tmp_path / "data")
    (other / "ant" / "0.png").rename(other / "ant" / "zero.png")
    for changed, sentence in {
        ("--set", "epochs=7"): "recipe.epochs (was 1, is 7)",
        ("--set", 'learning_rates={".*"=1.0}'): "recipe.learning_rates..* (was 0.0, is 1.0)",
        ("--model", str(one_head)): f"model (was '{begun[5]}', is '{one_head}')",
        ("--teacher", str(one_head)): f"teacher (was '{begun[7]}', is '{one_head}')",
    }.items():
        said = refused(capsys, output, *begun, *changed, "--resume")
        assert said.startswith(f"{output} was started with other settings: ") and sentence in said, said
        assert said.endswith("Resume with the same settings, or start again with --force.")
    said = refused(capsys, output, "finetune", other, *begun[2:], "--resume")
    assert "data.sha256 (was '" in said and said.startswith(f"{output} was started with other settings: ")
    assert json.loads((output / "run.json").read_text())["data"]["training_images"] == 27
