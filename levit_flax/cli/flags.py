"""Name command-line flags in the library's messages.

The library's messages name Python parameters, such as `overwrite=True`. In what a command prints, `with_flags` replaces
them by the flags that the command has.
"""

import re
from collections.abc import Collection

FLAGS = {
    "batch_size=...": "--batch-size",
    "dtype=...": "--dtype",
    "ema=True": "--ema",
    "export_torch=...": "--export-torch",
    "image_size=...": "--image-size",
    "layout=...": "--to",
    "local_files_only=True": "--offline",
    "model=...": "--model",
    "overwrite=True": "--force",
    "resume=True": "--resume",
    "skip=...": "--skip",
    "teacher=...": "--teacher",
    "verify=False": "--no-verify",
}

_PARAMETER = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, FLAGS))})(?!\w)")

_running: set[str] = set()  # the flags of the running command


def use_flags(flags: Collection[str]) -> None:
    """Set the flags of the running command."""
    _running.clear()
    _running.update(flags)


def with_flags(message: object) -> str:
    """Return a message with parameters replaced by flags of the running command."""

    def replace(match: re.Match[str]) -> str:
        flag = FLAGS[match[0]]
        return flag if flag in _running else match[0]

    return _PARAMETER.sub(replace, str(message))
