"""Evaluation: counted by hand, by every crop rule, and on the test images of the embedded model's card."""

import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

import levit_flax as lf
from configs import SMALL, random_variables
from levit_flax import convert
from levit_flax.cli import main
from levit_flax.datasets import DataError, LabeledImages, _match_classes
from levit_flax.evaluation import evaluate, evaluation_processor, read_data
from levit_flax.hub import _EMBEDDED_DIRECTORY

CIFAR = os.environ.get("LEVIT_FLAX_CIFAR10")  # a directory with train/ and test/, a folder for each class in each
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")


@pytest.fixture(scope="module")
def classifier():
    config = lf.LevitConfig(**{**SMALL, "depths": (1, 1, 1), "num_labels": 7, "id2label": CLASSES})
    model = lf.LevitForImageClassification(config, precision="highest")
    return lf.ImageClassifier(model, random_variables(model), batch_size=4)


@pytest.fixture
def folder(tmp_path):
    """Three images of each class, one of them broken."""
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "cat" / "1.png").write_bytes(b"no image")
    (tmp_path / "data" / "notes.txt").write_text("not looked at")
    return tmp_path / "data"


def test_metrics_equal_a_count_by_hand(classifier, folder):
    data = read_data(folder, CLASSES)
    assert data.targets.tolist() == [i for i in range(7) for _ in range(3)]
    result = evaluate(classifier, data)
    assert result.images == 20 and len(result.broken) == 1 and "1.png" in result.broken[0]
    pairs = [(p, i) for p, i in zip(data.images, data.targets, strict=True) if "no image" not in p.read_text("latin1")]
    pixels = classifier.processor([path for path, _ in pairs], return_tensors="np")["pixel_values"]
    logits = np.asarray(jax.jit(classifier.model.apply)(classifier.variables, pixels).logits)
    labels = np.array([label for _, label in pairs])
    assert result.top1 == (logits.argmax(-1) == labels).mean()
    ranks = (logits > logits[np.arange(20), labels][:, None]).sum(-1)
    assert result.top5 == (ranks < 5).mean()
    loss = -jax.nn.log_softmax(logits)[np.arange(20), labels].mean()
    assert result.loss == pytest.approx(float(loss), rel=1e-5)
    expected = np.zeros((7, 7), int)
    np.add.at(expected, (labels, logits.argmax(-1)), 1)
    np.testing.assert_array_equal(result.confusion, expected)
    rows = result.confusion_csv().splitlines()
    assert rows[0] == r"true \ predicted,ant,bee,cat,dog,elk,fox,gnu" and rows[3].startswith("cat,") and len(rows) == 8


