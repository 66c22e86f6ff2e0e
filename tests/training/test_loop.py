"""A training run: what it leaves, images that cannot be decoded, losses that are not finite, and what it refuses."""

import csv
import json
import os
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

from training_runs import (
    CLASSES,
    STEPS,
    STEPS_PER_EPOCH,
    VALUES,
    assert_same_run,
    checkpoint_steps,
    run,
    tensorboard_scalars,
    tiny_recipe,
    truncate,
)

import levit_flax as lf
from configs import TINY, random_variables
from levit_flax import evaluation
from levit_flax.training import DataError, LabeledImages, NotFiniteError, RecipeError, finetune, loop, plan
from levit_flax.training.checkpoints import _Checkpoints
from levit_flax.training.data import _find_images, _leave_out
from levit_flax.training.outputs import _best_row, _write_best
from levit_flax.training.recipe import _make_recipe

pytestmark = pytest.mark.usefixtures("shared_steps")


def test_finished_run_has_every_output(whole):
    output, report = whole
    names = {"checkpoints", "curves.png", "metrics.csv", "model", "report.json", "run.json", "tensorboard"}
    assert {path.name for path in output.iterdir()} == names
    with (output / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == list(range(STEPS_PER_EPOCH, STEPS + 1, STEPS_PER_EPOCH))
    assert rows[-1] == report["last"] and report["best"] in rows
    assert report["best"]["validation_accuracy"] == max(row["validation_accuracy"] for row in rows)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    stored = json.loads((output / "report.json").read_text())
    assert stored["last"] == report["last"] and stored["recipe"]["epochs"] == 6 and stored["data"]["classes"] == 3
    assert stored["devices"] == 1 and 0 <= stored["share_waiting_for_data"] < 1 and stored["images_per_second"] > 0
    assert max(checkpoint_steps(output)) == STEPS and len(checkpoint_steps(output)) <= 2  # the last and the best


def test_best_model_reproduces_its_metrics(whole, folder):
    """Evaluation in padded batches on the device equals `levit-flax evaluate`."""
    output, report = whole
    assert sorted(os.listdir(output / "model")) == [
        "README.md",
        "config.json",
        "flax_model.safetensors",
        "metrics.json",
        "preprocessor_config.json",
    ]
    assert json.loads((output / "model" / "metrics.json").read_text()) == report["best"]
    card = (output / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: levit-flax\n") and "ant, bee, cat" in card and "batch_size = 8" in card
    assert f"| validation loss | {report['best']['validation_loss']:.4g} |" in card
    classifier = lf.ImageClassifier.from_pretrained(output / "model")
    assert classifier.model.config.id2label == CLASSES
    _, held_back = _find_images(folder, tiny_recipe(), ())
    result = evaluation.evaluate(classifier, LabeledImages(held_back.images, held_back.targets))
    assert result.images == len(held_back) == 3
    assert result.top1 == report["best"]["validation_accuracy"]
    assert result.loss == pytest.approx(report["best"]["validation_loss"], rel=1e-5)
    provenance = json.loads((output / "model" / "config.json").read_text())["levit_flax"]["provenance"]
    assert provenance["training"]["data"]["training_images"] == 27


def test_tensorboard_shows_the_metrics(whole):
    output, _ = whole
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = tensorboard_scalars(output)
    assert len(shown) == 6 * len(rows)
    for row in rows:
        for name in row.keys() - {"step"}:
            assert shown[int(row["step"]), name] == pytest.approx(float(row[name]), rel=1e-6)


def test_finished_run_resumes_to_the_same_report(whole, folder, tmp_path):
    output, report = whole
    shutil.copytree(output, tmp_path / "run")
    again = finetune(folder, tmp_path / "run", recipe=tiny_recipe(), resume=True)
    assert (again["best"], again["last"]) == (report["best"], report["last"])
    assert_same_run(tmp_path / "run", output)


def test_undecodable_image_stops_the_run_and_can_be_skipped(folder, toml, tmp_path, capsys):
    """The error names the image, the state is saved, and the run resumes with --skip or with the image repaired."""
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, data)
    train, held_back = _find_images(data, tiny_recipe(), ())
    broken, broken_back = train.images[10], held_back.images[1]
    mended = {path: truncate(path) for path in (broken, broken_back)}
    arguments = ["finetune", data, "--recipe", toml, "--output", output]

    status, out, err = run(capsys, *arguments, "--check-data")
    assert (status, out) == (1, "") and f"1 of the 27 images of {data}, for training cannot be used" in err
    assert str(broken) in err and "Repair, remove or skip them (--skip)." in err and checkpoint_steps(output) == []

    status, out, err = run(capsys, *arguments)
    sentence = err.splitlines()[-1]
    assert (status, out) == (1, "") and sentence.startswith(f"error: {broken} cannot be used: ")
    [step] = checkpoint_steps(output)
    assert f"The state after step {step} of 18 is saved. Repair the image or skip it (--skip)" in sentence
    assert 0 <= step < STEPS_PER_EPOCH and "Traceback" not in err

    # A validation image is read at the end of the epoch.
    (tmp_path / "skip.txt").write_text(f"{broken.relative_to(data)}\n\n")
    status, out, err = run(capsys, *arguments, "--resume", "--skip", tmp_path / "skip.txt")
    assert status == 1 and f"error: {broken_back} cannot be used: " in err and "The state after step 3 of 18" in err

    broken_back.write_bytes(mended[broken_back])
    status, out, err = run(capsys, *arguments, "--resume", "--skip", tmp_path / "skip.txt", "--json")
    assert status == 0
    with (output / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(3, 19, 3))  # the postponed evaluation ran first
    assert json.loads(out)["last"]["step"] == STEPS


@pytest.mark.slow
def test_repaired_images_leave_no_trace(whole, folder, tmp_path):
    """Stopped by images of both parts and resumed once they are repaired, a run ends with the same bits."""
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, data)
    train, held_back = _find_images(data, tiny_recipe(), ())
    mended = {path: truncate(path) for path in (train.images[20], held_back.images[0])}
    for path, content in mended.items():
        with pytest.raises(DataError, match=f"{path.name} cannot be used: .* is saved"):
            finetune(data, output, recipe=tiny_recipe(), resume=True)
        path.write_bytes(content)
    finetune(data, output, recipe=tiny_recipe(), resume=True)
    assert_same_run(output, whole[0])


