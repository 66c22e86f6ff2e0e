"""The training loop: checks everything, then steps without waiting for the device, and survives being killed.

    levit_flax.training.finetune("images", "out", model="facebook/levit-128S")

A run lives in one directory: `checkpoints/` to go on from, `model/` with the best model so far, `metrics.csv`,
`curves.png`, `tensorboard/`, and `run.json`, which says what was asked for.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from levit_flax import files
from levit_flax.configuration import REGRESSION
from levit_flax.datasets import DataError, LabeledImages
from levit_flax.hub import HubOptions
from levit_flax.visualize import new_figure

from .checkpoints import Checkpoints
from .data import (
    Shard,
    TrainingRows,
    check_images,
    evaluation_batches,
    find_images,
    leave_out,
    training_batches,
)
from .optimizer import learning_rate_schedule
from .outputs import (
    CURVES_FILE,
    METRICS_FILE,
    MODEL_DIRECTORY,
    REPORT_FILE,
    TENSORBOARD_DIRECTORY,
    TORCH_DIRECTORY,
    History,
    TensorBoard,
    best_row,
    goodness,
    write_best,
    write_history,
)
from .recipe import Recipe, RecipeError, read_recipe
from .state import Batch, Metrics, State, Task
from .student import Student, align_classes, make_student
from .teacher import TeacherSource, check_teacher, make_teacher

T = TypeVar("T")

RUN_FILE = "run.json"
CHECKPOINT_DIRECTORY = "checkpoints"

# What a run leaves in its directory, and --force removes. Nothing beside it is touched.
OWN_NAMES = (
    RUN_FILE,
    REPORT_FILE,
    METRICS_FILE,
    CURVES_FILE,
    CHECKPOINT_DIRECTORY,
    MODEL_DIRECTORY,
    TORCH_DIRECTORY,
    TENSORBOARD_DIRECTORY,
)

IN_FLIGHT = 4  # steps that may wait for the device; more would only hold their images in memory
DEFAULT_THREADS = 2


class TrainingStopped(RuntimeError):
    """Training was asked to stop; the message says at which step, and how to go on.

    Attributes:
        signal: the number of the signal that asked, such as `signal.SIGTERM`.

    Example:
        >>> TrainingStopped("Stopped at step 10 of 100.", signal.SIGTERM).signal == signal.SIGTERM
        True
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class NotFiniteError(ValueError):
    """A loss or a gradient is not finite; the message says what was seen.

    Example:
        >>> issubclass(NotFiniteError, ValueError)
        True
    """


class Progress(NamedTuple):
    """How far a training is, for whoever shows it.

    Attributes:
        step: steps done.
        total: steps of the whole training.
        epoch: counted from 1.
        loss: mean since the last evaluation; None before the first step that is known.
        accuracy: share of right images since the last evaluation, in [0, 1]; None for regression too.
        images_per_second: since the start of this process.
        seconds_left: estimate.
        evaluation: the last row of metrics.csv; None before the first.

    Example:
        >>> now = Progress(50, 200, 1, 0.7, 0.5, 300.0, 60.0, None)
        >>> f"{now.step / now.total:.0%}, {now.seconds_left:.0f} s left"
        '25%, 60 s left'
    """

    step: int
    total: int
    epoch: int
    loss: float | None
    accuracy: float | None
    images_per_second: float
    seconds_left: float
    evaluation: Mapping[str, float] | None


