"""Write files and directories atomically, and explain why a write failed."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path


def _cannot_write(path: Path, error: OSError) -> OSError:
    """Return the error to raise when a path cannot be written."""
    name = f" ({error.filename})" if error.filename else ""
    return OSError(f"Cannot write {path}: {error.strerror}{name}. Choose a writable location with enough space.")


@contextlib.contextmanager
def _explain_full_disk(path: Path) -> Iterator[None]:
    """Raise an error that names `path` if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _cannot_write(path, error) from None
        raise


def _make_directory(directory: Path) -> None:
    """Create a directory and its parents."""
    try:
        directory.expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(directory, error) from None


def _check_free(directory: Path, overwrite: bool) -> None:
    """Raise FileExistsError if a model must not be written to this directory."""
    directory = directory.expanduser()
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: expected a directory or an unused name. Choose another name.")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{directory} is not empty: expected an empty directory or an unused name. Choose another name, or pass"
            " overwrite=True to replace the model in it."
        )


@contextlib.contextmanager
def _staged_directory(directory: Path, overwrite: bool, replaceable: Collection[str]) -> Iterator[Path]:
    """Yield a temporary directory to write to, and rename it to `directory` if the block succeeds.

    With `overwrite`, only files whose names are in `replaceable` are replaced; other files in `directory` are kept.
    """
    _check_free(directory, overwrite)
    directory = directory.expanduser().resolve()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise _cannot_write(directory, error) from None
    try:
        staging.chmod(_permissions(0o777))  # mkdtemp creates it with mode 0700
        with _explain_full_disk(directory):
            yield staging
        _replace_directory(directory, staging, replaceable)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_directory(directory: Path, staging: Path, replaceable: Collection[str]) -> None:
    """Rename `staging` to `directory`, keeping the old directory's files that are not replaceable."""
    if not directory.exists():
        os.rename(staging, directory)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    os.rename(directory, retired)
    os.rename(staging, directory)
    for entry in retired.iterdir():
        if entry.name not in replaceable and not (directory / entry.name).exists():
            os.rename(entry, directory / entry.name)
    shutil.rmtree(retired)


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Pass a temporary file to `write`, and rename it to `path` if `write` succeeds."""
    path = path.expanduser().resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from None
    os.close(handle)
    staging = Path(name)
    try:
        with _explain_full_disk(path):
            write(staging)
        staging.chmod(_permissions(0o666))  # mkstemp creates it with mode 0600
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def _permissions(mode: int) -> int:
    """Return the mode of a new file or directory under the umask of the process."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def _write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    _write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
