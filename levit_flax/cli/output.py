"""Print results to stdout, and errors, warnings and progress to stderr."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .flags import with_flags

T = TypeVar("T")

_SHOW_PROGRESS_FROM = 64  # images


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))


def print_fields(fields: dict[str, Any]) -> None:
    """Print one line for each field that has a value."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_rounded(entry)}" for key, entry in value.items())
        value = _rounded(value)
        if value not in (None, ""):
            print(f"{name:{width}}  {with_flags(value)}")


def _rounded(value: Any) -> Any:
    """Round a measured number to four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else value


def print_error(message: object) -> None:
    """Print an error to stderr."""
    print_notice(f"error: {message}")


def print_warning(message: object) -> None:
    """Print a warning to stderr."""
    print_notice(f"warning: {message}")


def print_notice(message: object) -> None:
    """Print a message to stderr, with flags in place of the library's parameters."""
    print(with_flags(message), file=sys.stderr)


def with_progress(results: Iterable[T], total: int | None) -> Iterator[T]:
    """Yield the results, with a progress bar on a terminal if there are many, or if their number is not known."""
    if (total is not None and total < _SHOW_PROGRESS_FROM) or not sys.stderr.isatty():
        yield from results
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(results, total=total, description="images", console=Console(stderr=True), transient=True)


@contextmanager
def training_progress() -> Iterator[Callable[[Any], None]]:
    """Yield a function that prints each evaluation and updates a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None, epoch=1, numbers="")
        last = None

        def show(now: Any) -> None:
            nonlocal last
            loss = "" if now.loss is None else f"loss {now.loss:.4f}  "
            accuracy = "" if now.accuracy is None else f"accuracy {now.accuracy:.2%}  "
            numbers = f"{loss}{accuracy}{now.images_per_second:.0f} images/s"
            bar.update(task, completed=now.step, total=now.total, epoch=now.epoch, numbers=numbers)
            if now.evaluation is not None and now.evaluation != last:
                last = now.evaluation
                values = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in last.items())
                console.print(f"{values}  {now.images_per_second:.0f} images/s")

        yield show
