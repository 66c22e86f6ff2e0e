"""Replace Python parameters with command-line flags in the library's messages.

The library names Python parameters in its messages, such as `overwrite=True`. The command line prints the flag of the
running command instead, such as `--force`. A parameter without a flag in the running command is printed unchanged.
"""

import re
from collections.abc import Collection

FLAGS = {
    "PIL.Image.MAX_IMAGE_PIXELS": "--max-image-pixels",
    "batch_size=...": "--batch-size",
    "data_revision=...": "--data-revision",
    "dtype=...": "--dtype",
    "ema=True": "--ema",
    "export_torch=...": "--export-torch",
    "image_column=...": "--image-column",
    "image_size=...": "--image-size",
    "label_column=...": "--label-column",
    "layout=...": "--to",
    "local_files_only=True": "--offline",
    "max_drop=...": "--max-drop",
    "model=...": "--model",
    "overwrite=True": "--force",
    "resume=True": "--resume",
    "prefix=...": "--prefix",
    "skip=...": "--skip",
    "source_image_size=...": "--source-image-size",
    "split=...": "--split",
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
