"""The states of a training on disk, through Orbax: written while it goes on, the best and the last kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grain
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
        self._manager = ocp.CheckpointManager(directory, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint; None before the first."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, state: State, batches: Any, progress: dict[str, Any], goodness: float | None) -> None:
        """Begin to save a checkpoint; it is written while the training goes on.

        Args:
            step: its number.
            state: of the training.
            batches: Grain's iterator, at the place to go on from.
            progress: JSON-ready values.
            goodness: by which the best one is found, more is better; None where it was not measured.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            batches=grain.checkpoint.CheckpointSave(batches),
            progress=ocp.args.JsonSave(progress),
        )
        with self._writing():
            self._manager.save(step, args=args, metrics=None if goodness is None else {GOODNESS: goodness}, force=True)

    def wait(self) -> None:
        """Wait until all that was begun is written."""
        with self._writing():
            self._manager.wait_until_finished()

    def restore(self, example: State, batches: Any) -> Restored:
        """Read the last checkpoint.

        Args:
            example: a state of the same shapes, types and shardings.
            batches: Grain's iterator, which is set to the place to go on from.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), example)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes),
            batches=grain.checkpoint.CheckpointRestore(batches),
            progress=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(self.latest, args=args)
        return Restored(restored["state"], restored["progress"])

    def close(self) -> None:
        """Wait, and let go of the directory."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what holds where something cannot be written, whatever Orbax and its storage call that."""
        try:
            yield
        except Exception as error:
            last = self.latest
            held = f"The last whole checkpoint is that of step {last}" if last else "There is no whole checkpoint yet"
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise OSError(
                f"Cannot save in {self.directory}: {reason}. {held}: make room and go on with --resume."
            ) from error
