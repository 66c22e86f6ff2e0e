"""Run a training plan from its last checkpoint to the end.

Steps are dispatched without waiting for the device.
"""

import dataclasses
import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from levit_flax import files
from levit_flax.checkpoint import _find_fault
from levit_flax.configuration import _REGRESSION
from levit_flax.datasets import DataError

from .checkpoints import _Checkpoints
from .data import _evaluation_batches, _Shard, _training_batches, _TrainingRows
from .optimizer import _learning_rate_schedule
from .outputs import _REPORT_FILE, _best_row, _History, _TensorBoard, _write_best, _write_curves, _write_history
from .plan import _TrainingPlan
from .run_directory import _CHECKPOINT_DIRECTORY
from .signals import _stop_signals, _StopSignal
from .state import _Batch, _Metrics, _State, _Task

_MAX_PENDING_STEPS = 4  # steps dispatched ahead of the device; more would only keep their images in memory


class TrainingStopped(RuntimeError):
    """Raised when a signal stops training, after the state has been saved.

    Attributes:
        signal: number of the signal received, such as `signal.SIGTERM`.

    Examples:
        >>> TrainingStopped("Stopped at step 10 of 100.", signal.SIGTERM).signal == signal.SIGTERM
        True
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class NotFiniteError(ValueError):
    """Raised when the loss or a gradient is NaN or infinite.

    Examples:
        >>> issubclass(NotFiniteError, ValueError)
        True
    """


class Progress(NamedTuple):
    """The progress of a training run.

    Attributes:
        step: number of steps done.
        total: number of steps in the whole run.
        epoch: number of the current epoch, starting from 1.
        loss: mean training loss since the last evaluation; None until the first step has finished.
        accuracy: training accuracy since the last evaluation, in [0, 1]; None like `loss`, and for regression.
        images_per_second: training speed since the first step of this process, evaluations included.
        seconds_left: estimated time to the end of the run.
        evaluation: the last row of metrics.csv; None before the first evaluation.

    Examples:
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


