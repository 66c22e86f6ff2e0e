"""Encoded images from bytes, open files and URLs, and the memory that decoding takes."""

import base64
import contextlib
import http.server
import io
import socket
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from image_samples import assert_same_bits, make_image, random_levels, values
from levit_flax import image_sources
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.images import ImageError, _load_image


def encoded(format="PNG"):
    file = io.BytesIO()
    make_image().save(file, format)
    return file.getvalue()


def test_bytes_and_open_files_equal_the_file(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded())
    expected = values(path)
    with path.open("rb") as file:
        for source in (encoded(), bytearray(encoded()), memoryview(encoded()), io.BytesIO(encoded()), file):
            assert_same_bits(values(source), expected)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (b"", ImageError, "The bytes of the image are empty"),
        (b"no image", ImageError, "The image is not an image: expected one of the formats"),
        (io.BytesIO(b""), ImageError, r"The open file has nothing to read: .* Rewind it with seek\(0\)"),
        (io.StringIO("text"), TypeError, "must be open in binary mode, found str"),
    ],
)
def test_unusable_bytes_raise(source, error, message):
    with pytest.raises(error, match=message):
        values(source)


@pytest.fixture
def server():
    answers = {
        "/image.png": (200, encoded()),
        "/%C3%A4%20b.png": (200, encoded()),
        "/empty": (200, b""),
        "/large": (200, bytes(3000)),
        "/moved": (302, b"", "/image.png"),
        "/elsewhere": (302, b"", "ftp://127.0.0.1/image.png"),
        "/loop": (302, b"", "/loop"),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(bytes(image_sources._CHUNK))
                        time.sleep(0.02)
            else:
                self.answer(*answers.get(self.path, (404, b"")))

        def answer(self, status, content, location=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if location:
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_urls_are_downloaded(server):
    expected = values(encoded())
    assert_same_bits(values(f"{server}/image.png"), expected)
    assert_same_bits(values(f"{server}/moved"), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", r"/none cannot be downloaded: the server answered 404 \("),
        ("empty", "/empty is empty: expected an encoded image"),
        ("large", "/large is not an image"),
        ("elsewhere", "redirects to another scheme: expected http or https, found ftp://"),
        ("loop", "/loop cannot be downloaded: the server answered 302"),
    ],
)
def test_urls_without_an_image_raise(server, name, message):
    with pytest.raises(ImageError, match=message):
        values(f"{server}/{name}")


def test_downloads_are_limited_in_size_and_time(server, monkeypatch):
    monkeypatch.setattr(image_sources, "_MOST_SECONDS", 0.2)
    with pytest.raises(ImageError, match="/slow cannot be downloaded: it took longer than 0 seconds"):
        values(f"{server}/slow")
    monkeypatch.setattr(image_sources, "_MOST_BYTES", 1000)
    with pytest.raises(ImageError, match="/large is too large: expected at most 0 MiB"):
        values(f"{server}/large")


@pytest.mark.parametrize(
    ("answer", "delay", "message"),
    [
        (b"garbage\r\n\r\n", 0, "cannot be downloaded: garbage"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + bytes(40), 0.1, "it took longer than"),
        (b"HTTP/1.1 200 OK\r\n\r\nX-Header: " + bytes(40), 0.1, "it took longer than"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + bytes(40),
            0,
            "is incomplete: expected 999 bytes",
        ),
    ],
)
def test_servers_that_drip_or_do_not_speak_http_raise_in_time(monkeypatch, answer, delay, message):
    monkeypatch.setattr(image_sources, "_MOST_SECONDS", 0.3)

    def serve():
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            header, _, body = answer.partition(b"\r\n\r\n")
            connection.sendall(header + (b"\r\n" if body.startswith(b"X-") else b"\r\n\r\n"))
            for i in range(len(body)):
                time.sleep(delay)
                connection.sendall(body[i : i + 1])

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        start = time.perf_counter()
        with pytest.raises(ImageError, match=message):
            values(f"http://127.0.0.1:{server.getsockname()[1]}/a.png")
        assert time.perf_counter() - start < 2


def test_urls_with_spaces_and_letters_are_quoted(server):
    assert_same_bits(values(f"{server}/ä b.png"), values(encoded()))


def test_data_urls_are_decoded():
    text = base64.b64encode(encoded()).decode()
    assert_same_bits(values(f"data:image/png;base64,{text}"), values(encoded()))
    for url, message in (
        ("data:image/png,abc", "expected a URL of the form data:image/png;base64"),
        ("data:image/png;base64,???", "expected base64, found other text"),
        ("data:image/png;base64,", "is empty"),
        (f"data:image/png;base64,{'A' * 10_000}", "is not an image"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            values(url)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["ftp://host/a.png", "file:///a.png"])
def test_other_schemes_raise(name):
    with pytest.raises(ImageError, match=f"^{name} cannot be opened: expected a path or an http or https URL"):
        values(name)


class Broken:
    def read(self):
        raise OSError("the disk is gone")


def test_files_that_cannot_be_read_raise(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded())
    with (tmp_path / "image.png").open("rb") as closed:
        pass
    with (tmp_path / "image.png").open(encoding="utf-8") as text:
        for file, reason in ((closed, "closed file"), (text, "decode"), (Broken(), "the disk is gone")):
            with pytest.raises(ImageError, match=f"The open file cannot be read .*{reason}.*: expected an open binary"):
                values(file)
    doubled = bytes(byte for byte in encoded() for _ in range(2))
    assert_same_bits(values(memoryview(doubled)[::2]), values(encoded()))


def test_unreachable_server_raises():
    with pytest.raises(
        ImageError, match=r"127\.0\.0\.1:9/a\.png cannot be downloaded: .* Check the URL and the network"
    ):
        values("http://127.0.0.1:9/a.png")


def test_closed_images_raise(tmp_path):
    make_image().save(tmp_path / "image.png")
    image = Image.open(tmp_path / "image.png")
    image.close()
    with pytest.raises(ImageError, match="The PIL image"):
        values(image)


@pytest.mark.parametrize("library", ["numpy", "jax", "torch"])
def test_bfloat16_arrays_are_read_like_float32(library):
    pixels = (random_levels() / 255).astype(ml_dtypes.bfloat16)
    expected = values(pixels.astype(np.float32), do_rescale=False)
    if library == "jax":
        pixels = pytest.importorskip("jax.numpy").asarray(pixels)
    if library == "torch":
        torch = pytest.importorskip("torch")
        pixels = torch.from_numpy(pixels.astype(np.float32)).bfloat16()
    assert_same_bits(values(pixels, do_rescale=False), expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_follow_the_mean(tmp_path, channels):
    processor = LevitImageProcessor(size=16, crop_size=16, image_mean=[0.5] * channels, image_std=[0.5] * channels)
    mode = "L" if channels == 1 else "RGBA"
    image = make_image("RGBA")
    image.save(tmp_path / "image.png")
    expected = processor(
        np.asarray(image.convert(mode)), return_tensors="np", input_data_format=None if channels > 1 else "none"
    )
    assert expected.pixel_values.shape == (1, 16, 16, channels)
    assert_same_bits(processor(tmp_path / "image.png", return_tensors="np").pixel_values, expected.pixel_values)
    if channels == 1:
        for other in ("RGB", "P", "CMYK", "1", "I;16"):
            assert processor(make_image("L").convert(other), return_tensors="np").pixel_values.shape == (1, 16, 16, 1)


def test_memory_of_decoded_images_is_limited_across_threads(monkeypatch):
    budget = image_sources._MemoryBudget(100)
    running, most, lock = [0], [0], threading.Lock()

    def work(amount):
        with budget.reserve(amount):
            with lock:
                running[0] += amount
                most[0] = max(most[0], running[0])
            time.sleep(0.005)
            with lock:
                running[0] -= amount

    threads = [threading.Thread(target=work, args=(40,)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 80
    work(1000)  # alone, more than the limit is admitted
    assert most[0] == 1000


def test_processor_holds_the_memory_until_the_image_is_resized(tmp_path, monkeypatch):
    budget = image_sources._MemoryBudget(2**30)
    monkeypatch.setattr("levit_flax.images._DECODING", budget)
    used = []
    monkeypatch.setattr(
        "levit_flax.image_processing._resize",
        lambda image, *_: used.append(budget._used) or np.zeros((20, 20, 3), np.uint8),
    )
    make_image().save(tmp_path / "image.jpg")
    values(tmp_path / "image.jpg")
    assert used == [40 * 50 * 11] and budget._used == 0
    _load_image(tmp_path / "image.jpg")
    assert budget._used == 0