def test_skipping_images_later_keeps_the_other_rows(folder):
    recipe = tiny_recipe()
    train, held_back = _find_images(folder, recipe, ())
    gone, gone_back = train.images[3], held_back.images[2]
    skip = {path.relative_to(folder).as_posix() for path in (gone, gone_back)}
    later, later_back = _leave_out(train, held_back, folder, skip)
    [changed] = [i for i in range(27) if later.images[i] != train.images[i]]
    assert changed == 3 and later.images[3].parent == gone.parent and later.images[3] != gone
    np.testing.assert_array_equal(later.targets, train.targets)
    assert later_back.images == held_back.images[:2] and later_back.targets.tolist() == [0, 1]
    everything = {path.relative_to(folder).as_posix() for path in train.images if path.parent.name == "bee"}
    with pytest.raises(DataError, match=r"would have no image of the class bee left\. Skip fewer"):
        _leave_out(train, held_back, folder, everything)
    with pytest.raises(DataError, match="for validation would have no image left"):
        _leave_out(train, held_back, folder, {path.relative_to(folder).as_posix() for path in held_back.images})


def test_infinite_loss_stops_the_run_at_the_last_save(whole, folder, tmp_path, monkeypatch):
    output = tmp_path / "run"

    def interrupt(step):
        if step.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(folder, output, recipe=tiny_recipe(), show=interrupt)
    before = {name: (output / "model" / name).read_bytes() for name in os.listdir(output / "model")}
    restore = loop._Session.restore

    def restore_nonsense(self):
        restore(self)
        variables = self.state.variables
        params = jax.tree.map(lambda x: x * np.float32("inf"), variables["params"])
        self.state = self.state.replace(variables={**variables, "params": params})

    monkeypatch.setattr(loop._Session, "restore", restore_nonsense)
    with pytest.raises(NotFiniteError, match=r"Step 7 of 18 \(epoch 3\) has the loss (nan|inf)") as caught:
        finetune(folder, output, recipe=tiny_recipe(), resume=True)
    assert "at the learning rate 0.00" in str(
        caught.value
    ) and ": expected finite numbers. The step was not applied. Lower" in str(caught.value)
    assert max(checkpoint_steps(output)) == 6
    assert {name: (output / "model" / name).read_bytes() for name in os.listdir(output / "model")} == before
    monkeypatch.setattr(loop._Session, "restore", restore)
    finetune(folder, output, recipe=tiny_recipe(), resume=True)
    assert_same_run(output, whole[0])


@pytest.mark.slow
def test_huge_learning_rate_raises_before_anything_is_saved(folder, toml, tmp_path, capsys):
    arguments = ["finetune", folder, "--recipe", toml, "--output", tmp_path / "run", "--set", "learning_rate=1e30"]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "") and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: Step ") and "Lower learning_rate" in err
    assert checkpoint_steps(tmp_path / "run") == [] and not (tmp_path / "run" / "model").exists()


