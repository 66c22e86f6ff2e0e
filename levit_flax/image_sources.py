"""Open encoded images: files, bytes, open files and URLs, of limited size and memory."""

import http.client
import io
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .files import _open_regular

_URL_SCHEMES = ("http://", "https://")
_MOST_BYTES = 128 * 2**20  # of an encoded image
_MOST_SECONDS = 30.0  # of a download
_CHUNK = 2**16


class ImageError(ValueError):
    """Raised when an image cannot be used.

    Examples:
        >>> import numpy as np
        >>> from levit_flax import LevitImageProcessor
        >>> try:
        ...     LevitImageProcessor()(np.full((8, 8, 3), np.nan))
        ... except ImageError as error:
        ...     print(error)
        The image is not valid: expected finite pixel values, found NaN or infinity.
    """


def _is_encoded(image: Any) -> bool:
    """Return whether an object contains or names an encoded image: a path, a URL, bytes or an open file."""
    return isinstance(image, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(image, "read")


@contextmanager
def _opened_source(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """Open an encoded image, and yield the binary file and its name in messages."""
    if isinstance(source, str) and source.lower().startswith(_URL_SCHEMES):
        yield io.BytesIO(_download(source)), source
    elif isinstance(source, str | os.PathLike):
        with _opened_file(source) as file:
            yield file, str(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise ImageError("The bytes of the image are empty: expected an encoded image, found 0 bytes.")
        yield io.BytesIO(source), "The image"
    else:
        content = source.read()
        if not isinstance(content, bytes):
            raise TypeError(f"The file of an image must be open in binary mode, found {type(content).__name__} in it.")
        if not content:
            raise ImageError("The open file has nothing to read: expected an encoded image. Rewind it with seek(0).")
        yield io.BytesIO(content), str(getattr(source, "name", "The image"))


@contextmanager
def _opened_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"The image {path} does not exist.")
    if not os.path.isfile(path):
        raise ImageError(f"{path} is not a regular file: expected an image file, found a directory or a device.")
    if os.path.getsize(path) == 0:
        raise ImageError(f"{path} is empty: expected an image file, found 0 bytes.")
    with _open_regular(Path(path)) as file:
        yield file


class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    """Follow few redirects, and only to http and https."""

    max_redirections = 5

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, url: str) -> Any:
        if not url.lower().startswith(_URL_SCHEMES):
            raise ImageError(f"{request.full_url} redirects to another scheme: expected http or https, found {url}.")
        return super().redirect_request(request, file, code, message, headers, url)


def _download(url: str) -> bytes:
    """Return the content of an http or https URL, of limited size and time."""
    end, content = time.monotonic() + _MOST_SECONDS, bytearray()
    opener = urllib.request.build_opener(_HttpRedirects)
    try:
        with opener.open(urllib.request.Request(url, headers={"User-Agent": "levit-flax"}), timeout=10) as answer:
            while chunk := answer.read1(_CHUNK):  # what has arrived, so that the limits hold for slow servers too
                content += chunk
                if len(content) > _MOST_BYTES:
                    raise ImageError(f"{url} is too large: expected at most {_MOST_BYTES // 2**20} MiB.")
                if time.monotonic() > end:
                    raise ImageError(f"{url} cannot be downloaded: it took longer than {_MOST_SECONDS:.0f} seconds.")
    except urllib.error.HTTPError as error:
        raise ImageError(f"{url} cannot be downloaded: the server answered {error.code} ({error.reason}).") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "reason", error)
        raise ImageError(f"{url} cannot be downloaded: {reason}. Check the URL and the network.") from None
    if not content:
        raise ImageError(f"{url} is empty: expected an encoded image, found 0 bytes.")
    return bytes(content)


class _MemoryBudget:
    """Limits the memory that decoded images take at the same time in all threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Wait until the memory is available; an amount above the limit waits until nothing else is reserved."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + amount <= self._limit)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()


_DECODING = _MemoryBudget(2**30)
