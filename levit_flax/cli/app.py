"""The `levit-flax` application: registers the commands and handles errors.

Results are printed to stdout, progress, warnings and errors to stderr. Heavy modules are imported inside the commands,
so that `--help` is fast.
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
    """Return the user's cache directory for this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "levit-flax"