def test_overwriting_the_starting_model_is_refused(whole, folder, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"run/model is inside .*run, which overwrite=True would empty"):
        finetune(folder, tmp_path / "run", recipe=tiny_recipe(), model=tmp_path / "run" / "model", overwrite=True)
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_resuming_with_another_revision_is_refused(whole, folder):
    with pytest.raises(RecipeError, match=r"started with other settings: revision .was None, is 'other'."):
        finetune(folder, whole[0], recipe=tiny_recipe(), resume=True, revision="other")


def test_out_of_memory_suggests_a_smaller_batch(folder, tmp_path, monkeypatch):
    def train(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")

    monkeypatch.setattr(loop._Session, "run", train)
    with pytest.raises(RecipeError, match=r"not have enough memory for batches of 8 images in 1 parts\. Lower"):
        finetune(folder, tmp_path / "run", recipe=tiny_recipe())


def test_batch_of_one_needs_frozen_batch_norm(folder):
    images = _find_images(folder, tiny_recipe(), ())[0]
    plan._check_batch(tiny_recipe(batch_size=1, batch_norm="freeze"), images)
    with pytest.raises(RecipeError, match="of at least 2, or batch_norm"):
        plan._check_batch(tiny_recipe(batch_size=1, batch_norm="freeze_with_parameters"), images)


def test_equal_accuracies_are_ranked_by_the_loss():
    rows = [
        {"step": step, "validation_accuracy": accuracy, "validation_loss": loss}
        for step, accuracy, loss in ((1, 0.5, 0.1), (2, 0.9, 0.4), (3, 0.9, 0.3), (4, 0.9, 0.35))
    ]
    assert _best_row(rows)["step"] == 3
    assert _best_row([{"step": 1, "validation_loss": 0.4}, {"step": 2, "validation_loss": 0.2}])["step"] == 2


def test_best_checkpoint_survives_a_restart(tmp_path):
    state = {"weights": np.ones(2)}
    for steps in ((1, 2), (3,), (4,)):
        checkpoints = _Checkpoints(tmp_path / "checkpoints")
        for step in steps:
            checkpoints.save(step, state, {}, best_step=1)
        checkpoints.close()
    assert checkpoint_steps(tmp_path) == [1, 4]
    checkpoints = _Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, state, {}, best_step=5)
    checkpoints.close()
    assert checkpoint_steps(tmp_path) == [5]


def test_damaged_checkpoint_raises(whole, folder, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "run")
    restore = _Checkpoints.restore

    def restore_damaged(self, example):
        restored = restore(self, example)
        broken = jax.tree.map(lambda leaf: leaf * np.nan if leaf.dtype == np.float32 else leaf, restored.state)
        return restored._replace(state=broken)

    monkeypatch.setattr(_Checkpoints, "restore", restore_damaged)
    with pytest.raises(ValueError, match=r"The checkpoint of step 18 in .*run is damaged: .*expected finite values"):
        finetune(folder, tmp_path / "run", recipe=tiny_recipe(), resume=True)


def test_gray_model_is_trained_and_evaluated_from_files(folder, tmp_path):
    model = lf.LevitForImageClassification(lf.LevitConfig(**{**TINY, "image_size": 32, "num_channels": 1}))
    lf.save_pretrained(tmp_path / "gray", model, random_variables(model))
    values = {name: value for name, value in VALUES.items() if name != "architecture"}
    recipe = _make_recipe({**values, "epochs": 2}, "The gray recipe")
    with pytest.warns(UserWarning, match="newly initialized"):
        report = finetune(folder, tmp_path / "run", model=tmp_path / "gray", recipe=recipe)
    assert np.isfinite(report["last"]["train_loss"])
    trained = lf.ImageClassifier.from_pretrained(tmp_path / "run" / "model", fast_start=True)
    assert trained.model.config.num_channels == 1 and len(trained.processor.image_mean) == 1
    data = evaluation.read_data(folder, trained.model.config.id2label)
    assert evaluation.evaluate(trained, data).images == len(data)


def test_class_names_that_are_not_text_are_escaped(folder, tmp_path):
    strange = os.fsdecode(b"caf\xe9 $x_$")
    row = {"epoch": 1, "step": 1, "validation_loss": 0.5}
    model = lf.LevitForImageClassification(lf.LevitConfig(**TINY).replace(id2label=("a", strange)))
    _write_best(tmp_path, model, random_variables(model), lf.LevitImageProcessor(), row, {"recipe": {}})
    assert lf.from_pretrained(tmp_path / "model")[0].config.id2label[1] == strange
    assert "caf\\udce9" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [{"image_size": 100_000}, {"image_size": 0}])
def test_recipe_with_absurd_sizes_raises_before_training(folder, tmp_path, change):
    with pytest.raises(ValueError, match="image_size"):
        finetune(folder, tmp_path / "run", recipe=tiny_recipe(**change))
    assert not (tmp_path / "run" / "run.json").exists()
