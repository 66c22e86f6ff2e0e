"""Open encoded images: files, bytes, open files and URLs, of limited size and memory."""

import base64
import contextlib
import http.client
import io
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import quote

from .files import _open_regular

_URL_SCHEMES = ("http://", "https://")
_DATA_SCHEME = "data:"
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"  # that have a meaning in URLs; others are quoted
_HEADERS = {"User-Agent": "levit-flax", "Accept-Encoding": "identity"}
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


def _is_data_url(image: Any) -> bool:
    return isinstance(image, str) and image.startswith(_DATA_SCHEME)


@contextmanager
def _opened_source(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """Open an encoded image, and yield the binary file and its name in messages."""
    if isinstance(source, str) and source.lower().startswith(_URL_SCHEMES):
        yield io.BytesIO(_download(source)), source
    elif _is_data_url(source):
        yield io.BytesIO(_decode_data_url(source)), _shortened(source)
    elif isinstance(source, str | os.PathLike):
        with _opened_file(source) as file:
            yield file, str(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise ImageError("The bytes of the image are empty: expected an encoded image, found 0 bytes.")
        yield io.BytesIO(bytes(source)), "The image"
    else:
        try:
            content = source.read()
        except (OSError, ValueError) as error:  # the latter if it is closed, or not text
            raise ImageError(
                f"The open file cannot be read ({error}): expected an open binary file with an encoded image."
            ) from error
        if not isinstance(content, bytes):
            raise TypeError(f"The file of an image must be open in binary mode, found {type(content).__name__} in it.")
        if not content:
            raise ImageError("The open file has nothing to read: expected an encoded image. Rewind it with seek(0).")
        yield io.BytesIO(content), str(getattr(source, "name", "The image"))


@contextmanager
def _opened_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    if not os.path.exists(path):
        if "://" in str(path):
            raise ImageError(f"{_shortened(path)} cannot be opened: expected a path or an http or https URL.")
        raise FileNotFoundError(f"The image {_shortened(path)} does not exist.")
    if not os.path.isfile(path):
        raise ImageError(f"{path} is not a regular file: expected an image file, found a directory or a device.")
    if os.path.getsize(path) == 0:
        raise ImageError(f"{path} is empty: expected an image file, found 0 bytes.")
    with _open_regular(Path(path)) as file:
        yield file


def _shortened(name: object) -> str:
    """Return a name for a message, without the middle of a very long one."""
    text = str(name)
    return text if len(text) <= 300 else f"{text[:80]}...{text[-20:]}"


def _decode_data_url(url: str) -> bytes:
    """Return the content of a URL of the form data:image/png;base64,..."""
    head, _, content = url.partition(",")
    if not head.endswith(";base64"):
        raise ImageError(f"{_shortened(url)} cannot be read: expected a URL of the form data:image/png;base64,...")
    try:
        decoded = base64.b64decode(content, validate=True)
    except ValueError as error:
        raise ImageError(f"{_shortened(url)} cannot be read: expected base64, found other text ({error}).") from None
    if not decoded:
        raise ImageError(f"{_shortened(url)} is empty: expected an encoded image, found 0 bytes.")
    return decoded


class _Watchdog:
    """Ends the connections of a download when its time is up, whatever they wait for."""

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        for each in self._sockets:
            each.close()

    def _expire(self) -> None:
        self.expired = True
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def connect(self, kind: Any, host: str, **options: Any) -> Any:
        """Return a connection of `http.client` that is watched."""
        connection = kind(host, **options)
        create = connection._create_connection

        def create_watched(*arguments: Any, **options: Any) -> socket.socket:
            opened: socket.socket = create(*arguments, **options)
            self._sockets.append(opened.dup())  # TLS takes the original away
            if self.expired:
                raise TimeoutError
            return opened

        connection._create_connection = create_watched
        return connection

    def handlers(self) -> list[urllib.request.BaseHandler]:
        """Return handlers for http and https."""
        watchdog = self

        class Http(urllib.request.HTTPHandler):
            def http_open(self, request: Any) -> Any:
                return self.do_open(partial(watchdog.connect, http.client.HTTPConnection), request)

        class Https(urllib.request.HTTPSHandler):
            def https_open(self, request: Any) -> Any:
                return self.do_open(partial(watchdog.connect, http.client.HTTPSConnection), request)

        return [Http(), Https()]


class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    """Follow few redirects, and only to http and https."""

    max_redirections = 5

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, url: str) -> Any:
        if not url.lower().startswith(_URL_SCHEMES):
            raise ImageError(f"{request.full_url} redirects to another scheme: expected http or https, found {url}.")
        return super().redirect_request(request, file, code, message, headers, url)


def _download(url: str) -> bytes:
    """Return the content of an http or https URL, of limited size and time."""
    content = bytearray()
    request = urllib.request.Request(quote(url, safe=_URL_CHARACTERS), headers=_HEADERS)
    with _Watchdog(_MOST_SECONDS) as watchdog:
        opener = urllib.request.build_opener(_HttpRedirects, *watchdog.handlers())
        try:
            with opener.open(request, timeout=10) as answer:
                while chunk := answer.read1(_CHUNK):
                    content += chunk
                    if len(content) > _MOST_BYTES:
                        raise ImageError(f"{url} is too large: expected at most {_MOST_BYTES // 2**20} MiB.")
                length = answer.headers.get("Content-Length")
        except urllib.error.HTTPError as error:
            raise ImageError(
                f"{url} cannot be downloaded: the server answered {error.code} ({error.reason})."
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, ImageError):
                raise
            if watchdog.expired:
                raise _too_slow(url) from None
            reason = getattr(error, "reason", error)
            raise ImageError(f"{url} cannot be downloaded: {reason}. Check the URL and the network.") from None
        if watchdog.expired:
            raise _too_slow(url)
    if not content:
        raise ImageError(f"{url} is empty: expected an encoded image, found 0 bytes.")
    if length and length.isdigit() and int(length) != len(content):
        raise ImageError(f"{url} is incomplete: expected {length} bytes, found {len(content)}. Try again.")
    return bytes(content)


def _too_slow(url: str) -> ImageError:
    return ImageError(f"{url} cannot be downloaded: it took longer than {_MOST_SECONDS:.0f} seconds.")


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
