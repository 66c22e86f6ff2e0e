"""Training on several devices and hosts equals training on one."""

import csv
import json
import socket

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

from training_runs import (
    PROGRAMS,
    STEPS,
    STEPS_PER_EPOCH,
    assert_same_run,
    checkpoint_steps,
    final_state,
    run,
    start,
    write_images,
)

pytestmark = pytest.mark.usefixtures("shared_steps")

PARAMETERS_LIMIT = 1e-8  # float64, after ten steps: sums over a batch are added in another order
LOSS_LIMIT = 1e-5  # float32, relative, for the same reason


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Data of five steps an epoch, and a part for validation that fills no batch."""
    directory = tmp_path_factory.mktemp("parts")
    write_images(directory / "train", [27, 27, 26])
    write_images(directory / "validation", [4, 3, 4], seed=1)
    return directory


# Everything that depends on how a batch is divided: mixed images, clipped gradients, augmentation by row.
FULL = {
    "epochs": 2,
    "batch_size": 16,
    "adaptive_clip": 0.02,
    "rand_augment": 1,
    "erase": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
}


def train_on(hosts, devices, compiled, folder, output, dtype, recipe, stop_at=-1):
    """Train in one process per host, with so many devices each; return the losses of all steps."""
    logs = output.with_name(f"{output.name} logs")
    logs.mkdir(exist_ok=True)
    arguments = [logs, free_address(), hosts, folder, output, dtype, stop_at, json.dumps(recipe)]
    process = start([PROGRAMS / "training_hosts.py", *arguments], compiled, devices)
    _, err = process.communicate()
    assert process.returncode == 0, [err, *(path.read_text() for path in logs.glob("*.err"))]
    losses = [(logs / f"{index}.out").read_text().rpartition("losses ")[2] for index in range(hosts)]
    assert len(set(losses)) == 1  # every host reports the loss of the whole batch
    return np.array(json.loads(losses[0]))


def rows_of(output):
    with (output / "metrics.csv").open() as file:
        return np.array([[float(value) for value in row.values()] for row in csv.DictReader(file)])


def largest_difference(output, expected):
    found, wanted = final_state(output), final_state(expected)
    paths = [path for path in wanted if path.startswith(("variables/", "average/"))]
    assert found.keys() == wanted.keys() and len(paths) > 80
    return max(np.abs(np.asarray(found[path], np.float64) - wanted[path]).max() for path in paths)


def test_two_hosts_train_as_one_and_stop_together(whole, folder, compiled, tmp_path):
    losses = train_on(2, 1, compiled, folder, tmp_path / "run", "float32", {}, stop_at=3)
    assert STEPS_PER_EPOCH <= len(losses) < STEPS and checkpoint_steps(tmp_path / "run")[-1] == len(losses)
    rows, wanted = rows_of(tmp_path / "run"), rows_of(whole[0])
    assert len(rows) == len(losses) // STEPS_PER_EPOCH
    np.testing.assert_allclose(rows, wanted[: len(rows)], rtol=LOSS_LIMIT)
    by_epoch = losses[: len(rows) * STEPS_PER_EPOCH].reshape(len(rows), STEPS_PER_EPOCH).mean(1)
    with (whole[0] / "metrics.csv").open() as file:
        expected = [float(row["train_loss"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(by_epoch, expected[: len(rows)], rtol=LOSS_LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["parquet", "records"])
def test_two_hosts_train_on_a_dataset_as_on_a_folder(folder, source, compiled, tmp_path, request):
    copy = request.getfixturevalue(source)
    wanted = train_on(2, 1, compiled, folder, tmp_path / "folder", "float32", {}, stop_at=3)
    losses = train_on(2, 1, compiled, copy, tmp_path / "copy", "float32", {}, stop_at=3)
    steps = min(len(wanted), len(losses))  # the signal arrives after step 3 or later
    assert steps >= 3
    np.testing.assert_array_equal(losses[:steps], wanted[:steps])


SPREAD = [(1, 8), (2, 4)]  # (hosts, devices of each)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spread", "dtype", "accumulation"),
    [
        ([(2, 1)], "float64", 2),
        *((SPREAD, dtype, accumulation) for dtype in ("float64", "float32") for accumulation in (1, 2)),
    ],
)
def test_devices_and_hosts_train_the_same(parts, compiled, tmp_path, spread, dtype, accumulation):
    recipe, wanted = {**FULL, "accumulation": accumulation}, tmp_path / "one"
    expected = train_on(1, 1, compiled, parts, wanted, dtype, recipe)
    assert len(expected) == 10 and len(set(expected)) == 10
    for hosts, devices in spread:
        output = tmp_path / f"{hosts} x {devices}"
        losses = train_on(hosts, devices, compiled, parts, output, dtype, recipe)
        furthest = np.abs(losses / expected - 1).max()
        difference = largest_difference(output, wanted)
        print(f"{hosts} x {devices}, {dtype}, {accumulation} parts: losses {furthest:.1e}, parameters {difference:.1e}")
        assert furthest < LOSS_LIMIT
        if dtype == "float64":
            assert difference < PARAMETERS_LIMIT
            np.testing.assert_allclose(rows_of(output), rows_of(wanted), rtol=1e-9)


@pytest.mark.slow
def test_stopped_hosts_resume_to_the_same_bits(parts, compiled, tmp_path):
    arguments = compiled, parts
    wanted = train_on(2, 1, *arguments, tmp_path / "whole", "float64", FULL)
    before = train_on(2, 1, *arguments, tmp_path / "stopped", "float64", FULL, stop_at=3)
    assert 3 <= len(before) < len(wanted) and checkpoint_steps(tmp_path / "stopped") == [len(before)]
    after = train_on(2, 1, *arguments, tmp_path / "stopped", "float64", FULL)
    np.testing.assert_array_equal([*before, *after], wanted)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_hosts_that_differ_refuse_to_begin(folder, toml, compiled, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "skip").write_text("ant/1.png\n")

    def messages(status, *hosts):
        rest = ["--recipe", toml, "--output", tmp_path / "run"]
        commands = json.dumps([["finetune", *map(str, [*arguments, *rest])] for arguments in hosts])
        process = start([PROGRAMS / "command_hosts.py", tmp_path, free_address(), commands], compiled)
        out, err = process.communicate()
        assert (process.returncode, json.loads(out)) == (0, [status] * 2), err
        return [(tmp_path / f"{index}.err").read_text() for index in range(2)]

    first, second = messages(1, [folder], [tmp_path / "empty"])
    assert "error: Host 1 cannot start training. See its output for the reason." in first
    assert f"error: {tmp_path}/empty has no folders" in second
    for said in messages(2, [folder], [folder, "--skip", tmp_path / "skip"]):
        assert "error: The hosts have different settings or see different images" in said


def test_process_count_without_coordinator_is_refused(folder, toml, tmp_path, capsys):
    arguments = ["finetune", folder, "--recipe", toml, "--output", tmp_path / "run"]
    status, _, err = run(capsys, *arguments, "--process-count", 2, "--process-id", 0)
    assert status == 1 and "expected --coordinator" in err and not (tmp_path / "run").exists()
