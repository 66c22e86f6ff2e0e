"""Hugging Face datasets, by the real package."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

import levit_flax as lf
from configs import TINY, random_variables

datasets = pytest.importorskip("datasets")
pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")

from levit_flax.data_sources import _read_parts  # noqa: E402
from levit_flax.datasets import DataError, _DataOptions  # noqa: E402
from levit_flax.evaluation import evaluate, read_data  # noqa: E402
from levit_flax.hugging_face import _load_dataset, _read_split  # noqa: E402
from levit_flax.training import data  # noqa: E402

NAMES = ["ant", "bee", "cat"]
CLASS = datasets.ClassLabel(names=NAMES)
IMAGES = [Image.new("RGB", (8, 6), (i, 0, 0)) for i in range(4)]


def make(column, kind, values):
    features = datasets.Features({"note": datasets.Value("string"), "image": datasets.Image(), column: kind})
    rows = {"note": ["x"] * len(values), "image": IMAGES[: len(values)], column: values}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize(
    ("column", "kind", "values", "targets", "problem_type"),
    [
        ("label", CLASS, [2, 0, 1, 2], np.array([2, 0, 1, 2], np.int32), "single_label_classification"),
        (
            "labels",
            datasets.List(CLASS),
            [[0, 2], [], [1]],
            np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32),
            "multi_label_classification",
        ),
        ("age", datasets.Value("float32"), [0.5, 2.0], np.array([[0.5], [2.0]], np.float32), "regression"),
        ("point", datasets.List(datasets.Value("float64"), length=2), [[1.0, 2.0]], [[1.0, 2.0]], "regression"),
    ],
)
def test_targets_of_every_column_type(column, kind, values, targets, problem_type):
    images = _read_split(make(column, kind, values), "the data", "train")
    np.testing.assert_array_equal(images.targets, targets)
    assert images.targets.dtype == (np.int32 if problem_type.startswith("single") else np.float32)
    assert images.problem_type == problem_type
    assert images.labels == (() if problem_type == "regression" else tuple(NAMES))
    assert [images.load(i).getpixel((0, 0))[0] for i in range(len(images))] == list(range(len(values)))
    assert images.select([len(values) - 1], "one").load(0).getpixel((0, 0))[0] == len(values) - 1


def test_rows_without_a_target_raise():
    with pytest.raises(
        DataError, match=r"A column is missing: expected one of classes, .* found the columns note, image, count"
    ):
        _read_split(make("count", datasets.Value("int64"), [1, 2]), "the data", "train")


def many_columns(**columns):
    features = datasets.Features({"photo": datasets.Image()} | {name: kind for name, (kind, _) in columns.items()})
    rows = {"photo": IMAGES[:2]} | {name: values for name, (_, values) in columns.items()}
    return datasets.Dataset.from_dict(rows, features=features)


def test_classes_are_chosen_before_numbers_that_come_first():
    number = datasets.Value("float32")
    rows = many_columns(latitude=(number, [0.1, 0.2]), kind=(CLASS, [2, 0]))
    found = _read_split(rows, "the data", "train")
    assert found.problem_type == "single_label_classification" and found.targets.tolist() == [2, 0]
    numbers = _read_split(rows, "the data", "train", options=_DataOptions(label_column="latitude"))
    assert numbers.problem_type == "regression"


def test_ambiguous_columns_are_listed_with_the_option():
    rows = many_columns(fine=(CLASS, [2, 0]), coarse=(CLASS, [1, 1]))
    with pytest.raises(DataError, match=r"found fine, coarse\. Choose one with label_column=\.\.\.$"):
        _read_split(rows, "the data", "train")
    coarse = _read_split(rows, "the data", "train", options=_DataOptions(label_column="coarse"))
    assert coarse.targets.tolist() == [1, 1]
    with pytest.raises(DataError, match=r"The column photo cannot be used: .* found fine, coarse in the columns photo"):
        _read_split(rows, "the data", "train", options=_DataOptions(label_column="photo"))
    named = many_columns(label=(CLASS, [2, 0]), coarse=(CLASS, [1, 1]))
    assert _read_split(named, "the data", "train").targets.tolist() == [2, 0]


def test_dataset_without_training_split_raises(monkeypatch):
    part = make("label", CLASS, [0, 1, 2, 0])
    both = datasets.DatasetDict({"train": part, "test": part.select([1, 2])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"whole": both}[name])
    assert {name: len(found) for name, found in _read_parts("whole", _DataOptions()).items()} == {"train": 4, "test": 2}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"test": part}))
    with pytest.raises(DataError, match="has the splits test: expected one named train"):
        _read_parts("part", _DataOptions())


def test_rows_without_a_class_raise():
    for values, row in (([0, -1, 1], 1), ([0, 1, None], 2)):
        with pytest.raises(DataError, match=rf"^the data, test has .* of 3 rows, found 1 rows .* first row {row}\."):
            _read_split(make("label", CLASS, values), "the data", "test")


def test_rows_are_left_out_by_name(monkeypatch, tmp_path):
    parts = {"train": make("label", CLASS, [0, 1, 2, 0]), "test": make("label", CLASS, [1, 2])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(parts))
    found = data._without_skipped(_read_parts("zoo", _DataOptions()), tmp_path, {"train/0", "test/0"})
    assert [shade(found["train"], i) for i in range(3)] == [1, 2, 3] and [shade(found["test"], 0)] == [1]
    assert found["train"].name(1) == "image train/2 of zoo, train"

    whole = _read_parts("zoo", _DataOptions())
    train, validation = data._leave_out(whole["train"], whole["test"], tmp_path, {"train/0", "test/1"})
    assert [shade(train, i) for i in range(4)] == [3, 1, 2, 3] and len(validation) == 1  # another ant in its place
    with pytest.raises(DataError, match="no image of the class bee left"):
        data._leave_out(whole["train"], whole["test"], tmp_path, {"train/1"})


def test_undecodable_row_raises_with_its_name(monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": CLASS})
    rows = {"image": [{"bytes": b"no image", "path": None}] * 2, "label": [0, 1]}
    broken = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": broken}))
    with pytest.raises(DataError, match=r"^image train/1 of zoo, train cannot be used: "):
        _read_parts("zoo", _DataOptions())["train"].load(1)


def shade(images, index):
    return images.load(index).getpixel((0, 0))[0]


def damaged_rows(labels=(0, 1, 2)):
    good = io.BytesIO()
    Image.new("RGB", (8, 8)).save(good, "PNG")
    images = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"no image", "path": None}, None]
    features = datasets.Features({"image": datasets.Image(), "label": CLASS})
    return datasets.Dataset.from_dict({"image": images, "label": list(labels)}, features=features)


def test_damaged_and_missing_images_are_named_and_left_out_of_an_evaluation():
    config = lf.LevitConfig(**TINY).replace(id2label=NAMES)
    model = lf.LevitForImageClassification(config)
    classifier = lf.ImageClassifier(model, random_variables(model), fast_start=True)
    result = evaluate(classifier, _read_split(damaged_rows(), "zoo", "test"))
    assert result.images == 1
    first, second = result.broken
    assert first.startswith("image test/1 of zoo, test: ") and "is not an image" in first
    assert second == "image test/2 of zoo, test: The image is missing: expected an image, found None."


def test_damaged_rows_raise_before_training():
    rows = _read_split(damaged_rows(), "zoo", "train")
    with pytest.raises(DataError, match=r"2 of the 3 images of zoo, train .* image train/1 .*; image train/2"):
        data._check_images(rows, decode=True)


@pytest.mark.parametrize(
    "feature", [CLASS, datasets.Sequence(CLASS), datasets.Value("float32")], ids=["class", "classes", "number"]
)
def test_unlabeled_rows_raise(feature):
    value = [0] if feature == datasets.Sequence(CLASS) else 0
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = datasets.Dataset.from_dict({"image": IMAGES[:3], "label": [value, None, value]}, features=features)
    with pytest.raises(DataError, match=r"zoo, test has unlabeled rows: .* found 1 rows .* first row 1\."):
        _read_split(rows, "zoo", "test")


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"^hfds/zoo cannot be read: loading .* 'levit-flax\[datasets\]'$"):
        _read_parts("hfds/zoo")
    with pytest.raises(ImportError, match=r"^The directory zoo does not exist, and loading a Hugging Face dataset"):
        _read_parts("zoo")


def test_loaded_datasets_are_read_from_python():
    parts = {"train": make("label", CLASS, [0, 1, 2, 0]), "test": make("label", CLASS, [1, 2])}
    for source in (parts, datasets.DatasetDict(parts)):
        found = _read_parts(source)
        assert [part.targets.tolist() for part in found.values()] == [[0, 1, 2, 0], [1, 2]]
        assert found["train"].name(1) == "image train/1 of the data, train" and found["test"].labels == tuple(NAMES)
    assert read_data(parts["test"], NAMES).targets.tolist() == [1, 2]
    assert _read_parts(many_columns(a=(CLASS, [2, 0]), b=(CLASS, [1, 1])), _DataOptions(label_column="b"))


@pytest.mark.parametrize("error", [FileNotFoundError, ConnectionError])
def test_missing_data_is_one_sentence(monkeypatch, error):
    def load(name, **_):
        raise error(f"Couldn't reach '{name}' on the Hub.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"^The directory nodata does not exist, and .* 'nodata' on the Hub\.$"):
        _load_dataset("nodata")