def finetune(
    data: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    recipe: Recipe | str | Path = "finetune",
    teacher: str | Path | Callable[[jax.Array], jax.Array] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    skip: Any = (),
    check_data: bool = False,
    export_torch: str | None = None,
    threads: int = DEFAULT_THREADS,
    processes: int = 0,
    show: Callable[[Progress], None] | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> dict[str, Any]:
    """Train a model on labeled images, on all devices of all hosts.

    Args:
        data: as in `read_images`.
        output: directory of the run; made if it does not exist.
        model: the checkpoint to start from, as in `levit_flax.from_pretrained`; None for the recipe's architecture from
            scratch.
        recipe: how to train; a `Recipe`, or what `read_recipe` takes.
        teacher: as in `make_teacher`; needed where the recipe distills.
        resume: go on from the last checkpoint of the run in `output`, if there is one.
        overwrite: begin anew in a directory that holds a run.
        skip: images to leave out, as in `read_images`.
        check_data: decode every image before the first step.
        export_torch: PyTorch layout in which the best model is written too, such as "hf".
        threads: that decode and augment images, in each process.
        processes: that do so beside this one; 0 for none.
        show: called now and then with how far the training is.
        revision: branch, tag or commit of `model` on the Hub; the teacher is loaded from its main branch.
        token: access token for the Hub.
        cache_dir: directory for downloads; None for huggingface_hub's own cache.
        local_files_only: do not access the network.

    Returns:
        The report, which also is in `output`: the best evaluation, the last one, and what was measured of the speed.

    Raises:
        RecipeError: the recipe cannot be used, or does not fit the data, the model or the devices.
        DataError: the data cannot be used. Where that shows only while training, the state is saved first (on several
            hosts it is not: what holds is the last checkpoint).
        NotFiniteError: a loss or a gradient is not finite.
        TrainingStopped: SIGTERM or SIGINT came; the state is saved.
        FileExistsError: the directory holds a run, and neither `resume` nor `overwrite` is set.
        OSError: something cannot be read or written.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> shape = {"image_size": 32, "hidden_sizes": [8, 16], "num_attention_heads": [1, 1], "depths": [1, 1]}
        >>> shape |= {"key_dim": [8, 8], "attention_ratio": [2, 2], "mlp_ratio": [2, 2]}
        >>> recipe = Recipe(architecture=shape, epochs=1, warmup_epochs=0, batch_size=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i in range(8):
        ...         path = Path(folder, "data", ("cat", "dog")[i % 2], f"{i}.png")
        ...         path.parent.mkdir(parents=True, exist_ok=True)
        ...         Image.new("RGB", (32, 32)).save(path)
        ...     report = finetune(f"{folder}/data", f"{folder}/run", recipe=recipe)
        ...     sorted(path.name for path in Path(folder, "run", "model").iterdir())[:3]
        ['README.md', 'config.json', 'flax_model.safetensors']
        >>> sorted(report["best"])[:3]
        ['epoch', 'learning_rate', 'step']
    """
    hub = HubOptions(revision, token, cache_dir, local_files_only)
    output = Path(output).expanduser().absolute()
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    skip = frozenset(PurePath(entry).as_posix() for entry in skip)
    new_figure(1, 1)  # what is missing for the curves is said before the work, not after it
    together(lambda: check_output(output, resume, overwrite), only_first=True)

    def find() -> tuple[dict[str, Any] | None, LabeledImages, LabeledImages]:
        check_sources(output, overwrite, model, teacher)
        begun = read_run(output) if resume else None
        return begun, *find_images(data, recipe, frozenset(begun["skip"]) if begun else skip)

    begun, train, validation = together(find)
    asked = {
        "recipe": recipe.to_dict(),
        "model": str(model) if model is not None else None,
        "revision": revision,
        "teacher": str(teacher) if isinstance(teacher, str | Path) else bool(teacher),
        "data": fingerprint(train, validation),
    }
    agree({**asked, "skip": sorted(skip), "begun": begun})

    def read() -> tuple[Student, TeacherSource, LabeledImages, LabeledImages]:
        if begun:
            check_same(output, begun, asked)
        check_batch(recipe, train)
        check_teacher(teacher, recipe, train)
        root = Path(data).expanduser()
        parts = leave_out(train, validation, root, skip) if begun else (train, validation)
        for part in parts:
            check_images(part, decode=check_data)
        student = make_student(model, recipe, parts[0], hub)
        if export_torch:
            # Only whoever wants PyTorch weights pays for this.
            from levit_flax.convert.writing import check_layout, check_transformers_size

            check_layout(student.model, export_torch)
            if export_torch == "hf":
                check_transformers_size(student.model.config)
        config, of_teacher = student.model.config, dataclasses.replace(hub, revision=None)
        images, held_back = (align_classes(part, config) for part in parts)
        source = make_teacher(teacher, recipe, config, student.processor, images, root, of_teacher)
        return student, source, images, held_back

    run = Run(output, recipe, *together(read), threads, processes, show, asked)
    together(lambda: prepare_output(output, None if begun else {**asked, "skip": sorted(skip)}), only_first=True)
    try:
        report = run.train()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RecipeError(
            f"The devices have not enough memory for batches of {recipe.batch_size} in {recipe.accumulation} parts:"
            " lower batch_size, or raise accumulation."
        ) from error
    if export_torch and jax.process_index() == 0:
        from levit_flax.convert.workflow import convert_to_directory

        convert_to_directory(
            str(output / MODEL_DIRECTORY), output / TORCH_DIRECTORY, layout=export_torch, overwrite=True, verify=True
        )
    return report


def check_batch(recipe: Recipe, images: LabeledImages) -> None:
    """Raise RecipeError unless batches of this size can be made of the images, and be spread over the devices."""
    part, devices, count = recipe.batch_size // recipe.accumulation, jax.device_count(), len(images)
    if recipe.batch_size > count:
        raise RecipeError(
            f"batch_size is {recipe.batch_size}, but {images.where} has {count} images: expected {count} or less."
        )
    if part < 2 and recipe.batch_norm != "freeze":
        raise RecipeError(
            "A batch of one image cannot be trained on, since the head's batch norm has one value an image: expected"
            ' batch_size / accumulation of at least 2, or batch_norm = "freeze".'
        )
    if part % devices:
        raise RecipeError(
            f"batch_size / accumulation is {part}, which {devices} devices cannot share equally: expected a multiple."
        )


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Raise FileExistsError unless a run may be written here, and OSError unless it can be."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file: expected a directory to write, or a name that is free.")
    names = [entry.name for entry in output.iterdir()] if output.is_dir() else []
    held = any(not name.startswith(f".{RUN_FILE}.") for name in names)  # by more than a run that was killed at once
    if held and not (output / RUN_FILE).is_file():
        raise FileExistsError(f"{output} holds something else than a training: choose another name.")
    if held and not resume and not overwrite:
        raise FileExistsError(
            f"{output} holds a training: go on with it by --resume (resume=True), begin anew by --force"
            " (overwrite=True), or choose another name."
        )
    files.make_directory(output)
    try:
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise files.cannot_write(output, error) from None