@pytest.mark.skipif(CIFAR is None, reason="needs CIFAR-10 as JPEG files: LEVIT_FLAX_CIFAR10 is not set")
def test_embedded_model_reaches_the_accuracy_of_its_card(capsys):
    assert main(["evaluate", f"{CIFAR}/test", "--model", "cifar10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    card = json.loads((_EMBEDDED_DIRECTORY / "metrics.json").read_text())
    assert (found["images"], found["top1"]) == (card["images"], card["top1"])


def test_classes_are_matched_by_name_and_by_order_only_if_no_name_matches():
    labels = ["ant", "bee", "cat"]
    assert _match_classes(["cat", "ant"], labels, "here") == [2, 0]
    with pytest.warns(UserWarning, match="No class name of here .* 3 classes are matched by position, n01 as ant"):
        assert _match_classes(["n01", "n02", "n03"], labels, "here") == [0, 1, 2]
    with pytest.raises(DataError, match=r"of here do not match: .* found 1 of 3 that are not, such as Cat\. Rename"):
        _match_classes(["ant", "bee", "Cat"], labels, "here")
    with pytest.raises(DataError, match=r"its 3 classes in order, found 2 other names, such as 'gnu'"):
        _match_classes(["gnu", "yak"], labels, "here")


def test_names_of_two_classes_are_ambiguous_and_wordnet_ids_are_not():
    labels = lf.VARIANTS["levit-128S"].id2label
    first, second = (i for i, label in enumerate(labels) if label == "crane")
    assert _match_classes(["n02012849", "n03126707"], labels, "here") == [first, second]
    assert _match_classes(labels, labels, "here") == list(range(1000))
    with pytest.raises(DataError, match=f"of here are ambiguous: .* crane, which classes {first} and {second} have"):
        _match_classes(["crane"], labels, "here")


def test_wordnet_ids_match_the_names_of_a_model_of_some_classes():
    labels = ["goldfish, Carassius auratus", "n02012849", "tench, Tinca tinca"]
    assert _match_classes(["n01440764", "n02012849"], labels, "here") == [2, 1]
    with pytest.raises(DataError, match=r"of here do not match: .* found 1 of 2 that are not, such as stingray\."):
        _match_classes(["n01440764", "n01498041"], labels, "here")


@pytest.mark.parametrize("target", [-1, 7, -100])
def test_targets_that_are_no_class_indices_raise(classifier, target):
    images = [np.zeros((32, 32, 3), np.uint8)] * 2
    with pytest.raises(DataError, match=rf"^1 of 2 targets of the data .* \[0, 7\), found {target} for image 1"):
        evaluate(classifier, LabeledImages(images, np.array([0, target])))


def test_dataset_is_loaded_by_name(classifier, monkeypatch, folder):
    """With a stand-in for the datasets package that records its calls."""
    import sys
    import types

    class ImageFeature:
        def __init__(self, decode=True): ...

    class ClassLabel:
        names = list(reversed(CLASSES))

    images = [{"bytes": None, "path": str(folder / CLASSES[i] / "0.png")} for i in range(7)]
    rows = [{"img": image, "label": 6 - i} for i, image in enumerate(images)]

    class Dataset(list):
        features = {"id": object(), "img": ImageFeature(), "label": ClassLabel()}

        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

        def cast_column(self, column, feature):
            assert column == "img" and isinstance(feature, ImageFeature)
            return self

    asked = []
    stand_in = types.SimpleNamespace(
        Image=ImageFeature, ClassLabel=ClassLabel, load_dataset=lambda *a, **k: asked.append((a, k)) or Dataset(rows)
    )
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    data = read_data("zoo/animals", CLASSES, split="validation")
    assert asked == [(("zoo/animals",), {"split": "validation"})] and data.targets.tolist() == list(range(7))
    assert evaluate(classifier, data).images == 7
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"directory zoo/animals does not exist.*pip install 'levit-flax\[datasets\]'"
    ):
        read_data("zoo/animals", CLASSES)


@pytest.mark.parametrize(("height", "width"), [(300, 401), (333, 500), (480, 643), (224, 225)])
@pytest.mark.parametrize("rule", ["torchvision", "timm"])
def test_crop_rules_are_those_of_the_sources(rule, height, width):
    transforms = pytest.importorskip("torchvision.transforms")
    pytest.importorskip("timm")
    from timm.data import create_transform

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))
    if rule == "timm":
        transform = create_transform(input_size=(3, 224, 224), interpolation="bicubic", crop_pct=0.9)
    else:
        transform = transforms.Compose(  # as in the original repository's datasets.py
            [
                transforms.Resize(int(256 / 224 * 224), interpolation=3),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
    processor = evaluation_processor(rule, lf.LevitImageProcessor())
    ours = processor(image, return_tensors="np", data_format="channels_first")["pixel_values"][0]
    np.testing.assert_allclose(ours, transform(image).numpy(), atol=1e-5)


def test_crop_rules_set_size_and_offset():
    own = lf.LevitImageProcessor(size=70, crop_size=80, image_mean=0.5)
    assert evaluation_processor("model", own) is own
    assert vars(evaluation_processor("hf", own)) == vars(lf.LevitImageProcessor(size=80, crop_size=80, image_mean=0.5))
    margins = (1, 3, 33, 35)  # pixels around the crop, of which half are to go on the left
    for rule, offsets in {"hf": [0, 1, 16, 17], "torchvision": [0, 2, 16, 18], "timm": [0, 2, 16, 18]}.items():
        assert [evaluation_processor(rule, own).crop_offset(margin) for margin in margins] == offsets
    with pytest.raises(
        ValueError, match="Unknown crop rule: expected one of model, hf, torchvision, timm, found 'square'"
    ):
        evaluation_processor("square", own)


def test_evaluate_command_writes_its_results(capsys, classifier, folder, tmp_path):
    pytest.importorskip("matplotlib")
    lf.save_pretrained(tmp_path / "model", classifier.model, classifier.variables)
    arguments = [
        "evaluate",
        str(folder),
        "-m",
        str(tmp_path / "model"),
        "--crop",
        "timm",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 1  # because of the broken image
    out, err = capsys.readouterr()
    assert "top1" in out and err.startswith("error: ") and "1.png" in err and len(err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["confusion.csv", "confusion.png", "metrics.json"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == 20
    assert (tmp_path / "out" / "confusion.csv").read_text().startswith("true \\ predicted,ant,bee")
    with Image.open(tmp_path / "out" / "confusion.png") as image:
        assert image.format == "PNG"


def test_unwritable_output_fails_before_the_evaluation(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/deeper"):
        # Neither data nor model are there, which would be said first if they were looked for.
        arguments = ["evaluate", str(tmp_path / "data"), "-m", str(tmp_path / "model"), "--output"]
        assert main([*arguments, str(tmp_path / output)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"error: Cannot write {tmp_path / output}: ") and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_images_follow_the_image_size(capsys, classifier, folder, tmp_path):
    """Also for PyTorch weights whose own processor crops to 64 pixels."""
    config = lf.LevitConfig(**{**SMALL, "depths": (1, 1, 1), "num_labels": 7, "id2label": CLASSES})
    model = lf.LevitForImageClassification(config)
    directory = tmp_path / "torch"
    directory.mkdir()
    convert.save_torch(directory / "model.safetensors", model, random_variables(model))
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    lf.LevitImageProcessor(size=70, crop_size=64).save_pretrained(directory)
    (folder / "cat" / "1.png").unlink()
    assert main(["evaluate", str(folder), "-m", str(directory), "--image-size", "48x32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    resized = lf.resize_image(model, random_variables(model), (48, 32))
    processor = lf.LevitImageProcessor(size=round(70 * 48 / 64), crop_size=(48, 32))
    wanted = evaluate(lf.ImageClassifier(*resized, processor), read_data(folder, CLASSES))
    assert found["images"] == 20 and found["loss"] == pytest.approx(wanted.loss, rel=1e-5)


def test_empty_data_raises(capsys, classifier, tmp_path):
    with pytest.raises(ValueError, match="no images to evaluate: the data is empty"):
        evaluate(classifier, LabeledImages([], np.zeros(0, np.int32)))
    with pytest.raises(ValueError, match="has no folders: expected one folder of images per class"):
        read_data(tmp_path, CLASSES)
    (tmp_path / "ant").mkdir()
    with pytest.raises(ValueError, match="contains no images: expected at least one"):
        read_data(tmp_path, CLASSES)
