"""The states of a training on disk, through Orbax: written while it goes on, the best and the last kept."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from .state import State

GOODNESS = "goodness"


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        state: of the training.
        progress: JSON-ready values that were saved with it.
    """

    state: State
    progress: dict[str, Any]


class Checkpoints:
    """Keep the best and the last state of a training.

    Args:
        directory: where to; made if it does not exist.

    Raises:
        OSError: a checkpoint cannot be written; the message says which one is whole.
    """

    def __init__(self, directory: Path) -> None:
        policies = ocp.checkpoint_managers.preservation_policy
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[GOODNESS], n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
            cleanup_tmp_directories=True,
        )
        self.directory = directory
        self._quiet = ExitStack()
        self._quiet.enter_context(quiet())
        self._manager = ocp.CheckpointManager(directory, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint; None before the first."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, state: State, progress: dict[str, Any], goodness: float | None) -> None:
        """Begin to save a checkpoint; it is written while the training goes on.

        Args:
            step: its number.
            state: of the training.
            progress: JSON-ready values.
            goodness: by which the best one is found, more is better; None where it was not measured.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with self.writing():
            self._manager.save(step, args=args, metrics=None if goodness is None else {GOODNESS: goodness}, force=True)

    def wait(self) -> None:
        """Wait until all that was begun is written."""
        with self.writing():
            self._manager.wait_until_finished()

    def restore(self, example: State) -> Restored:
        """Read the last checkpoint.

        Args:
            example: a state of the same shapes, types and shardings.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), example)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest, args=args)
        return Restored(restored["state"], restored["progress"])

    def close(self) -> None:
        """Wait, and let go of the directory."""
        with self.writing():
            self._manager.close()
        self._quiet.close()

    @contextmanager
    def writing(self, failures: type[Exception] = Exception) -> Iterator[None]:
        """Say what holds where something cannot be written; Orbax and its storage have many names for that."""
        try:
            yield
        except failures as error:
            self._quiet.pop_all()  # for good: what failed goes on failing for a while
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            steps = ocp.utils.checkpoint_steps(self.directory)  # the manager counts those that are being written, too
            held = f"The last whole checkpoint is that of step {max(steps)}" if steps else "There is no checkpoint yet"
            raise OSError(
                f"Cannot save in {self.directory.parent}: {reason(error)}. {held}: make room and go on with --resume."
            ) from error


def reason(error: Exception) -> str:
    """Return why something could not be written, without the pages that TensorStore says about it."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    text = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return text.rstrip(".") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what fails in the background from being printed, in hundreds of tracebacks: it is raised as well."""
    loggers = {name: logging.getLogger(name) for name in ("absl", "asyncio")}
    levels = {name: logger.level for name, logger in loggers.items()}
    print_unraisable = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):  # from TensorStore's threads
            print_unraisable(unraisable)

    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = hook
    yield
    for name, logger in loggers.items():
        logger.setLevel(levels[name])
    sys.unraisablehook = print_unraisable
