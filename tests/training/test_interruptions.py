"""Training runs that are killed, stopped by signals or out of disk resume to the same bits."""

import csv
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

from training_runs import (
    PROGRAMS,
    STEPS,
    assert_same_run,
    checkpoint_steps,
    final_state,
    run,
    start,
    tensorboard_scalars,
    tiny_recipe,
)

import levit_flax as lf
from levit_flax.training import finetune, loop
from levit_flax.training.data import _find_images, _training_batches, _TrainingRows

pytestmark = pytest.mark.usefixtures("shared_steps")

KILLS, SHORT_KILLS = 20, 1
LONG_EPOCHS = 24  # of the run that is killed twenty times


def processes_with(variable):
    """Return the processes that have a variable in their environment."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdecimal() and variable.encode() in Path("/proc", entry, "environ").read_bytes():
                found.append(int(entry))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("kills", "processes", "epochs"),
    [
        (SHORT_KILLS, 0, 6),
        pytest.param(KILLS, 0, LONG_EPOCHS, marks=pytest.mark.slow),
        pytest.param(4, 1, 6, marks=pytest.mark.slow),
    ],
)
def test_killed_run_resumes_to_the_same_bits(folder, whole, compiled, tmp_path, kills, processes, epochs):
    wanted = whole[0]
    if epochs != 6:
        wanted = tmp_path / "wanted"
        finetune(folder, wanted, recipe=tiny_recipe(epochs=epochs))
    program = [PROGRAMS / "killed_training.py", folder, tmp_path / "run", kills, processes, epochs]
    done = start(program, compiled, LEVIT_FLAX_TEST=str(tmp_path))
    out, err = done.communicate()
    print(out)
    assert done.returncode == 0, err
    assert_same_run(tmp_path / "run", wanted)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in wanted.iterdir()}
    assert max(checkpoint_steps(tmp_path / "run")) == 3 * epochs
    with (wanted / "metrics.csv").open() as file:
        assert len(tensorboard_scalars(tmp_path / "run")) == 6 * len(list(csv.DictReader(file)))
    assert processes_with(f"LEVIT_FLAX_TEST={tmp_path}") == []  # data processes end with the one that was killed


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_signals_save_the_state_and_exit(whole, folder, toml, tmp_path, capsys, monkeypatch, processes):
    """In the middle of an epoch, twice, through the command line."""
    step_of = {signal.SIGTERM: 4, signal.SIGINT: 11}
    arguments = ["finetune", folder, "--recipe", toml, "--output", tmp_path / "run", "--processes", processes]
    took = loop._Session.next_batch
    sent = None

    def next_batch(self):
        if sent and self.step == step_of[sent] - 1:
            os.kill(os.getpid(), sent)
        return took(self)

    monkeypatch.setattr(loop._Session, "next_batch", next_batch)
    handlers = {number: signal.getsignal(number) for number in step_of}
    for sent, step in step_of.items():
        status, out, err = run(capsys, *arguments, "--resume")
        assert status == 128 + sent and out == ""
        assert err.splitlines()[-1] == f"Stopped at step {step} of 18. The state is saved. Continue with --resume."
        assert "Traceback" not in err and max(checkpoint_steps(tmp_path / "run")) == step
        assert multiprocessing.active_children() == []
    sent = None
    assert run(capsys, *arguments, "--resume", "--json")[0] == 0
    assert_same_run(tmp_path / "run", whole[0])
    assert {number: signal.getsignal(number) for number in step_of} == handlers


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_batches_depend_on_the_step_alone(folder, slow):
    """The number of data processes may change when a run resumes."""
    train, _ = _find_images(folder, tiny_recipe(), ())
    rows = _TrainingRows(train, tiny_recipe(), lf.LevitImageProcessor(size=28, crop_size=32))
    expected = [batch["pixels"] for batch in _training_batches(rows, 2)]
    assert len(expected) == STEPS and expected[0].shape == (1, 8, 32, 32, 3)
    for first, processes in ((17, 0), (4, 0)) + ((5, 1), (0, 2)) * slow:
        batches = _training_batches(rows, 1, processes, first)
        found = [next(batches)["pixels"] for _ in expected[first : first + 3]]
        batches.close()
        np.testing.assert_array_equal(found, expected[first : first + 3])
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("limit", "at", "last"),
    [
        (20_000, 9, "The last complete checkpoint is that of step 6"),
        pytest.param(100, 3, "There is no checkpoint yet", marks=pytest.mark.slow),
        pytest.param(20_000, 18, "The last complete checkpoint is that of step 15", marks=pytest.mark.slow),
    ],
)
def test_full_disk_raises_and_keeps_the_last_checkpoint(
    whole, folder, toml, tmp_path, capsys, monkeypatch, limit, at, last
):
    output = tmp_path / "run"
    save, (soft, hard) = loop._Session.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(self):
        if self.step == at:
            self.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        save(self)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop._Session, "save", save_on_a_full_disk)
            status, out, err = run(capsys, "finetune", folder, "--recipe", toml, "--output", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = [line for line in err.splitlines() if not line.startswith("epoch ")]
    assert (status, out) == (1, "")
    assert said == [
        f"error: Cannot save in {output}: File too large. {last}. Free some space and continue with --resume."
    ]
    if at > 3:
        assert max(checkpoint_steps(output)) == at - 3
        assert all(np.isfinite(leaf).all() for leaf in final_state(output).values())
        lf.ImageClassifier.from_pretrained(output / "model")
    finetune(folder, output, recipe=tiny_recipe(), resume=True)
    assert_same_run(output, whole[0])
    assert not list((output / "checkpoints").glob("*tmp*"))
