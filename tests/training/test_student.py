"""The model that a training run begins with, for one class per image, several classes, and regression."""

import csv

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

from training_runs import (
    CLASSES,
    ONE_STEP,
    save_model,
    tiny_recipe,
    write_images,
)

import levit_flax as lf
from levit_flax.training import LabeledImages, RecipeError, finetune
from levit_flax.training.data import (
    _find_images,
    _training_batches,
    _TrainingRows,
)
from levit_flax.training.student import _align_classes, _make_student

pytestmark = pytest.mark.usefixtures("compiled")

ONE_HEAD, TWO_HEADS = lf.LevitForImageClassification, lf.LevitForImageClassificationWithTeacher
ROUNDING = 1e-5  # float32, through a small model


def apply(student, pixel_values):
    return jax.device_get(jax.jit(student.model.apply)(student.variables, pixel_values))


def student_of(source, images, **changes):
    return _make_student(source, tiny_recipe(**changes), images)


def same_but_heads(variables, source):
    _, before = lf.from_pretrained(source)
    before, after = (flatten_dict(tree, sep="/") for tree in (before, variables))
    paths = [path for path in before if not path.split("/")[1].startswith("head")]
    assert len(paths) > 20
    return all(np.array_equal(before[path], after[path]) for path in paths)


def test_two_heads_are_merged_dropped_or_kept(two_heads, folder):
    train, _ = _find_images(folder, tiny_recipe(), ())
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
def test_missing_head_is_initialized_with_a_warning(one_head, folder, changes):
    train, _ = _find_images(folder, tiny_recipe(), ())
    with pytest.warns(UserWarning, match="The checkpoint has no head_dist: these heads are newly initialized"):
        student = student_of(one_head, train, **changes)
    _, before = lf.from_pretrained(one_head)
    after = student.variables["params"]
    np.testing.assert_array_equal(after["head"]["linear"]["kernel"], before["params"]["head"]["linear"]["kernel"])
    assert after["head_dist"]["linear"]["kernel"].shape == (24, 3) and same_but_heads(student.variables, one_head)


@pytest.mark.parametrize("names", [("ant", "bee"), ("ant", "bee", "dog"), ("ant", "bee", "cat", "dog")])
def test_other_classes_initialize_the_heads_with_a_warning(two_heads, tmp_path, names):
    train, _ = _find_images(write_images(tmp_path / "data", 2, names), tiny_recipe(), ())
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


def test_same_classes_in_another_order_keep_the_heads(teacher, folder):
    """The targets of the images are permuted to the order of the model."""
    train, _ = _find_images(folder, tiny_recipe(), ())
    student = student_of(teacher, train)  # without a warning
    assert student.model.config.id2label == ("cat", "ant", "bee")
    _, before = lf.from_pretrained(teacher)
    head = student.variables["params"]["head"]["linear"]
    np.testing.assert_array_equal(head["kernel"], before["params"]["head"]["linear"]["kernel"])
    aligned = _align_classes(train, student.model.config)
    assert [aligned.labels[target] for target in aligned.targets] == [path.parent.name for path in train.images]
    assert aligned.labels == ("cat", "ant", "bee") and aligned.targets.dtype == np.int32
    rows = np.array([[1, 0, 0], [0, 1, 1]], np.float32)  # ant; bee and cat
    several = _align_classes(
        LabeledImages([""] * 2, rows, CLASSES, "", "multi_label_classification"), student.model.config
    )
    assert several.targets.tolist() == [[0, 1, 0], [1, 0, 1]]


def test_image_size_of_the_recipe_resizes_the_model(one_head, folder):
    train, _ = _find_images(folder, tiny_recipe(), ())
    recipe = tiny_recipe(image_size=64)
    student = _make_student(one_head, recipe, train)
    assert student.model.config.image_height_width == (64, 64)
    assert student.processor.size == {"shortest_edge": 56} and student.processor.crop_size == {
        "height": 64,
        "width": 64,
    }
    biases = [leaf for path, leaf in flatten_dict(student.variables, sep="/").items() if path.endswith("_biases")]
    assert sorted(leaf.shape for leaf in biases) == [(4, 2), (16, 2)]  # grids of 4 x 4 and 2 x 2 tokens
    assert next(_training_batches(_TrainingRows(train, recipe, student.processor), 1))["pixels"].shape[2:4] == (64, 64)
    assert student_of(one_head, train).model.config.image_height_width == (32, 32)


def test_recipe_selects_rematerialization(one_head, folder):
    train, _ = _find_images(folder, tiny_recipe(), ())
    assert student_of(one_head, train, remat=True).model.remat
    assert not student_of(one_head, train).model.remat
    with pytest.raises(RecipeError, match="remat is 1: expected bool"):
        tiny_recipe(remat=1)


@pytest.mark.parametrize(("given", "wanted"), [(None, 0.25), (0.0, 0.0), (0.5, 0.5)])
def test_drop_path_rate_defaults_to_the_checkpoint(one_head, folder, given, wanted):
    train, _ = _find_images(folder, tiny_recipe(), ())
    student = student_of(one_head, train, drop_path_rate=given)
    assert student.model.config.drop_path_rate == wanted and student.model.config.id2label == CLASSES


# Other problem types


def answers(problem_type, count):
    generator = np.random.default_rng(count)
    if problem_type == "regression":
        return generator.uniform(0, 3, (count, 2)).astype(np.float32)
    return generator.integers(0, 2, (count, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "problem_type", ["multi_label_classification", pytest.param("regression", marks=pytest.mark.slow)]
)
def test_multi_label_and_regression_train_end_to_end(two_heads, tmp_path, monkeypatch, problem_type):
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
    recipe = tiny_recipe(**{**ONE_STEP, "epochs": 3, "batch_size": 9, "learning_rate": 0.1})
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

    taught = tiny_recipe(**{**ONE_STEP, "distillation": "hard"})
    with pytest.raises(RecipeError, match="Distillation needs images with one class each"):
        finetune("zoo/answers", tmp_path / "taught", model=two_heads, recipe=taught, teacher=lambda x: x)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_checkpoint_of_another_problem_type_is_reset(folder, tmp_path, problem_type):
    source = save_model(tmp_path / "model", problem_type=problem_type)
    train, _ = _find_images(folder, tiny_recipe(), ())
    config = student_of(source, train).model.config
    assert config.problem_type in (None, "single_label_classification")
    assert (config.num_labels, config.id2label) == (3, CLASSES)


def test_regression_never_keeps_a_classification_head(one_head):
    images = LabeledImages([], np.zeros((0, 3), np.float32), (), "the data", "regression")
    with pytest.warns(
        UserWarning, match="3 classes are not the 3 classes of the data: its heads are newly initialized"
    ):
        model = student_of(one_head, images).model
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 3)
