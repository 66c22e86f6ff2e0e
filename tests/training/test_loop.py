"""The training loop: killed, stopped, out of disk and spread over devices, and what it leaves behind."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
ocp = pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

import training_runs  # noqa: E402
from training_runs import (  # noqa: E402
    CLASSES,
    STEPS,
    STEPS_PER_EPOCH,
    assert_same_run,
    checkpoint_steps,
    final_state,
    start,
    tiny_recipe,
    truncate,
    write_images,
    write_recipe,
)

import levit_flax as lf  # noqa: E402
from levit_flax import evaluation  # noqa: E402
from levit_flax.cli import main  # noqa: E402
from levit_flax.training import (  # noqa: E402
    DataError,
    LabeledImages,
    NotFiniteError,
    RecipeError,
    finetune,
    loop,
    outputs,
    plan,
)
from levit_flax.training.data import TrainingRows, find_images, leave_out, training_batches  # noqa: E402

compiled, standard_promotion = training_runs.compiled, training_runs.standard_promotion

KILLS, SHORT_KILLS = 20, 4
TESTS = str(Path(__file__).parents[1])  # for what the tests share
LONG_EPOCHS = 24  # of the run that is killed twenty times


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.toml")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing disturbed, and its report."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, finetune(folder, output, recipe=tiny_recipe())


@pytest.fixture(scope="module", autouse=True)
def _shared_steps(compiled):
    """Have equal trainings of this process share what is traced and compiled for them, and draw no curves.

    That is most of their time.
    """
    make_student, sessions, students = plan.make_student, {}, {}

    class Figure:
        def savefig(self, file, format):
            file.write_bytes(b"")

    class Session(loop.Session):
        def __init__(self, plan, show):
            super().__init__(plan, show)
            key = f"{plan.recipe} {plan.student.model} {self.rows.steps_per_epoch}"
            self.train_step, self.evaluate_step = sessions.setdefault(key, (self.train_step, self.evaluate_step))

    def make_student_once(source, recipe, train, options):
        key = f"{source} {recipe} {train.labels}"
        if key not in students:
            students[key] = make_student(source, recipe, train, options)
        return students[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Session", Session)
        patch.setattr(plan, "make_student", make_student_once)
        patch.setattr(outputs, "draw_curves", lambda history: Figure())
        yield


def run(capsys, *arguments):
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_what_a_run_leaves(whole, folder):
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


def test_the_best_model_is_what_was_measured(whole, folder):
    """Evaluation in batches with filling, on the device, counts what `levit-flax evaluate` counts."""
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
    assert f"| validation loss | {report['best']['validation_loss']:.6g} |" in card
    classifier = lf.ImageClassifier.from_pretrained(output / "model")
    assert classifier.model.config.id2label == CLASSES
    _, held_back = find_images(folder, tiny_recipe(), ())
    result = evaluation.evaluate(classifier, LabeledImages(held_back.images, held_back.targets))
    assert result.images == len(held_back) == 3
    assert result.top1 == report["best"]["validation_accuracy"]
    assert result.loss == pytest.approx(report["best"]["validation_loss"], rel=1e-5)
    provenance = json.loads((output / "model" / "config.json").read_text())["levit_flax"]["provenance"]
    assert provenance["training"]["data"]["training_images"] == 27


def scalars(output):
    """Return what TensorBoard shows: (step, name) -> value, later files' restarts hiding what earlier ones had."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for path in sorted((output / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                shown[event.step, value.tag] = value.simple_value
    return shown


def test_tensorboard_shows_the_metrics(whole):
    output, _ = whole
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = scalars(output)
    assert len(shown) == 6 * len(rows)
    for row in rows:
        for name in row.keys() - {"step"}:
            assert shown[int(row["step"]), name] == pytest.approx(float(row[name]), rel=1e-6)


def test_a_finished_run_resumes_to_the_same_report(whole, folder, tmp_path):
    output, report = whole
    shutil.copytree(output, tmp_path / "run")
    again = finetune(folder, tmp_path / "run", recipe=tiny_recipe(), resume=True)
    assert (again["best"], again["last"]) == (report["best"], report["last"])
    assert_same_run(tmp_path / "run", output)


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from levit_flax.training import finetune, loop, outputs
from training_runs import checkpoint_steps, tiny_recipe

folder, output, kills, processes, epochs = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
recipe = tiny_recipe(epochs=epochs)
total, interval = 3 * epochs, 3
generator = random.Random(0)

