"""The `levit-flax` application: registers the commands and handles errors.

Results are printed to stdout, progress, warnings and errors to stderr. Heavy modules are imported inside the commands,
so that `--help` is fast.
"""

import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from .classify import classify
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .exit_status import FAILED, exit_status
from .explain import explain
from .export import export
from .finetune import finetune
from .flags import use_flags
from .info import info
from .output import print_error, print_notice, print_warning

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (convert, classify, evaluate, finetune, explain, export, info, demo):
    app.command()(command)


def _find_backend_error() -> str | None:
    """Return why JAX cannot compute here, or None if it can."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms, reason = os.environ.get("JAX_PLATFORMS", ""), str(error) or "found no such device"
        return (
            f"JAX cannot compute on JAX_PLATFORMS={platforms}: {reason}. Unset JAX_PLATFORMS, or set it to a platform"
            " of this machine, such as cpu."
        )
    return None


def _print_version(requested: bool) -> None:
    if requested:
        print(f"levit-flax {version('levit-flax')}")
        raise typer.Exit


_VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]


@app.callback()
def _start(context: typer.Context, show_version: _VersionOption = False) -> None:
    """LeViT for JAX: convert PyTorch checkpoints, classify, evaluate, explain, fine-tune and export."""
    assert isinstance(context.command, TyperGroup)
    command = context.command.commands[str(context.invoked_subcommand)]
    use_flags([flag for option in command.params for flag in (*option.opts, *option.secondary_opts)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `levit-flax` command.

    Compiled models are cached in `$XDG_CACHE_HOME/levit-flax` (by default `~/.cache/levit-flax`). Set the environment
    variable JAX_COMPILATION_CACHE_DIR to use another directory, or JAX_ENABLE_COMPILATION_CACHE=false for no cache.

    Args:
        arguments: the arguments after the name of the command; None for those of the process, `sys.argv[1:]`.

    Returns:
        The exit status: 0 for success, 1 if the work failed, 2 if the arguments are wrong, 130 if interrupted, or
        128 plus the signal that stopped a training run.

    Examples:
        >>> main(["info"])
        levit-128S  parameters 7777058, hidden_sizes [128, 256, 384], depths [2, 3, 4]
        levit-128   parameters 9213936, hidden_sizes [128, 256, 384], depths [4, 4, 4]
        levit-192   parameters 10947069, hidden_sizes [192, 288, 384], depths [4, 4, 4]
        levit-256   parameters 18893876, hidden_sizes [256, 384, 512], depths [4, 4, 4]
        levit-384   parameters 39128836, hidden_sizes [384, 512, 768], depths [4, 4, 4]
        0
    """
    # Set before JAX is imported. JAX's own threshold of one second leaves small models out of the cache.
    cache = _cache_directory()
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files and classes may not be encodable
    warnings.showwarning = lambda message, *_, **__: print_warning(message)
    try:
        app(args=arguments, prog_name="levit-flax")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the reader of stdout, such as `head`, has ended
            return 128 + signal.SIGPIPE
        return end.code if isinstance(end.code, int) else 0
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        return exit_status(error)
    except (RuntimeError, AssertionError):  # JAX raises either if a platform is missing
        message = _find_backend_error()
        if message is None:
            raise
        print_error(message)
        return FAILED
    except KeyboardInterrupt:
        print_notice("interrupted")
        return 130
    return 0


def _cache_directory() -> Path | None:
    """Return the user's cache directory for this package, or None if it cannot be created."""
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "levit-flax"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        return None
    return directory if os.access(directory, os.W_OK) else None
