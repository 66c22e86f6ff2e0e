"""Save and restore the checkpoints of a training run with Orbax."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from .state import _State


class _Restored(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
        state: the training state.
        progress: JSON-ready values saved with it.
    """

    state: _State
    progress: dict[str, Any]


class _BestAndLast:
    """Orbax's policy that keeps the checkpoints of the best and of the last step.

    Orbax's own policy for the best checkpoint forgets the metrics if the process is restarted.
    """

    best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint, in the order of the steps, whether to keep it."""
        last = max(info.step for info in checkpoints)
        return [info.step in (self.best_step, last) for info in checkpoints]


class _Checkpoints:
    """Save the training state in the background, keep the best and the last checkpoint, and restore it.

    If a checkpoint cannot be written, all methods raise OSError with the step of the last complete one.
    """

    def __init__(self, directory: Path) -> None:
        self._policy = _BestAndLast()
        options = ocp.CheckpointManagerOptions(preservation_policy=self._policy, cleanup_tmp_directories=True)
        self.directory = directory
        self._quiet = ExitStack()
        self._quiet.enter_context(_quiet())
        self._manager = ocp.CheckpointManager(directory, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint; None if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, state: _State, progress: dict[str, Any], best_step: int | None) -> None:
        """Start saving a checkpoint in the background.

        `best_step` is the step of the best evaluation so far, whose checkpoint is kept; None before the first one.
        """
        self._policy.best_step = best_step
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with self.writing():
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Wait until all checkpoints are written."""
        with self.writing():
            self._manager.wait_until_finished()

    def restore(self, example: _State) -> _Restored:
        """Return the last checkpoint, with the shapes, dtypes and shardings of `example`."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), example)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest, args=args)
        return _Restored(restored["state"], restored["progress"])

    def close(self) -> None:
        """Wait until all checkpoints are written, and release the directory."""
        with self.writing():
            self._manager.close()
        self._quiet.close()

    @contextmanager
    def writing(self, failures: type[Exception] = Exception) -> Iterator[None]:
        """Explain which checkpoint is still valid when a write fails; Orbax raises many types of errors then."""
        try:
            yield
        except failures as error:
            self._quiet.pop_all()  # stay quiet: background writes keep failing for a while
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            steps = ocp.utils.checkpoint_steps(self.directory)  # unlike the manager, counts only complete ones
            kept = (
                f"The last complete checkpoint is that of step {max(steps)}" if steps else "There is no checkpoint yet"
            )
            raise OSError(
                f"Cannot save in {self.directory.parent}: {_reason(error)}. {kept}. Free some space and continue with"
                " resume=True."
            ) from error


def _reason(error: Exception) -> str:
    """Return the reason of a failed write, without TensorStore's long report."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    text = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return text.rstrip(".") or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the hundreds of tracebacks of failed background writes, which are also raised as errors."""
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