class Figure:
    def savefig(self, file, format):
        file.write_bytes(b"")

outputs.draw_curves = lambda history: Figure()

def train():
    "Begin or go on in a child, which tells of every step and of every save."
    told, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        return child, os.fdopen(told)

    class Session(loop.Session):
        def next_batch(self):
            os.write(tell, f"batch {self.step}\\n".encode())
            time.sleep(0.1)  # or saves would take all the time
            return super().next_batch()

        def save(self):
            super().save()  # which first waits for the save before this one
            os.write(tell, f"saving {self.step}\\n".encode())

    loop.Session = Session
    finetune(folder, output, recipe=recipe, resume=True, processes=processes)
    os._exit(0)

done = 0  # steps, in the last child
outcomes = {"while it started": 0, "while it saved": 0, "else": 0}
killed = 0
while True:
    last = max(checkpoint_steps(output), default=0)
    child, told = train()
    begin = time.perf_counter()
    events = []
    if killed == kills:
        events = told.read().splitlines()
    elif killed % 5 == 4:
        time.sleep(generator.uniform(0, startup))
    else:
        # So far that on average the kills are spread over all of the run.
        left = (total - last) * 4 // 3
        for _ in range(generator.randint(1, max(1, 2 * left // (kills - killed + 1)))):
            events.append(told.readline().strip())
            if len(events) == 1:
                startup = time.perf_counter() - begin
        time.sleep(generator.uniform(0, 0.2))
    if killed < kills:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    events += told.read().splitlines()
    told.close()
    steps = [int(event.split()[1]) for event in events if event.startswith("batch")]
    saves = [int(event.split()[1]) for event in events if event.startswith("saving")]
    if steps:
        assert steps[0] == last, (steps, last)  # it went on from the last whole checkpoint
    if killed == kills:
        assert status == 0, status
        break
    assert status == signal.SIGKILL, status
    killed += 1
    whole = max(checkpoint_steps(output), default=0)
    begun = [last, *saves]
    assert whole >= begun[-2:][0], (whole, begun)  # at most one save was in flight
    if steps:
        assert steps[-1] + 1 - begun[-1] <= interval, (steps, begun)
    half = any("tmp" in path.name for path in (output / "checkpoints").glob("*"))
    outcomes["while it started" if not steps else "while it saved" if half else "else"] += 1
    print(f"kill {killed}: at step {steps[-1:]}, goes on from {whole}", flush=True)
print(outcomes)
"""


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
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(folder, whole, compiled, tmp_path, kills, processes, epochs):
    wanted = whole[0]
    if epochs != 6:
        wanted = tmp_path / "wanted"
        finetune(folder, wanted, recipe=tiny_recipe(epochs=epochs))
    marker = f"LEVIT_FLAX_TEST={tmp_path}"
    arguments = ["-W", "ignore", "-c", KILLER, folder, tmp_path / "run", kills, processes, epochs]
    path = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    done = start(arguments, compiled, PYTHONPATH=path, LEVIT_FLAX_TEST=str(tmp_path))
    out, err = done.communicate()
    print(out)
    assert done.returncode == 0, err
    assert_same_run(tmp_path / "run", wanted)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in wanted.iterdir()}
    assert max(checkpoint_steps(tmp_path / "run")) == 3 * epochs
    with (wanted / "metrics.csv").open() as file:
        assert len(scalars(tmp_path / "run")) == 6 * len(list(csv.DictReader(file)))
    assert processes_with(marker) == []  # data processes end with the one that was killed


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_signals_save_and_leave(whole, folder, toml, tmp_path, capsys, monkeypatch, processes):
    """In the middle of an epoch, twice, through the command."""
    step_of = {signal.SIGTERM: 4, signal.SIGINT: 11}
    arguments = ["finetune", folder, "--recipe", toml, "--output", tmp_path / "run", "--processes", processes]
    took = loop.Session.next_batch
    sent = None

    def next_batch(self):
        if sent and self.step == step_of[sent] - 1:
            os.kill(os.getpid(), sent)
        return took(self)

    monkeypatch.setattr(loop.Session, "next_batch", next_batch)
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
def test_the_number_of_data_processes_may_change(folder, slow):
    """What a step sees is a matter of its number alone."""
    train, _ = find_images(folder, tiny_recipe(), ())
    rows = TrainingRows(train, tiny_recipe(), lf.LevitImageProcessor(size=28, crop_size=32))
    expected = [batch["pixels"] for batch in training_batches(rows, 2)]
    assert len(expected) == STEPS and expected[0].shape == (1, 8, 32, 32, 3)
    for first, processes in ((17, 0), (4, 0), (5, 1)) + ((0, 2),) * slow:
        batches = training_batches(rows, 1, processes, first)
        found = [next(batches)["pixels"] for _ in expected[first : first + 3]]
        batches.close()
        np.testing.assert_array_equal(found, expected[first : first + 3])
    assert multiprocessing.active_children() == []


FULL_DISK = """
import resource, signal, sys
from levit_flax.cli import main
from levit_flax.training import loop, outputs

outputs.draw_curves = lambda history: type("Figure", (), {"savefig": lambda self, file, format: None})()

limit, at = int(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = loop.Session.save

def save_on_a_full_disk(self):
    if self.step == at:
        self.checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save(self)

loop.Session.save = save_on_a_full_disk
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("limit", "at", "last"),
    [
        (20_000, 9, "The last complete checkpoint is of step 6"),
        pytest.param(100, 3, "There is no checkpoint yet", marks=pytest.mark.slow),
        pytest.param(20_000, 18, "The last complete checkpoint is of step 15", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_a_sentence(whole, folder, toml, compiled, tmp_path, limit, at, last):
    output = tmp_path / "run"
    command = ["finetune", folder, "--recipe", toml, "--output", output]
    process = start(["-c", FULL_DISK, limit, at, *command], compiled)
    out, err = process.communicate()
    said = [line for line in err.splitlines() if not line.startswith("epoch ")]
    assert (process.returncode, out) == (1, "")
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


def test_a_image_that_cannot_be_decoded(folder, toml, tmp_path, capsys):
    """It is named when it is reached; the state is saved; with --skip the training goes on, and with it mended too."""
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, data)
    train, held_back = find_images(data, tiny_recipe(), ())
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

    # Of the validation, at the end of the epoch, by name again.
    (tmp_path / "skip.txt").write_text(f"{broken.relative_to(data)}\n\n")
    status, out, err = run(capsys, *arguments, "--resume", "--skip", tmp_path / "skip.txt")
    assert status == 1 and f"error: {broken_back} cannot be used: " in err and "The state after step 3 of 18" in err

    broken_back.write_bytes(mended[broken_back])
    status, out, err = run(capsys, *arguments, "--resume", "--skip", tmp_path / "skip.txt", "--json")
    assert status == 0
    with (output / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(3, 19, 3))  # the evaluation that was put off came first
    assert json.loads(out)["last"]["step"] == STEPS


def test_mended_images_leave_no_trace(whole, folder, tmp_path):
    """Stopped by images of both parts, mended, and gone on with: the same bits."""
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, data)
    train, held_back = find_images(data, tiny_recipe(), ())
    mended = {path: truncate(path) for path in (train.images[20], held_back.images[0])}
    for path, content in mended.items():
        with pytest.raises(DataError, match=f"{path.name} cannot be used: .* is saved"):
            finetune(data, output, recipe=tiny_recipe(), resume=True)
        path.write_bytes(content)
    finetune(data, output, recipe=tiny_recipe(), resume=True)
    assert_same_run(output, whole[0])


def test_what_is_skipped_later_moves_nothing_else(folder):
    recipe = tiny_recipe()
    train, held_back = find_images(folder, recipe, ())
    gone, gone_back = train.images[3], held_back.images[2]
    skip = {path.relative_to(folder).as_posix() for path in (gone, gone_back)}
    later, later_back = leave_out(train, held_back, folder, skip)
    [changed] = [i for i in range(27) if later.images[i] != train.images[i]]
    assert changed == 3 and later.images[3].parent == gone.parent and later.images[3] != gone
    np.testing.assert_array_equal(later.targets, train.targets)
    assert later_back.images == held_back.images[:2] and later_back.targets.tolist() == [0, 1]
    everything = {path.relative_to(folder).as_posix() for path in train.images if path.parent.name == "bee"}
    with pytest.raises(DataError, match=r"would have no image of the class bee left\. Skip fewer"):
        leave_out(train, held_back, folder, everything)
    with pytest.raises(DataError, match="for validation would have no image left"):
        leave_out(train, held_back, folder, {path.relative_to(folder).as_posix() for path in held_back.images})


def test_a_loss_that_is_not_finite(whole, folder, tmp_path, monkeypatch):
    """Stops the training with everything as it was at the last save."""
    output = tmp_path / "run"

    def interrupt(step):
        if step.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(folder, output, recipe=tiny_recipe(), show=interrupt)
    before = {name: (output / "model" / name).read_bytes() for name in os.listdir(output / "model")}
    restore = loop.Session.restore

    def restore_nonsense(self):
        restore(self)
        variables = self.state.variables
        params = jax.tree.map(lambda x: x * np.float32("inf"), variables["params"])
        self.state = self.state.replace(variables={**variables, "params": params})

    monkeypatch.setattr(loop.Session, "restore", restore_nonsense)
    with pytest.raises(NotFiniteError, match=r"Step 7 of 18 \(epoch 3\) has the loss (nan|inf)") as caught:
        finetune(folder, output, recipe=tiny_recipe(), resume=True)
    assert "at the learning rate 0.00" in str(
        caught.value
    ) and ": expected finite numbers. The step was not applied. Lower" in str(caught.value)
    assert max(checkpoint_steps(output)) == 6
    assert {name: (output / "model" / name).read_bytes() for name in os.listdir(output / "model")} == before
    monkeypatch.setattr(loop.Session, "restore", restore)
    finetune(folder, output, recipe=tiny_recipe(), resume=True)
    assert_same_run(output, whole[0])


@pytest.mark.slow
def test_a_learning_rate_beyond_all_bounds(folder, toml, tmp_path, capsys):
    arguments = ["finetune", folder, "--recipe", toml, "--output", tmp_path / "run", "--set", "learning_rate=1e30"]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "") and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: Step ") and "Lower learning_rate" in err
    assert checkpoint_steps(tmp_path / "run") == [] and not (tmp_path / "run" / "model").exists()


DEVICES = """
import json, os, signal, sys
import jax

address, count, index, folder, output, dtype, accumulation, stop_at = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(address, int(count), int(index))
jax.config.update("jax_enable_x64", dtype == "float64")

from levit_flax import checkpoint
from levit_flax.training import finetune, loop, outputs, plan
from training_runs import tiny_recipe

make_student, add, losses = plan.make_student, loop.Totals.add, []

def make_student_of_dtype(*arguments, **options):
    student = make_student(*arguments, **options)
    model, variables = checkpoint.cast(student.model, student.variables, dtype)
    return student._replace(model=model, variables=variables)

def note_loss(self, loss, *others):
    losses.append(loss)
    add(self, loss, *others)

def stop(now):
    if now.step == int(stop_at) and index == "0":
        os.kill(os.getpid(), signal.SIGTERM)

plan.make_student, loop.Totals.add = make_student_of_dtype, note_loss
outputs.draw_curves = lambda history: type("Figure", (), {"savefig": lambda self, file, format: None})()
recipe = tiny_recipe(
    epochs=2, batch_size=16, accumulation=int(accumulation), adaptive_clip=0.02, rand_augment=1, erase=0.5, mixup=0.8,
    cutmix=1.0,
)
try:
    finetune(folder, output, recipe=recipe, resume=True, show=stop, processes=0)
except loop.TrainingStopped as stopped:
    print(stopped, file=sys.stderr)
print("losses", json.dumps(losses))
"""

PARAMETERS_LIMIT = 1e-8  # float64, after ten steps: sums over a batch are taken in another order
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


def train_on(hosts, devices, compiled, *arguments, stop_at=-1):
    """Train in one process or several, with so many devices each; return the losses."""
    path, address = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]), free_address()
    processes = [
        start(["-c", DEVICES, address, hosts, index, *arguments, stop_at], compiled, devices, PYTHONPATH=path)
        for index in range(hosts)
    ]
    said = [process.communicate() for process in processes]
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err
    losses = [out.rpartition("losses ")[2] for out, _ in said]
    assert len(set(losses)) == 1  # every host has the whole batch's
    return np.array(json.loads(losses[0]))


def rows_of(output):
    with (output / "metrics.csv").open() as file:
        return np.array([[float(value) for value in row.values()] for row in csv.DictReader(file)])


def largest_difference(output, expected):
    found, wanted = final_state(output), final_state(expected)
    paths = [path for path in wanted if path.startswith(("variables/", "average/"))]
    assert found.keys() == wanted.keys() and len(paths) > 80
    return max(np.abs(np.asarray(found[path], np.float64) - wanted[path]).max() for path in paths)


SPREAD = [(1, 8), (2, 4)]  # (hosts, devices of each)


@pytest.mark.parametrize(
    ("spread", "dtype", "accumulation"),
    [
        ([(2, 1)], "float64", 2),
        *(
            pytest.param(SPREAD, dtype, accumulation, marks=pytest.mark.slow)
            for dtype in ("float64", "float32")
            for accumulation in (1, 2)
        ),
    ],
)
def test_devices_and_hosts_train_the_same(parts, compiled, tmp_path, spread, dtype, accumulation):
    wanted = tmp_path / "one"
    expected = train_on(1, 1, compiled, parts, wanted, dtype, accumulation)
    assert len(expected) == 10 and len(set(expected)) == 10
    for hosts, devices in spread:
        output = tmp_path / f"{hosts} x {devices}"
        losses = train_on(hosts, devices, compiled, parts, output, dtype, accumulation)
        furthest = np.abs(losses / expected - 1).max()
        difference = largest_difference(output, wanted)
        print(f"{hosts} x {devices}, {dtype}, {accumulation} parts: losses {furthest:.1e}, parameters {difference:.1e}")
        assert furthest < LOSS_LIMIT
        if dtype == "float64":
            assert difference < PARAMETERS_LIMIT
            np.testing.assert_allclose(rows_of(output), rows_of(wanted), rtol=1e-9)


@pytest.mark.slow
def test_several_hosts_stop_together_and_go_on(parts, compiled, tmp_path):
    wanted = train_on(2, 1, compiled, parts, tmp_path / "whole", "float64", 1)
    before = train_on(2, 1, compiled, parts, tmp_path / "stopped", "float64", 1, stop_at=3)
    assert 3 <= len(before) < len(wanted) and checkpoint_steps(tmp_path / "stopped") == [len(before)]
    after = train_on(2, 1, compiled, parts, tmp_path / "stopped", "float64", 1)
    np.testing.assert_array_equal([*before, *after], wanted)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_hosts_that_cannot_begin_together(folder, toml, compiled, tmp_path):
    def said_by_two(data, *options):
        address = free_address()
        processes = [
            start(
                ["-m", "levit_flax.cli", "finetune", path, "--recipe", toml, "--output", tmp_path / "run", *others],
                compiled,
                LEVIT_FLAX_COORDINATOR=address,
                LEVIT_FLAX_PROCESS_COUNT="2",
                LEVIT_FLAX_PROCESS_ID=str(index),
            )
            for index, (path, others) in enumerate(zip(data, options or ((), ()), strict=True))
        ]
        said = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [1, 1], said
        return said

    (tmp_path / "empty").mkdir()
    first, second = said_by_two([folder, tmp_path / "empty"])
    assert "error: Host 1 cannot start training. See its output for the reason." in first
    assert f"error: {tmp_path}/empty has no folders" in second
    (tmp_path / "skip").write_text("ant/1.png\n")
    for said in said_by_two([folder, folder], (), ("--skip", tmp_path / "skip")):
        assert "error: The hosts have different settings or see different images" in said


def test_processes_that_know_of_no_other(folder, toml, tmp_path, capsys):
    arguments = ["finetune", folder, "--recipe", toml, "--output", tmp_path / "run"]
    status, _, err = run(capsys, *arguments, "--process-count", 2, "--process-id", 0)
    assert status == 1 and "expected --coordinator" in err and not (tmp_path / "run").exists()


def test_a_run_does_not_remove_what_it_begins_from(whole, folder, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"run/model is inside .*run, which overwrite=True would empty"):
        finetune(folder, tmp_path / "run", recipe=tiny_recipe(), model=tmp_path / "run" / "model", overwrite=True)
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_revision_belongs_to_a_run(whole, folder):
    with pytest.raises(RecipeError, match=r"started with other settings: revision .was None, is 'other'."):
        finetune(folder, whole[0], recipe=tiny_recipe(), resume=True, revision="other")


def test_too_little_memory_is_a_sentence(folder, tmp_path, monkeypatch):
    def train(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")

    monkeypatch.setattr(loop.Session, "run", train)
    with pytest.raises(RecipeError, match=r"not have enough memory for batches of 8 images in 1 parts\. Lower"):
        finetune(folder, tmp_path / "run", recipe=tiny_recipe())


def test_a_batch_of_one_needs_frozen_batch_norms(folder):
    images = find_images(folder, tiny_recipe(), ())[0]
    plan.check_batch(tiny_recipe(batch_size=1, batch_norm="freeze"), images)
    with pytest.raises(RecipeError, match="of at least 2, or batch_norm"):
        plan.check_batch(tiny_recipe(batch_size=1, batch_norm="freeze_with_parameters"), images)
