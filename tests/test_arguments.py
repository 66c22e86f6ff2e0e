"""Wrong arguments of public functions are refused by a sentence that names them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import levit_flax as lf
from levit_flax import convert
from levit_flax.arguments import _check_types
from levit_flax.datasets import DataError, LabeledImages
from levit_flax.evaluation import evaluate, evaluation_processor, read_data
from levit_flax.export import export_model
from levit_flax.training import Recipe, finetune, read_images, store_logits

visualize = pytest.importorskip("levit_flax.visualize")

BLACK = np.zeros((32, 32, 3), np.uint8)
CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def loaded():
    return lf.from_pretrained("cifar10")


@pytest.fixture(scope="module")
def classifier(loaded):
    return lf.ImageClassifier(*loaded, batch_size=1, fast_start=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in CLASSES:
        (folder / name).mkdir()
        Image.fromarray(BLACK).save(folder / name / "1.png")
    return folder


# The arguments that a correct call of each function would have, except for the wrong one.
WRONG_TYPES = {
    "evaluate, classifier": (lambda m, v, f: evaluate(None, None), "classifier"),
    "evaluate, model": (lambda m, v, f: evaluate(m, LabeledImages([], np.zeros(0, np.int32))), "classifier"),
    "processor": (lambda m, v, f: evaluation_processor("hf", None), "model_processor"),
    "read_data, source": (lambda m, v, f: read_data(None, CLASSES), "source"),
    "read_data, one label": (lambda m, v, f: read_data(f, labels="cat"), "labels"),
    "read_data, no labels": (lambda m, v, f: read_data(f, labels=None), "labels"),
    "read_data, column": (lambda m, v, f: read_data(f, CLASSES, image_column=3), "image_column"),
    "read_images, source": (lambda m, v, f: read_images(None, Recipe()), "source"),
    "read_images, recipe": (lambda m, v, f: read_images(f, {"epochs": 1}), "recipe"),
    "read_images, skip": (lambda m, v, f: read_images(f, Recipe(), skip="cat/1.png"), "skip"),
    "finetune, recipe": (lambda m, v, f: finetune(f, f / "run", recipe=None), "recipe"),
    "finetune, mapping": (lambda m, v, f: finetune(f, f / "run", recipe={"epochs": 1}), "recipe"),
    "finetune, teacher": (lambda m, v, f: finetune(f, f / "run", teacher=3), "teacher"),
    "finetune, skip": (lambda m, v, f: finetune(f, f / "run", skip="cat/1.png"), "skip"),
    "store_logits": (lambda m, v, f: store_logits(f / "t.npz", m, f, [f / "cat" / "1.png"]), "classifier"),
    "overlay": (lambda m, v, f: visualize.overlay(None, [[0]], np.zeros((2, 2)), "title"), "image"),
    "draw_bias_tables": (lambda m, v, f: visualize.draw_bias_tables(None, v), "model"),
    "bias_tables": (lambda m, v, f: visualize.bias_tables(m, None), "variables"),
    "attention_maps": (lambda m, v, f: visualize.attention_maps(m, v, None), "pixel_values"),
    "saliency": (lambda m, v, f: visualize.saliency(m, v, np.zeros((1, 144, 144, 3)), "cat"), "label"),
    "explain": (lambda m, v, f: visualize.explain(m, BLACK), "classifier"),
    "draw_confusion": (lambda m, v, f: visualize.draw_confusion([[1]], ["cat"]), "confusion"),
    "draw_curves": (lambda m, v, f: visualize.draw_curves({"epoch": 1}), "history"),
    "save_pretrained, directory": (lambda m, v, f: lf.save_pretrained(None, m, v), "directory"),
    "save_pretrained, order": (lambda m, v, f: lf.save_pretrained(f / "m", v, m), "model"),
    "save_pretrained, processor": (lambda m, v, f: lf.save_pretrained(f / "m", m, v, "processor"), "processor"),
    "save_pretrained, overwrite": (lambda m, v, f: lf.save_pretrained(f / "m", m, v, overwrite="no"), "overwrite"),
    "export_model, processor": (lambda m, v, f: export_model(f / "m", m, v, None), "processor"),
    "export_model, platforms": (
        lambda m, v, f: export_model(f / "m", m, v, lf.LevitImageProcessor(), platforms="cpu"),
        "platforms",
    ),
    "from_pretrained": (lambda m, v, f: lf.from_pretrained(3), "source"),
    "push_to_hub": (lambda m, v, f: lf.push_to_hub(m, v, "name"), "repo_id"),
    "fold_batch_norm": (lambda m, v, f: lf.fold_batch_norm(v, m), "model"),
    "merge_heads": (lambda m, v, f: lf.merge_heads(m, None), "variables"),
    "resize_image": (lambda m, v, f: lf.resize_image(m, v, "256"), "image_size"),
    "replace_head": (lambda m, v, f: lf.replace_head(m, v, 2.5), "num_labels"),
    "change_channels": (lambda m, v, f: lf.change_channels(m, v, True), "num_channels"),
    "make_inference_fn": (lambda m, v, f: lf.make_inference_fn(m, v, batch_size="8"), "batch_size"),
    "ImageClassifier": (lambda m, v, f: lf.ImageClassifier(m, v, {"size": 8}), "processor"),
    "from_torch": (lambda m, v, f: convert.from_torch(["a", "b"]), "source"),
    "to_torch": (lambda m, v, f: convert.to_torch(m, m), "variables"),
    "save_torch": (lambda m, v, f: convert.save_torch(None, m, v), "path"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types_raise(loaded, folder, name):
    call, argument = WRONG_TYPES[name]
    with pytest.raises(TypeError, match=rf"^{argument} has the wrong type: expected (a|an|None).*, found \S.*\.$"):
        call(*loaded, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["cat", "dog"]  # nothing was written


def test_types_are_checked_as_annotated():
    @_check_types
    def function(a: int | None, b: str | Path = "", *, c: bool = False, **others: object) -> tuple:
        return a, b, c, others

    assert function(np.int64(3), Path("x"), c=np.True_, d=1) == (3, Path("x"), True, {"d": 1})
    for arguments in ((True,), (2.0,), ("3",), (3, 4), (3, None)):
        with pytest.raises(TypeError, match="has the wrong type"):
            function(*arguments)
    with pytest.raises(TypeError, match="a has the wrong type: expected an int or None, found the str 'x'"):
        function("x")
    with pytest.raises(TypeError, match=r"function\(\) missing 1 required positional argument: 'a'"):
        function()


@pytest.mark.parametrize(
    ("images", "targets", "options", "message"),
    [
        ([BLACK], np.zeros(2, np.int32), {}, "1 images and 2 targets: expected a target for each"),
        ([BLACK] * 2, np.zeros(1, np.int32), {}, "2 images and 1 targets"),
        ([BLACK], np.zeros(1), {}, r"expected integers \[N\], found float64 \[1\]"),
        ([BLACK], np.zeros((1, 2), np.int32), {}, r"expected integers \[N\], found int32 \[1, 2\]"),
        ([BLACK], np.zeros(1, np.int32), {"problem_type": "regression"}, r"expected float \[N L\], found int32 \[1\]"),
    ],
)
def test_labeled_images_check_their_targets(images, targets, options, message):
    with pytest.raises(DataError, match=message):
        LabeledImages(images, targets, CLASSES, **options)


def test_evaluate_needs_one_class_per_image(classifier):
    data = LabeledImages([BLACK], np.zeros((1, 10), np.float32), problem_type="multi_label_classification")
    with pytest.raises(DataError, match=r"is for multi_label_classification: expected images with one class each"):
        evaluate(classifier, data)


@pytest.mark.parametrize("index", [2, -1, 0.5, "a"])
def test_images_that_are_not_there_raise(index):
    data = LabeledImages([BLACK, BLACK], np.zeros(2, np.int32), CLASSES)
    for function in (data.load, data.name, data.key, lambda i: data.select([0, i], "part")):
        with pytest.raises(IndexError, match=r"the data has no image .*: expected integers from 0 to 1"):
            function(index)


def test_images_are_not_selected_by_a_mask():
    data = LabeledImages(["a.jpg", "b.jpg"], np.zeros(2, np.int32), CLASSES)
    with pytest.raises(IndexError, match=r"has no image .*True"):
        data.select(np.array([True, False]), "part")
    assert len(data.select([], "part")) == 0


@pytest.mark.parametrize("files", [[], ["/elsewhere/1.png"]])
def test_logits_of_no_or_other_files_are_not_stored(classifier, folder, files):
    with pytest.raises(ValueError, match=r"expected the paths of one or more images in .*, found (none|/elsewhere)"):
        store_logits(folder / "t.npz", classifier, folder, files)


@pytest.mark.parametrize(
    ("rows", "found"),
    [([], "none"), ([{"epoch": 1}], "none"), ([{"epoch": 1, "train_loss": 2}, {"train_loss": 1}], "row 1 has")],
)
def test_incomplete_history_is_not_drawn(rows, found):
    with pytest.raises(ValueError, match=f"The history cannot be drawn: .*, found {found}"):
        visualize.draw_curves(rows)


def test_overlay_checks_the_shapes():
    with pytest.raises(ValueError, match=r"expected \[H W C\] and \[gh gw\], found \[8, 8\] and \[2, 2\]"):
        visualize.overlay(None, np.zeros((8, 8)), np.zeros((2, 2)), "title")


@pytest.mark.parametrize("query", [(1.0, 0.0), (0.5, -0.1), (0.5,)])
def test_queries_outside_the_image_raise(loaded, query):
    with pytest.raises(ValueError, match=r"query must be None or \(y, x\) with fractions in \[0, 1\)"):
        visualize.attention_maps(*loaded, np.zeros((1, 144, 144, 3), np.float32), query)


@pytest.mark.parametrize("options", [{"threads": 0}, {"processes": -1}])
def test_training_without_readers_raises(folder, tmp_path, options):
    with pytest.raises(ValueError, match=r"threads must be at least 1 and processes at least 0, found"):
        finetune(folder, tmp_path / "run", **options)