def read_run(output: Path) -> dict[str, Any] | None:
    """Return what the run in a directory was begun with, or None where there is none."""
    try:
        text = (output / RUN_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    begun: dict[str, Any] = json.loads(text)
    return begun


def check_same(output: Path, begun: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise RecipeError where something else is asked for than what a run was begun with."""
    before = {name: begun.get(name) for name in asked}
    differing = [
        f"{name} (was {old!r}, is {new!r})" for name, old, new in _differences(before, json.loads(json.dumps(asked)))
    ]
    if differing:
        raise RecipeError(
            f"{output} was begun with something else: {'; '.join(differing[:5])}. Resume with the same, or begin"
            " anew with --force."
        )


def prepare_output(output: Path, asked: Mapping[str, Any] | None) -> None:
    """Remove what a run that was killed left half-written; for a new one, which is `asked` for, all of an older one."""
    for entry in output.iterdir():
        half = entry.name.startswith(tuple(f".{name}." for name in OWN_NAMES))
        old = asked is not None and entry.name in OWN_NAMES and entry.name != RUN_FILE
        if half or old:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if asked is not None:
        files.write_text(output / RUN_FILE, json.dumps(asked, indent=2) + "\n")


def check_sources(output: Path, overwrite: bool, *sources: Any) -> None:
    """Raise FileExistsError where a run that is to be begun anew holds what it is to be begun from."""
    for source in sources:
        if overwrite and isinstance(source, str | Path) and output in Path(source).expanduser().absolute().parents:
            raise FileExistsError(
                f"{source} lies in {output}, which would be emptied before it is trained again: expected another name"
                " for the new run, or that model elsewhere."
            )


def together(work: Callable[[], T], only_first: bool = False) -> T:
    """Do something on every host, or on host 0 while the others wait; where it fails on one, all of them stop."""
    error, result = None, None
    if not only_first or jax.process_index() == 0:
        try:
            result = work()
        except (ValueError, OSError, ImportError) as found:
            error = found
    failed = [error is not None]
    if jax.process_count() > 1:
        failed = list(multihost_utils.process_allgather(np.array(failed)).ravel())
    if error:
        raise error
    if any(failed):
        raise OSError(f"Host {failed.index(True)} cannot begin; what it prints says why.")
    return cast(T, result)


def agree(asked: dict[str, Any]) -> None:
    """Wait for all hosts, and raise RecipeError unless they were asked for the same and see the same data."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
    others = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (others != others[0]).any():
        raise RecipeError(
            "The hosts were not asked for the same, or do not see the same images: expected one command, and the same"
            f" data at one path on all {jax.process_count()} of them."
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def fingerprint(train: LabeledImages, validation: LabeledImages) -> dict[str, Any]:
    """Return what tells one set of data from another: counts, classes, and a digest of names and targets."""
    digest = hashlib.sha256()
    for part in (train, validation):
        for index in range(len(part)) if isinstance(part.images, list) else ():
            path = Path(part.images[index])
            digest.update(f"{path.parent.name}/{path.name}\n".encode())
        digest.update(part.targets.tobytes())
    return {
        "training_images": len(train),
        "validation_images": len(validation),
        "classes": len(train.labels),
        "sha256": digest.hexdigest(),
    }


class Run:
    """One training in one process; every host has one."""

    def __init__(
        self,
        output: Path,
        recipe: Recipe,
        student: Student,
        teacher: TeacherSource,
        train: LabeledImages,
        validation: LabeledImages,
        threads: int,
        processes: int,
        show: Callable[[Progress], None] | None,
        asked: dict[str, Any],
    ) -> None:
        self.output, self.recipe, self.student, self.validation = output, recipe, student, validation
        self.show, self.asked = show, asked
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec(None, "batch"))
        self.shard = Shard(jax.process_index(), jax.process_count())
        self.rows = TrainingRows(train, recipe, student.processor, teacher.logits, self.shard)
        self.total = recipe.epochs * self.rows.steps_per_epoch
        self.threads, self.processes = threads, processes
        self.batches: Any = None  # from the step on that training goes on with

        params = student.variables["params"]
        self.task = Task(student.model, recipe, student.processor, params, self.rows.steps_per_epoch, teacher.function)
        self.train_step = jax.jit(self.task.train_step, donate_argnums=0)
        self.evaluate_step = jax.jit(self.task.evaluate_step)
        self.learning_rate = learning_rate_schedule(recipe, self.rows.steps_per_epoch)
        self.teacher_variables = jax.device_put(teacher.variables, self.replicated)

        self.board = TensorBoard(output)
        self.history: History = []
        self.totals = Totals()
        self.pending: deque[tuple[int, Metrics]] = deque()
        self.waited = self.evaluated = 0.0  # seconds

    def train(self) -> dict[str, Any]:
        """Go on to the end, from the last checkpoint if there is one; return the report."""
        directory = self.output / CHECKPOINT_DIRECTORY
        with (
            closing(Checkpoints(directory)) as checkpoints,
            closing(self.board),
            closing(self),
            stop_signals(self.shard.count > 1) as stop,
        ):
            state = self.restore(checkpoints)
            step = first = int(state.step)
            begin = None
            if self.evaluation_due(step):  # which an image that could not be used had put off
                self.end_epoch(checkpoints, state, step)
            while step < self.total:
                batch = self.next_batch(checkpoints, state, step)
                state, metrics = self.train_step(state, self.teacher_variables, batch)
                step += 1
                self.pending.append((step, metrics))
                self.collect(IN_FLIGHT)
                if begin is None:  # once it is compiled
                    begin, first, self.waited, self.evaluated = time.perf_counter(), step, 0.0, 0.0
                if self.evaluation_due(step):
                    self.end_epoch(checkpoints, state, step)
                if self.show and step > first:
                    self.show(self.progress(step, first, time.perf_counter() - begin))
                if self.should_stop(stop, step) and step < self.total:
                    self.stop(checkpoints, state, step, stop.received or int(signal.SIGTERM))
            seconds = time.perf_counter() - begin - self.evaluated if begin else 0.0
            checkpoints.wait()
        return self.finish(step - first, seconds)

    def restore(self, checkpoints: Checkpoints) -> State:
        """Return the state to go on from, and set the data and the history to it."""
        state = jax.device_put(self.task.init(self.student.variables), self.replicated)
        if checkpoints.latest is not None:
            state, progress = checkpoints.restore(state)
            self.history, self.totals = progress["history"], Totals(**progress["totals"])
        if int(state.step) < self.total:
            self.batches = training_batches(self.rows, self.threads, self.processes, first=int(state.step))
        return state

    def close(self) -> None:
        """End the threads and processes that read images."""
        if self.batches is not None:
            self.batches.close()

    def save(self, checkpoints: Checkpoints, state: State, step: int) -> None:
        """Begin to save a checkpoint."""
        self.collect(0)
        if checkpoints.latest == step:
            return  # which it was restored from
        progress = {"history": self.history, "totals": dataclasses.asdict(self.totals)}
        evaluated = bool(self.history) and self.history[-1]["step"] == step
        checkpoints.save(step, state, progress, goodness(self.history[-1]) if evaluated else None)

    def next_batch(self, checkpoints: Checkpoints, state: State, step: int) -> Batch:
        """Read the next batch and send it to the devices."""
        begin = time.perf_counter()
        try:
            arrays = next(self.batches)
        except DataError as error:
            raise self.unusable(checkpoints, state, step, error) from error
        if not self.pending or cast(Any, self.pending[-1][1].loss).is_ready():  # else the device had work all the while
            self.waited += time.perf_counter() - begin
        return Batch(**self.place(arrays))

    def unusable(self, checkpoints: Checkpoints, state: State, step: int, error: DataError) -> DataError:
        """Save the state, and return what to raise where an image cannot be used."""
        if self.shard.count > 1:  # the other hosts know nothing of it, and all have to take part in saving
            return error
        self.save(checkpoints, state, step)
        checkpoints.wait()
        return DataError(
            f"{error} The state after step {step} of {self.total} is saved: mend the image, or list its path in a"
            " file for --skip, and go on with --resume."
        )

    def place(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Make global arrays of this host's rows."""
        return {name: jax.make_array_from_process_local_data(self.sharded, array) for name, array in arrays.items()}

    def collect(self, left: int) -> None:
        """Add what steps saw to the epoch's totals, for all but the last few steps, which may still be computing."""
        while len(self.pending) > left:
            step, metrics = self.pending.popleft()
            loss, gradient = float(metrics.loss), float(metrics.gradient)
            if not (math.isfinite(loss) and math.isfinite(gradient)):
                raise NotFiniteError(
                    f"Step {step} of {self.total} (epoch {(step - 1) // self.rows.steps_per_epoch + 1}) has the loss"
                    f" {loss:g} and gradients of norm {gradient:g}, at the learning rate"
                    f" {float(self.learning_rate(step - 1)):.3g}. Nothing was changed by it. Expected finite numbers:"
                    " lower learning_rate, lengthen warmup_epochs, set adaptive_clip, or compute in float32."
                )
            self.totals.add(loss, float(metrics.correct), self.recipe.batch_size)

    def evaluation_due(self, step: int) -> bool:
        """Return whether it is time to evaluate and save, and that has not been done."""
        epoch, within = divmod(step, self.rows.steps_per_epoch)
        done = self.history[-1]["step"] if self.history else 0
        return not within and step != done and (not epoch % self.recipe.checkpoint_every or step == self.total)

    def end_epoch(self, checkpoints: Checkpoints, state: State, step: int) -> None:
        """Evaluate and save."""
        self.collect(0)
        begin = time.perf_counter()
        epoch = step // self.rows.steps_per_epoch
        variables = state.variables if state.average is None else state.average
        classes = self.task.problem_type != REGRESSION
        row = {"epoch": epoch, "step": step, "learning_rate": float(self.learning_rate(step - 1))}
        try:
            validation = self.evaluate(variables)
        except DataError as error:
            raise self.unusable(checkpoints, state, step, error) from error
        for name, totals in (("train", self.totals), ("validation", validation)):
            row[f"{name}_loss"] = totals.loss / totals.images
            if classes:
                row[f"{name}_accuracy"] = totals.correct / totals.images
        self.totals = Totals()
        self.history.append(row)
        if jax.process_index() == 0:
            on_host = jax.device_get(variables)
            with checkpoints.writing(OSError):
                self.write(row, on_host)
        self.save(checkpoints, state, step)
        self.evaluated += time.perf_counter() - begin

    def write(self, row: dict[str, Any], variables: Any) -> None:
        """Write the metrics and, where they are the best so far, the model."""
        write_history(self.output, self.history)
        self.board.log(row)
        if best_row(self.history) is row:
            write_best(self.output, self.student.model, variables, self.student.processor, row, self.asked)

    def evaluate(self, variables: Any) -> "Totals":
        """Return the totals over the validation images."""
        size = max(self.recipe.batch_size // self.recipe.accumulation, jax.device_count())
        totals = Totals()
        waiting = None
        for arrays in evaluation_batches(self.validation, self.student.processor, size, self.shard):
            placed = self.place(arrays)
            weights = placed.pop("weights")
            computing = self.evaluate_step(variables, Batch(**placed), weights)
            if waiting is not None:
                totals.add_sums(waiting)
            waiting = computing
        totals.add_sums(waiting)
        return totals

    def progress(self, step: int, first: int, seconds: float) -> Progress:
        """Return how far the training is."""
        done, totals = step - first, self.totals
        classes = self.task.problem_type != REGRESSION
        return Progress(
            step=step,
            total=self.total,
            epoch=(step - 1) // self.rows.steps_per_epoch + 1,
            loss=totals.loss / totals.images if totals.images else None,
            accuracy=totals.correct / totals.images if classes and totals.images else None,
            images_per_second=done * self.recipe.batch_size / seconds,
            seconds_left=(self.total - step) * seconds / done,
            evaluation=self.history[-1] if self.history else None,
        )

    def should_stop(self, stop: "StopSignal", step: int) -> bool:
        """Return whether to stop now; hosts agree on the step."""
        if self.shard.count == 1:
            return stop.received is not None
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def stop(self, checkpoints: Checkpoints, state: State, step: int, number: int) -> None:
        """Save the state and leave."""
        self.save(checkpoints, state, step)
        checkpoints.wait()
        raise TrainingStopped(
            f"Stopped at step {step} of {self.total}. The state is saved: go on with --resume.", number
        )

    def finish(self, steps: int, seconds: float) -> dict[str, Any]:
        """Return the report, and write it."""
        best, last = best_row(self.history), self.history[-1]
        report = {
            "output": str(self.output),
            "best": best,
            "last": last,
            "images_per_second": steps * self.recipe.batch_size / seconds if steps else None,
            "share_waiting_for_data": self.waited / seconds if steps else None,
            "devices": jax.device_count(),
            "platform": jax.default_backend(),
        }
        if jax.process_index() == 0:
            files.write_text(self.output / REPORT_FILE, json.dumps({**report, **self.asked}, indent=2) + "\n")
        return report


@dataclasses.dataclass
class Totals:
    """Sums over images: of their losses, of those that are right, and their number."""

    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0

    def add(self, loss: float, correct: float, images: int) -> None:
        """Add a batch by its mean loss."""
        self.loss += loss * images
        self.correct += correct
        self.images += images

    def add_sums(self, sums: Any) -> None:
        """Add what `Task.evaluate_step` returns."""
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + float(value))


@dataclasses.dataclass
class StopSignal:
    """The signal that asked to stop, or None."""

    received: int | None = None


@contextmanager
def stop_signals(several: bool) -> Iterator[StopSignal]:
    """Note SIGTERM and SIGINT instead of dying of them; a second one is not held back.

    Where there are `several` hosts, SIGTERM is left to JAX, which has all of them agree on a step; SIGINT is made one.
    """
    stop = StopSignal()
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        stop.received = number
        signal.signal(number, before[number])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        for number in map(int, (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread, where Python knows no signals
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
