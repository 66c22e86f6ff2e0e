"""TensorFlow Datasets, by the real package and without TensorFlow."""

import io

import numpy as np
import pytest
from PIL import Image
from training_runs import PROGRAMS, start, write_images

import levit_flax as lf
from configs import TINY, random_variables

tfds = pytest.importorskip("tensorflow_datasets")

from dataset_copies import copy_to_records, prepare_records  # noqa: E402

from levit_flax.data_sources import _read_part, _read_parts  # noqa: E402
from levit_flax.datasets import DataError, _DataOptions  # noqa: E402
from levit_flax.evaluation import evaluate, read_data  # noqa: E402

NAMES = ["ant", "bee", "cat"]
CLASS = tfds.features.ClassLabel(names=NAMES)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    monkeypatch.setattr("levit_flax.tfds._READ_AT_ONCE", 2)  # fewer records than the datasets have
    return tmp_path / "prepared"


def encoded(i, dtype=np.uint8):
    file = io.BytesIO()
    pixels = np.full((6, 8, 3), i, dtype) if dtype == np.uint8 else np.full((6, 8), i * 257, dtype)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make(directory, values, name="label", feature=CLASS, image=None, **options):
    features = {"id": tfds.features.Text(), "image": image or tfds.features.Image(), name: feature}
    rows = [{"id": "x", "image": encoded(i), name: value} for i, value in enumerate(values)]
    return prepare_records({"train": rows}, features, directory, **options)


@pytest.mark.parametrize(
    ("name", "feature", "values", "targets", "problem_type"),
    [
        ("label", CLASS, [2, 0, 1, 2], np.array([2, 0, 1, 2], np.int32), "single_label_classification"),
        (
            "labels",
            tfds.features.Sequence(CLASS),
            [[0, 2], [], [1]],
            np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32),
            "multi_label_classification",
        ),
        ("age", tfds.features.Scalar(np.float32), [0.5, 2.0], np.array([[0.5], [2.0]], np.float32), "regression"),
        ("point", tfds.features.Tensor(shape=(2,), dtype=np.float32), [[1.0, 2.0]], [[1.0, 2.0]], "regression"),
    ],
)
def test_targets_of_every_feature(directory, name, feature, values, targets, problem_type):
    images = _read_parts(make(directory, values, name, feature))["train"]
    np.testing.assert_array_equal(images.targets, targets)
    assert images.problem_type == problem_type
    assert images.labels == (() if problem_type == "regression" else tuple(NAMES))
    assert [images.load(i).getpixel((0, 0)) for i in range(len(images))] == [(i, i, i) for i in range(len(values))]
    assert [images.key(i) for i in range(len(images))] == [f"train/{i}" for i in range(len(values))]
    assert images.where == "tfds/zoo, train" and list(images.images) == [images.images[i] for i in range(len(images))]


def test_version_and_part_of_a_split(directory):
    source = f"{make(directory, [0, 1, 2, 0, 1, 2])}:1.0.0"
    images = _read_part(source, _DataOptions("train[:50%]"))
    assert (
        images.targets.tolist() == [0, 1, 2] and images.name(1) == "image train[:50%]/1 of tfds/zoo:1.0.0, train[:50%]"
    )
    assert len(_read_parts(source, _DataOptions("train[2:]+train[:1]"))["train"]) == 5


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "tfds/zoo",
            {"split": "test"},
            r"^tfds/zoo, test cannot be read: Unknown split 'test'.* \['train'\]. Change",
        ),
        ("tfds/zoo", {"split": "train["}, r"^tfds/zoo, train\[ cannot be read: .* Change split=\.\.\.$"),
        (
            "tfds/zoo:3.0.0",
            {"split": "train"},
            r"^tfds/zoo:3.0.0 cannot be loaded: .* Prepare it with tfds\.builder\('zoo:3.0.0', ",
        ),
        ("tfds/nowhere", {"split": "train"}, r"^tfds/nowhere cannot be loaded: Dataset nowhere not found\. Prepare it"),
        ("tfds/a b", {"split": "train"}, r"^tfds/a b cannot be loaded: .*"),
        ("tfds/zoo", {"split": "train", "revision": "main"}, r"^tfds/zoo has no revision to choose: .* data_revision="),
        ("tfds/zoo", {"split": "train", "label_column": "id"}, r"^The column id cannot be used: .*, found label in"),
    ],
)
def test_wrong_sources_are_one_sentence(directory, source, options, message):
    make(directory, [0, 1, 2])
    with pytest.raises(DataError, match=message) as raised:
        _read_part(source, _DataOptions(**options))
    assert "\n" not in str(raised.value)


def test_split_to_train_on_must_exist(directory):
    source = make(directory, [0, 1, 2])
    with pytest.raises(DataError, match=r"tfds/zoo has the splits train: expected one named test\. Choose one with"):
        _read_parts(source, _DataOptions("test"))


def test_datasets_in_another_format_are_not_prepared(directory):
    source = make(directory, [0, 1], file_format="parquet")
    with pytest.raises(DataError, match=r"^tfds/zoo is not prepared: expected ArrayRecord files in .*, found none\."):
        _read_parts(source)


def test_unlabeled_rows_raise(directory):
    source = make(directory, [0, -1, 1])
    with pytest.raises(DataError, match=r"^tfds/zoo, train has unlabeled rows: .* found 1 rows .* first row 1\."):
        _read_parts(source)


def test_arrays_of_floats_are_no_images(directory):
    features = {"label": CLASS, "depth": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.float32)}
    source = prepare_records({"train": [{"label": 0, "depth": np.zeros((2, 2, 1), np.float32)}]}, features, directory)
    with pytest.raises(DataError, match=r"expected one of images, .* found the columns depth, label"):
        _read_parts(source)


def test_sixteen_bits_per_pixel_are_scaled(directory):
    features = {"image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16), "label": CLASS}
    rows = [{"image": encoded(7, np.uint16), "label": 1}]
    images = _read_parts(prepare_records({"train": rows}, features, directory))["train"]
    assert images.load(0).getpixel((0, 0)) == (7, 7, 7)


def test_damaged_images_are_left_out_of_an_evaluation(directory):
    rows = [{"image": encoded(3), "label": 0}, {"image": b"no image", "label": 1}]
    source = prepare_records({"test": rows}, {"image": tfds.features.Image(), "label": CLASS}, directory)
    model = lf.LevitForImageClassification(lf.LevitConfig(**TINY).replace(id2label=NAMES))
    classifier = lf.ImageClassifier(model, random_variables(model), fast_start=True)
    result = evaluate(classifier, read_data(source, NAMES))
    assert result.images == 1 and result.broken[0].startswith("image test/1 of tfds/zoo, test: ")


def test_training_and_evaluation_do_not_import_tensorflow(directory, tmp_path, compiled_directory):
    pytest.importorskip("grain")
    source = copy_to_records({"train": write_images(tmp_path / "data")}, directory)
    process = start([PROGRAMS / "read_without_tensorflow.py", source, tmp_path / "run"], compiled_directory)
    out, err = process.communicate()
    assert process.returncode == 0 and out.split() == ["30", "False"], err


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"^tfds/zoo cannot be read: .* Run: pip install 'levit-flax\[tfds\]'$"):
        _read_parts("tfds/zoo")