def _run_plan(plan: _TrainingPlan, show: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one, and return the report."""
    return _Session(plan, show).run()


@dataclasses.dataclass
class _Totals:
    """Sums over images: their losses, the number classified correctly, and their number."""

    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0

    def add(self, loss: float, correct: float, images: int) -> None:
        """Add a batch with its mean loss."""
        self.loss += loss * images
        self.correct += correct
        self.images += images

    def add_sums(self, sums: Any) -> None:
        """Add the result of `_Task.evaluate_step`."""
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + float(value))


@dataclasses.dataclass
class _Clock:
    """Timings since the end of the first step of a session, which includes compilation.

    Attributes:
        first_step: number of the step after which the clock was started.
        begin: time when the clock was started; None before.
        waiting: seconds that the device waited for data.
        evaluating: seconds spent on evaluation and saving.
    """

    first_step: int
    begin: float | None = None
    waiting: float = 0.0
    evaluating: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the clock was started."""
        return 0.0 if self.begin is None else time.perf_counter() - self.begin


class _Session:
    """The state, the step and the checkpoints of a training run in this process; every host has its own session."""

    clock: _Clock
    checkpoints: _Checkpoints
    stop_signal: _StopSignal
    state: _State

    def __init__(self, plan: _TrainingPlan, show: Callable[[Progress], None] | None = None) -> None:
        self.plan, self.recipe, self.show = plan, plan.recipe, show
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec(None, "batch"))
        self.shard = _Shard(jax.process_index(), jax.process_count())
        student, teacher = plan.student, plan.teacher
        self.rows = _TrainingRows(plan.train, plan.recipe, student.processor, teacher.logits, self.shard)
        self.total = plan.recipe.epochs * self.rows.steps_per_epoch
        self.batches: Any = None  # the iterator over training batches; None if no step is left

        params = student.variables["params"]
        self.task = _Task(
            student.model, plan.recipe, student.processor, params, self.rows.steps_per_epoch, teacher.function
        )
        self.train_step = jax.jit(self.task.train_step, donate_argnums=0)
        self.evaluate_step = jax.jit(self.task.evaluate_step)
        self.learning_rate = _learning_rate_schedule(plan.recipe, self.rows.steps_per_epoch)
        self.teacher_variables = jax.device_put(teacher.variables, self.replicated)

        self.step = 0  # steps dispatched so far
        self.tensorboard = _TensorBoard(plan.output)
        self.history: _History = []
        self.totals = _Totals()  # since the last evaluation
        self.pending: deque[tuple[int, _Metrics]] = deque()  # dispatched steps whose metrics have not been read yet

    def run(self) -> dict[str, Any]:
        """Train to the end, from the last checkpoint if there is one, and return the report."""
        with (
            closing(_Checkpoints(self.plan.output / _CHECKPOINT_DIRECTORY)) as self.checkpoints,
            closing(self.tensorboard),
            closing(self),
            _stop_signals(self.shard.count > 1) as self.stop_signal,
        ):
            self.restore()
            self.clock = _Clock(self.step)
            if self.evaluation_due():  # an unusable image interrupted it
                self.end_epoch()
            while self.step < self.total:
                self.take_step()
                if self.evaluation_due():
                    self.end_epoch()
                if self.show and self.step > self.clock.first_step:
                    self.show(self.progress())
                if self.should_stop() and self.step < self.total:
                    self.stop()
            seconds = self.clock.seconds - self.clock.evaluating if self.clock.begin else 0.0
            self.checkpoints.wait()
        return self.finish(seconds)

    def restore(self) -> None:
        """Set the state, the step, the history and the data to the last checkpoint, or to the start of the run."""
        self.state = jax.device_put(self.task.init(self.plan.student.variables), self.replicated)
        if self.checkpoints.latest is not None:
            self.state, progress = self.checkpoints.restore(self.state)
            self.history, self.totals = progress["history"], _Totals(**progress["totals"])
            self.check_restored()
        self.step = int(self.state.step)
        if self.step < self.total:
            self.batches = _training_batches(self.rows, self.plan.threads, self.plan.processes, first=self.step)

    def check_restored(self) -> None:
        """Raise ValueError if the restored variables hold values that no training step leaves."""
        flat = flatten_dict(self.state.variables, sep="/")
        faults = {path: _find_fault(path, np.asarray(leaf)) for path, leaf in flat.items()}
        found = [f"{path} ({fault})" for path, fault in faults.items() if fault]
        if found:
            raise ValueError(
                f"The checkpoint of step {self.checkpoints.latest} in {self.plan.output} is damaged:"
                f" {', '.join(found[:3])}. Remove its directory to resume from an earlier one, or start again with"
                " overwrite=True."
            )

    def close(self) -> None:
        """Stop the threads and processes that read images."""
        if self.batches is not None:
            self.batches.close()

    def take_step(self) -> None:
        """Dispatch one step of the optimizer."""
        batch = self.next_batch()
        self.state, metrics = self.train_step(self.state, self.teacher_variables, batch)
        self.step += 1
        self.pending.append((self.step, metrics))
        self.collect(_MAX_PENDING_STEPS)
        if self.clock.begin is None:
            self.clock = _Clock(self.step, time.perf_counter())

    def save(self) -> None:
        """Start saving a checkpoint, unless this step was restored from one."""
        self.collect(0)
        if self.checkpoints.latest == self.step:
            return
        progress = {"history": self.history, "totals": dataclasses.asdict(self.totals)}
        best_step = int(_best_row(self.history)["step"]) if self.history else None
        self.checkpoints.save(self.step, self.state, progress, best_step)

    def next_batch(self) -> _Batch:
        """Read the next batch and send it to the devices."""
        begin = time.perf_counter()
        try:
            arrays = next(self.batches)
        except DataError as error:
            raise self.unusable(error) from error
        # While a step is still computing, the device does not wait.
        if not self.pending or cast(Any, self.pending[-1][1].loss).is_ready():
            self.clock.waiting += time.perf_counter() - begin
        return _Batch(**self.place(arrays))

    def unusable(self, error: DataError) -> DataError:
        """Save the state, and return the error to raise for an image that cannot be used."""
        if self.shard.count > 1:  # saving requires all hosts, and the others have no error
            return error
        self.save()
        self.checkpoints.wait()
        return DataError(
            f"{error} The state after step {self.step} of {self.total} is saved. Repair the image or skip it"
            " (skip=...), and continue with resume=True."
        )

    def place(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return global arrays made of this host's rows."""
        return {name: jax.make_array_from_process_local_data(self.sharded, array) for name, array in arrays.items()}

    def collect(self, left: int) -> None:
        """Add the metrics of the pending steps to the totals, except for the last `left` steps."""
        while len(self.pending) > left:
            step, metrics = self.pending.popleft()
            loss, gradient = float(metrics.loss), float(metrics.gradient)
            if not (math.isfinite(loss) and math.isfinite(gradient)):
                raise NotFiniteError(
                    f"Step {step} of {self.total} (epoch {(step - 1) // self.rows.steps_per_epoch + 1}) has the loss"
                    f" {loss:g} and the gradient norm {gradient:g} at the learning rate"
                    f" {float(self.learning_rate(step - 1)):.3g}: expected finite numbers. The step was not applied."
                    " Lower learning_rate, raise warmup_epochs, set adaptive_clip, or compute in float32."
                )
            self.totals.add(loss, float(metrics.correct), self.recipe.batch_size)

    def evaluation_due(self) -> bool:
        """Return whether an epoch that ends with an evaluation has ended and has not been evaluated yet."""
        epoch, within = divmod(self.step, self.rows.steps_per_epoch)
        evaluated = self.history[-1]["step"] if self.history else 0
        last = self.step == self.total
        return not within and self.step != evaluated and (not epoch % self.recipe.checkpoint_every or last)

    def end_epoch(self) -> None:
        """Evaluate, write the results and save a checkpoint."""
        self.collect(0)
        begin = time.perf_counter()
        variables = self.state.variables if self.state.average is None else self.state.average
        try:
            validation = self.evaluate(variables)
        except DataError as error:
            raise self.unusable(error) from error
        row: dict[str, Any] = {
            "epoch": self.step // self.rows.steps_per_epoch,
            "step": self.step,
            "learning_rate": float(self.learning_rate(self.step - 1)),
        }
        for name, totals in (("train", self.totals), ("validation", validation)):
            row[f"{name}_loss"] = totals.loss / totals.images
            if self.task.problem_type != _REGRESSION:
                row[f"{name}_accuracy"] = totals.correct / totals.images
        self.totals = _Totals()
        self.history.append(row)
        if jax.process_index() == 0:
            on_host = jax.device_get(variables)
            with self.checkpoints.writing(OSError):
                self.write(row, on_host)
        self.save()
        self.clock.evaluating += time.perf_counter() - begin

    def write(self, row: dict[str, Any], variables: Any) -> None:
        """Write the metrics, and the model if this evaluation is the best so far."""
        output, student = self.plan.output, self.plan.student
        _write_history(output, self.history)
        self.tensorboard.log(row)
        if _best_row(self.history) is row:
            _write_best(output, student.model, variables, student.processor, row, self.plan.settings.provenance())
        _write_curves(output, self.history)

    def evaluate(self, variables: Any) -> _Totals:
        """Return the totals over the validation images."""
        size = max(self.recipe.batch_size // self.recipe.accumulation, jax.device_count())
        totals = _Totals()
        waiting = None
        for arrays in _evaluation_batches(self.plan.validation, self.plan.student.processor, size, self.shard):
            placed = self.place(arrays)
            weights = placed.pop("weights")
            computing = self.evaluate_step(variables, _Batch(**placed), weights)
            if waiting is not None:
                totals.add_sums(waiting)
            waiting = computing
        totals.add_sums(waiting)
        return totals

    def progress(self) -> Progress:
        """Return the progress after the last dispatched step."""
        done, seconds, totals = self.step - self.clock.first_step, self.clock.seconds, self.totals
        classes = self.task.problem_type != _REGRESSION
        return Progress(
            step=self.step,
            total=self.total,
            epoch=(self.step - 1) // self.rows.steps_per_epoch + 1,
            loss=totals.loss / totals.images if totals.images else None,
            accuracy=totals.correct / totals.images if classes and totals.images else None,
            images_per_second=done * self.recipe.batch_size / seconds,
            seconds_left=(self.total - self.step) * seconds / done,
            evaluation=self.history[-1] if self.history else None,
        )

    def should_stop(self) -> bool:
        """Return whether to stop now; all hosts agree on the step."""
        if self.shard.count == 1:
            return self.stop_signal.received is not None
        return bool(multihost_utils.reached_preemption_sync_point(self.step))

    def stop(self) -> None:
        """Save the state and raise TrainingStopped."""
        self.save()
        self.checkpoints.wait()
        raise TrainingStopped(
            f"Stopped at step {self.step} of {self.total}. The state is saved. Continue with resume=True.",
            self.stop_signal.received or int(signal.SIGTERM),
        )

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write the report and return it; `seconds` is the time spent on the timed steps, without evaluation."""
        steps = self.step - self.clock.first_step
        report = {
            "output": str(self.plan.output),
            "best": _best_row(self.history),
            "last": self.history[-1],
            "images_per_second": steps * self.recipe.batch_size / seconds if steps else None,
            "share_waiting_for_data": self.clock.waiting / seconds if steps else None,
            "devices": jax.device_count(),
            "platform": jax.default_backend(),
        }
        if jax.process_index() == 0:
            values = {**report, **self.plan.settings.provenance()}
            files._write_text(self.plan.output / _REPORT_FILE, json.dumps(values, indent=2) + "\n")
        return report
