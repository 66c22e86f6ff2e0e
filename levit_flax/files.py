"""Read regular files of limited size, write files and directories atomically, and explain why a write failed."""

import contextlib
import ctypes
import errno
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

_MOST_TEXT_BYTES = 16 * 2**20  # far above the config of any model
_MOST_HEADER_BYTES = 8 * 2**20  # far above the 0.1 MiB of LeViT-384

# The names of folders inside a directory whose files are being replaced, see `_replace_inside`.
_NEW, _RETIRING, _OLD = ".levit-flax-new", ".levit-flax-retiring", ".levit-flax-old"

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)

_JSON_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading, or raise OSError. Others may block forever or never end."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise _cannot_read(path, error) from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise _not_regular(path, mode)
    return os.fdopen(handle, "rb")


def _not_regular(path: Path, mode: int) -> OSError:
    found = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "another kind of file")
    return OSError(f"{path} cannot be read: expected a regular file, found {found}.")


def _cannot_read(path: Path, error: OSError) -> OSError:
    """Return the error to raise when a path cannot be opened."""
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        reason = f"it is a link to {os.readlink(path)}, which does not exist"
    elif isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{path} does not exist. Check the path.")
    elif error.errno == errno.ELOOP:
        reason = "its links form a loop"
    elif error.errno == errno.ENXIO:  # a socket, which cannot even be opened
        return _not_regular(path, path.stat().st_mode)
    else:
        reason = f"{error.strerror}"
    return type(error)(f"{path} cannot be read: {reason}. Check the path.")


def _check_regular(path: Path) -> None:
    """Raise OSError unless the path is a regular file that can be opened."""
    _open_regular(path).close()


def _check_header(path: Path) -> None:
    """Raise OSError unless a safetensors file can be opened, and ValueError if its header is absurdly large.

    The first eight bytes of such a file are the length of its header, which would be read and parsed as a whole.
    """
    with _open_regular(path) as file:
        start = file.read(8)
    if start == b"version ":
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself. Download the file with `git lfs pull`.")
    length = int.from_bytes(start, "little")
    if length > _MOST_HEADER_BYTES:
        raise ValueError(
            f"{path} is damaged or not a model: expected a header of at most {_MOST_HEADER_BYTES // 2**20} MiB, found"
            f" one of {length} bytes. Copy or download it again."
        )


def _read_bytes(path: Path) -> bytes:
    """Return the content of a small regular file; raise ValueError if it is too large."""
    with _open_regular(path) as file:
        content = file.read(_MOST_TEXT_BYTES + 1)
    if len(content) > _MOST_TEXT_BYTES:
        raise ValueError(f"{path} is too large: expected at most {_MOST_TEXT_BYTES // 2**20} MiB.")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ValueError if there is none."""
    content = _read_bytes(path)
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: its values are nested too deeply.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    except ValueError:  # Python refuses to read integers with thousands of digits
        raise ValueError(f"{path} is not valid JSON: one of its numbers has too many digits.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is malformed: expected a JSON object, found {_JSON_KINDS[type(value)]}.")
    return value


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
    occupied = directory.is_dir() and any(entry.name not in (_NEW, _RETIRING, _OLD) for entry in directory.iterdir())
    if occupied and not overwrite:
        raise FileExistsError(
            f"{directory} is not empty: expected an empty directory or an unused name. Choose another name, or pass"
            " overwrite=True to replace the model in it."
        )
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise OSError(f"Cannot write {directory}: {existing} is not writable. Choose another location.")


@contextlib.contextmanager
def _staged_directory(directory: Path, overwrite: bool, replaceable: Collection[str], marker: str) -> Iterator[Path]:
    """Yield a temporary directory to write to, whose files appear in `directory` if the block succeeds.

    Args:
        directory: the directory to write.
        overwrite: replace the files of an earlier write. Other files in `directory` are kept.
        replaceable: names of the files that an earlier write may have left.
        marker: name of the file without which a reader does not accept the directory. It is written last.
    """
    _check_free(directory, overwrite)
    directory = directory.expanduser().resolve()
    inside = directory.is_dir() and _must_stay(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.is_dir():
            _recover(directory, replaceable)
        staging = (
            directory / _NEW if inside else Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        )
        staging.mkdir(exist_ok=True)
    except OSError as error:
        raise _cannot_write(directory, error) from None
    try:
        staging.chmod(_permissions(0o777))  # mkdtemp creates it with mode 0700
        with _explain_full_disk(directory):
            yield staging
            if not directory.exists():
                os.rename(staging, directory)
            elif inside or not _exchange(directory, staging, replaceable):
                _replace_inside(directory, staging, replaceable, marker)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _must_stay(directory: Path) -> bool:
    """Return whether a directory must be filled and not be replaced by another one.

    A mount point cannot be replaced, the parent may not be writable, and the programs that stand in a directory would
    keep the old one.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was deleted
        here = None
    return (
        directory.is_mount()
        or (here is not None and directory in (here, *here.parents))
        or not os.access(directory.parent, os.W_OK)
    )


def _exchange(directory: Path, staging: Path, replaceable: Collection[str]) -> bool:
    """Exchange two directories in one step and keep the other files of `directory`, if the system can do so."""
    written = os.listdir(staging)
    others = [entry for entry in directory.iterdir() if entry.name not in (*replaceable, *written)]
    with contextlib.suppress(OSError):  # not one file system, or no links
        for entry in others:
            _link(entry, staging / entry.name)
        if _rename_exchange(directory, staging):
            return True
    for name in set(os.listdir(staging)) - set(written):
        linked = staging / name
        shutil.rmtree(linked) if linked.is_dir() and not linked.is_symlink() else linked.unlink()
    return False


def _link(source: Path, target: Path) -> None:
    """Add a second name for a file, or for all files of a folder."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=os.link)
    else:
        os.link(source, target, follow_symlinks=False)


def _rename_exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories in one step; False if the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def _replace_inside(directory: Path, staging: Path, replaceable: Collection[str], marker: str) -> None:
    """Move the files of `staging` into `directory`, the marker last.

    The old files are kept until then, so that `_recover` can restore them if the process is killed.
    """
    if staging.parent != directory:  # possibly on another file system
        shutil.copytree(staging, directory / _NEW)
        staging = directory / _NEW
    retiring = directory / _RETIRING
    retiring.mkdir()
    try:
        for name in _marker_first(replaceable, marker):
            if (directory / name).exists():
                os.rename(directory / name, retiring / name)
        os.rename(retiring, directory / _OLD)
        for name in reversed(_marker_first(os.listdir(staging), marker)):
            os.rename(staging / name, directory / name)
    except OSError:
        _recover(directory, replaceable)
        raise
    _recover(directory, replaceable)


def _marker_first(names: Collection[str], marker: str) -> list[str]:
    return sorted(names, key=lambda name: (name != marker, name))


def _recover(directory: Path, replaceable: Collection[str]) -> None:
    """Remove the temporary folders of a replacement, and restore the old files if it was interrupted."""
    new, retiring, old = (directory / name for name in (_NEW, _RETIRING, _OLD))
    if old.is_dir() and new.is_dir() and any(new.iterdir()):  # some new files are in place, but not all
        for name in replaceable:
            (directory / name).unlink(missing_ok=True)
        os.rename(old, retiring)
    if retiring.is_dir():
        for entry in retiring.iterdir():
            os.rename(entry, directory / entry.name)
    for folder in (new, retiring, old):
        if folder.is_dir():
            shutil.rmtree(folder)


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
    """Write a UTF-8 text file atomically; bytes of file names that are not text are escaped."""
    _write_atomically(path, lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace"))
