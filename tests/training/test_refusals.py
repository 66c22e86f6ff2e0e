"""Exports of a run, and the errors for data, recipes, teachers and outputs that cannot be used."""

import json
import os
import re
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

from training_runs import (
    ARCHITECTURE,
    CLASSES,
    DISTILLED,
    ONE_STEP,
    save_model,
    truncate,
    write_images,
    write_recipe,
)

import levit_flax as lf
from levit_flax.cli import main

pytestmark = pytest.mark.usefixtures("compiled")

ONE_HEAD, TWO_HEADS = lf.LevitForImageClassification, lf.LevitForImageClassificationWithTeacher


# Exports


@pytest.fixture(scope="module")
def exported(two_heads, stored, folder, tmp_path_factory):
    """The directory of a run with two heads, and the arguments that started it."""
    directory = tmp_path_factory.mktemp("exported")
    toml = write_recipe(directory / "tiny.toml", **DISTILLED)
    arguments = ["finetune", folder, "--recipe", toml, "--model", two_heads, "--teacher", stored]
    arguments = [*map(str, arguments), "--set", "distillation=hard", "--output"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        assert main([*arguments, str(directory / "run"), "--export-torch", "hf"]) == 0
    return directory / "run", arguments


@pytest.mark.parametrize("size", [pytest.param(40, marks=pytest.mark.slow), [32, 48]])
def test_unsupported_export_is_refused_before_training(folder, tmp_path, capsys, size):
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


# Data and recipes


def refused(capsys, output, *arguments):
    """Assert that the command fails without changing the output; return its one line of error."""
    before = contents(output)
    capsys.readouterr()
    status = main([*map(str, arguments), "--output", str(output)])
    out, err = capsys.readouterr()
    assert status in (1, 2) and out == "", (status, out)
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert contents(output) == before
    return err.removeprefix("error: ").strip()


def contents(output):
    """Return the content of a file, or of every file under a directory."""
    if output.is_file():
        return output.read_bytes()
    return {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()} if output.is_dir() else {}


@pytest.fixture(scope="module")
def arguments(one_head, tmp_path_factory):
    """Valid arguments of a command, without the data."""
    toml = write_recipe(tmp_path_factory.mktemp("recipe") / "quick.toml", **ONE_STEP)
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
    "one class": (images_of(10), "{data} has a single class, 'ant': expected two or more."),
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
def test_unusable_data_is_refused(capsys, arguments, tmp_path, name):
    prepare, sentence = BAD_DATA[name]
    data = tmp_path / "data"
    prepare(data)
    said = refused(capsys, tmp_path / "run", "finetune", data, *arguments)
    assert said.startswith(sentence.format(data=data)), said
    assert said.endswith(".") and said.count(". ") <= 1


def test_unusable_images_are_named(capsys, arguments, tmp_path):
    """Headers are always checked, pixels only with --check-data."""
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
    "epochs": "expected KEY=VALUE, such as epochs=10, found 'epochs'",
    'learning_rates={"head/.*"=1.0}': r"learning_rates does not cover .*: expected a pattern for every parameter\.",
    'learning_rates={".*"=1.0,"head/.*"=2.0}': r"learning_rates: 'head/\.\*' matches no parameter, or only those of",
    'learning_rates={"("=1.0}': r"learning_rates: '\(' is not a valid regular expression",
    "validation_share=0.0": "has no validation part and validation_share is 0. Add a validation part",
    "image_size=-3": "image_size is -3: expected a non-negative number",
    "distillation=hard": r"distillation is 'hard' and there is no teacher: expected a teacher \(--teacher\)",
}


@pytest.mark.parametrize("change", BAD_RECIPES)
def test_unusable_recipes_are_refused(capsys, arguments, folder, tmp_path, change):
    settings = [part for setting in change.split("; ") for part in ("--set", setting)]
    said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments, *settings)
    assert re.search(BAD_RECIPES[change], said) and said.endswith((".", "?")), said


def test_unreadable_recipes_are_refused(capsys, folder, tmp_path):
    (tmp_path / "broken.toml").write_text("epochs = = 3\n")
    output = tmp_path / "run"
    said = refused(capsys, output, "finetune", folder, "--recipe", tmp_path / "broken.toml")
    assert said.startswith(f"The recipe {tmp_path}/broken.toml is not valid TOML: ") and "line 1" in said
    said = refused(capsys, output, "finetune", folder, "--recipe", "finetone")
    assert said == (
        "There is no recipe finetone: expected finetune, paper, small_images, small_images_finish, or the path of a"
        " TOML file. Did you mean finetune?"
    )
    said = refused(capsys, output, "finetune", folder, "--set", "batch_size=8")
    assert said.startswith(
        "There is no model to train: expected a checkpoint (--model), or a recipe with an architecture."
    )
    said = refused(capsys, output, "finetune", folder, "--set", "batch_size=8", "--set", "architecture=levit-1")
    assert said.startswith("architecture is 'levit-1': expected one of levit-128S, ")
    changes = ("--set", "batch_size=8", "--set", "architecture={hidden_sizes=[8]}")
    assert refused(capsys, output, "finetune", folder, *changes).startswith("architecture: ")


def test_missing_skip_list_is_refused(capsys, arguments, folder, tmp_path):
    path = tmp_path / "nowhere.txt"
    said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments, "--skip", path)
    assert "No such file" in said and str(path) in said


# Teachers that do not fit


def test_teacher_with_other_classes_is_refused(capsys, arguments, folder, tmp_path):
    other = save_model(tmp_path / "teacher", num_labels=4, id2label=("ant", "bee", "dog", "elk"))
    distills = ("--set", "distillation=soft")
    arguments = [*arguments[:3], save_model(tmp_path / "student", TWO_HEADS.__name__)]
    said = refused(capsys, tmp_path / "run", "finetune", folder, *arguments, *distills, "--teacher", other)
    assert said == (
        f"The classes of the teacher {other} do not match: expected names of the 4 known classes, found 1 of 3 that are"
        " not, such as cat. Rename them, or leave them out."
    )


def test_teacher_without_distillation_is_refused(capsys, arguments, folder, teacher, tmp_path):
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
        r"do not match: expected names of the 2 known classes, found 1 of 3 that are not, such as bee\.",
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
def test_stored_logits_that_do_not_fit_are_refused(capsys, arguments, folder, two_heads, stored, tmp_path, name):
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


# Outputs


def test_file_as_output_is_refused(capsys, arguments, folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    said = refused(capsys, tmp_path / "file", "finetune", folder, *arguments)
    assert said == f"{tmp_path}/file is a file: expected a directory, or a path that does not exist."
    said = refused(capsys, tmp_path / "file" / "deeper", "finetune", folder, *arguments)
    assert said.startswith(f"Cannot write {tmp_path}/file/deeper: ") and said.endswith("with enough space.")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_output_with_other_files_is_refused(capsys, arguments, folder, tmp_path):
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


def test_output_of_another_run_is_refused(capsys, exported, folder, one_head, tmp_path):
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
