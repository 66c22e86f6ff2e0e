"""The `levit-flax` command: reads arguments, calls the library, prints.

Results go to stdout, progress and warnings to stderr. Exit status 0, 1 (the work failed) or 2 (the call was wrong).
Everything heavy is imported inside the commands, so that `--help` is quick. Compiled models are kept in the user's
cache directory; JAX_ENABLE_COMPILATION_CACHE=false switches that off, JAX_COMPILATION_CACHE_DIR moves it.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import typer
from typer.core import TyperGroup

from .classify import classify
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .export import export
from .finetune import finetune
from .flags import use_flags
from .info import info
from .output import print_error, print_notice, print_warning

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (convert, classify, evaluate, finetune, explain, export, info, demo):
    app.command()(command)


@app.callback()
def _start(context: typer.Context) -> None:
    """LeViT for JAX: convert PyTorch checkpoints, classify, evaluate, explain, fine-tune and export."""
    assert isinstance(context.command, TyperGroup)
    command = context.command.commands[str(context.invoked_subcommand)]
    use_flags([flag for option in command.params for flag in (*option.opts, *option.secondary_opts)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line after the program's name; None for the process's own.

    Returns:
        The exit status.
    """
    # A model that was compiled once starts sooner. JAX reads this when it is imported; by itself it keeps only what
    # took a second, which small models do not.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_directory() / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    warnings.showwarning = lambda message, *_, **__: print_warning(message)
    try:
        app(args=arguments, prog_name="levit-flax")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print_notice("interrupted")
        return 130
    return 0


def _cache_directory() -> Path:
    """Return where this program may keep what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "levit-flax"
