"""Labeled images from Python sequences."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from levit_flax.data_sources import _read_parts
from levit_flax.datasets import DataError, LabeledImages, _DataOptions
from levit_flax.evaluation import evaluate, read_data

IMAGES = [Image.new("RGB", (8, 6), (i, 0, 0)) for i in range(4)]


class Items:
    """Items with len() and [i], and nothing else of a sequence."""

    def __init__(self, labels, **attributes):
        self.labels = labels
        vars(self).update(attributes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return IMAGES[index % len(IMAGES)], self.labels[index]


@pytest.mark.parametrize(
    ("items", "targets", "labels"),
    [
        (Items([1, 0, 1]), [1, 0, 1], ("0", "1")),
        (Items(np.array([1, 0, 1]), classes=["ant", "bee", "cat"]), [1, 0, 1], ("ant", "bee", "cat")),
        (Items(["cat", "ant", "cat"]), [1, 0, 1], ("ant", "cat")),
        (Items(["cat", "ant", "cat"], classes=("cat", "bee", "ant")), [0, 2, 0], ("cat", "bee", "ant")),
        (Items([True, False, True]), [1, 0, 1], ("0", "1")),
        ([(IMAGES[0], 1), [IMAGES[1], 0]], [1, 0], ("0", "1")),
    ],
)
def test_labels_are_classes(items, targets, labels):
    data = _read_parts(items)["train"]
    assert data.targets.tolist() == targets and data.targets.dtype == np.int32 and data.labels == labels
    assert [data.load(i).getpixel((0, 0))[0] for i in range(len(data))] == list(range(len(targets)))
    assert data.name(1) == "image train/1 of the data" and len(list(data.images)) == len(targets)


@pytest.mark.parametrize(
    ("labels", "targets"), [([0.5, 2.0], [[0.5], [2.0]]), ([[0.5, 1.0], np.ones(2)], [[0.5, 1.0], [1.0, 1.0]])]
)
def test_labels_are_numbers(labels, targets):
    data = _read_parts(Items(labels))["train"]
    assert data.problem_type == "regression" and data.targets.tolist() == targets and data.targets.dtype == np.float32


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (Items([0, -1, 1]), r"^the data has unlabeled rows: .* found 1 rows without one, first row 1\."),
        (Items([0, 3], classes=["ant", "bee"]), r"^the data has unlabeled rows: .* first row 1\."),
        (Items(["ant", "gnu"], classes=["ant", "bee"]), r"^the data has unlabeled rows: .* first row 1\."),
        (Items([None, None]), r"^The labels of the data have the wrong type: .* found NoneType\."),
        (
            Items([[0, 1], [1]]),
            r"^The labels of the data have the wrong type: .* found list\. .* LabeledImages\.$",
        ),
        (Items([[0, 1], [1, 0]]), r"^The labels of the data have the wrong type: .*, found list\."),
        (IMAGES, r"^The items of the data are not labeled images: .*, found Image at \[0\]\.$"),
        ([(IMAGES[0], 0, 1)], r"^The items of the data are not labeled images: .*, found a sequence of 3 at \[0\]\.$"),
        (
            {"train": [(IMAGES[0], 0)], "extra": []},
            r"^the data has the splits train, extra: expected one named x",
        ),
    ],
)
def test_wrong_items_are_one_sentence(items, message):
    with pytest.raises(DataError, match=message):
        _read_parts(items, _DataOptions("x") if isinstance(items, dict) else _DataOptions())


def test_items_that_cannot_be_read_are_named():
    class Broken(Items):
        def __getitem__(self, index):
            return {0: (IMAGES[0], 0)}[index]

    with pytest.raises(DataError, match=r"^image train/1 of the data cannot be read: KeyError\(1\)\.$"):
        _read_parts(Broken([0, 1]))


def test_options_of_datasets_do_not_apply():
    for options in ({"split": "train"}, {"revision": "main"}, {"label_column": "label"}):
        with pytest.raises(DataError, match=r"^the data has no .* to choose: expected no .*=\.\.\."):
            _read_parts(Items([0, 1]), _DataOptions(**options))


def test_parts_share_the_names_of_their_classes():
    named = Items([0, 1], classes=["ant", "bee"])
    for other, labels in ((named, ("ant", "bee")), (Items([2, 0]), ("0", "1", "2"))):
        parts = _read_parts({"train": Items([0, 1]), "test": other, "extra": Items([5])})
        assert list(parts) == ["train", "test"] and {part.labels for part in parts.values()} == {labels}
    parts = _read_parts({"first": named, "val": LabeledImages(IMAGES, np.zeros(4, np.int32))}, _DataOptions("first"))
    assert (
        parts["val"].labels == ("ant", "bee") and parts["val"].key(3) == "val/3" and parts["train"].key(0) == "first/0"
    )
    with pytest.raises(DataError, match="the data, test has unlabeled rows"):
        _read_parts({"train": named, "test": Items([2])})


def test_files_of_labeled_images_keep_their_paths(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        IMAGES[3].save(path)
    data = _read_parts(LabeledImages(paths, np.array([0, 1], np.int32), ("ant", "bee")))["train"]
    assert data.images is not None and data.name(0) == str(paths[0])
    assert data.key(1, tmp_path) == "1.png" and data.key(1, Path("elsewhere")) == paths[1].as_posix()


def test_indices_without_names_are_those_of_the_model():
    names = ("ant", "bee", "cat")
    data = read_data(Items([2, 0]), names)
    assert data.targets.tolist() == [2, 0] and data.labels == names
    assert read_data({"val": Items(["bee", "cat"])}, names, "val").targets.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"the data are not class indices: .* \[0, 3\), found 3 for image test/0"):
        read_data(Items([3]), names)
    with pytest.raises(DataError, match="the data is for regression: expected images with one class each"):
        read_data(Items([0.5]), names)
    with pytest.raises(DataError, match=r"^The data has the splits val: expected one named test\."):
        read_data({"val": Items([0])}, names)


def test_evaluation_of_pairs(tmp_path):
    import levit_flax as lf

    classifier = lf.ImageClassifier.from_pretrained("cifar10")
    images = [IMAGES[0], np.zeros((8, 8, 3), np.uint8), str(tmp_path / "nowhere.png")]
    labels = classifier.model.config.id2label
    result = evaluate(classifier, read_data(list(zip(images, [3, 4, 5], strict=True)), labels))
    assert result.images == 2 and "nowhere.png does not exist" in result.broken[0]
