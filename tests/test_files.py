"""Reading regular files of limited size, and replacing directories."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from levit_flax import files

OWN = ("config.json", "weights", "report")


def write(directory, content, overwrite=True):
    with files._staged_directory(directory, overwrite, OWN, "config.json") as staging:
        for name in ("config.json", "weights"):
            (staging / name).write_text(content)


def contents(directory):
    return {path.name: path.read_text() for path in Path(directory).iterdir() if path.is_file()}


def old_directory(directory):
    directory.mkdir()
    for name in (*OWN, "notes"):
        (directory / name).write_text("old")
    (directory / "folder").mkdir()
    (directory / "folder" / "photo").write_text("mine")
    return directory


NEW = {"config.json": "new", "weights": "new", "notes": "old"}
OLD = dict.fromkeys((*OWN, "notes"), "old")


def no_exchange(monkeypatch):
    monkeypatch.setattr(files, "_rename_exchange", lambda *_: False)


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_keeps_other_files_and_leaves_nothing_behind(tmp_path, exchange, monkeypatch):
    if not exchange:
        no_exchange(monkeypatch)
    out = old_directory(tmp_path / "out")
    write(out, "new")
    assert contents(out) == NEW and (out / "folder" / "photo").read_text() == "mine"
    assert sorted(os.listdir(out)) == ["config.json", "folder", "notes", "weights"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_linux_exchanges_directories_in_one_step(tmp_path):
    out = old_directory(tmp_path / "out")
    number = out.stat().st_ino
    write(out, "new")
    assert out.stat().st_ino != number


def test_current_directory_stays_the_same_directory(tmp_path, monkeypatch):
    out = old_directory(tmp_path / "out")
    monkeypatch.chdir(out)
    number = out.stat().st_ino
    write(Path(), "new")
    assert out.stat().st_ino == number and contents(".") == NEW == contents(out)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write(Path(), "new", overwrite=False)
    assert contents(".") == {"config.json": "new", "weights": "new"}


def test_deleted_current_directory_does_not_matter(tmp_path, monkeypatch):
    out, gone = old_directory(tmp_path / "out"), tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    write(out, "new")
    assert contents(out) == NEW


def test_mount_point_is_written_inside(tmp_path):
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from test_files import contents, write\n"
        "out = Path(sys.argv[1])\n"
        "write(out, 'old', overwrite=False)\n"
        "write(out, 'new')\n"
        "same = contents(out) == {'config.json': 'new', 'weights': 'new'}\n"
        "print(same, sorted(path.name for path in out.parent.iterdir()))\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    paths = [str(Path(__file__).parent), str(Path(files.__file__).parents[1])]
    command = f'mount {{}} && exec "{sys.executable}" -c "$0" "$@"'
    for options in (f"-t tmpfs tmpfs {out}", f"--bind {out} {out}"):
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", command.format(options), program, out, *paths],
            capture_output=True,
            text=True,
            check=False,
        )
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip(f"mounting is not permitted: {done.stderr}")
        assert done.stdout == "True ['out']\n", done.stderr


@pytest.mark.parametrize("exchange", [True, False])
def test_failed_write_keeps_the_old_files(tmp_path, exchange, monkeypatch):
    if not exchange:
        no_exchange(monkeypatch)
    out = old_directory(tmp_path / "out")
    with pytest.raises(TypeError):
        write(out, None)
    assert contents(out) == OLD
    assert os.listdir(tmp_path) == ["out"]


def test_failed_move_restores_the_old_files(tmp_path, monkeypatch):
    no_exchange(monkeypatch)
    out, rename = old_directory(tmp_path / "out"), os.rename

    def fail_at_the_marker(source, target):
        if Path(source) == out / files._NEW / "config.json":
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_the_marker)
    with pytest.raises(OSError, match="the disk is gone"):
        write(out, "new")
    assert contents(out) == OLD and sorted(os.listdir(out)) == sorted([*OLD, "folder"])


@pytest.mark.parametrize("stop", range(1, 8))
def test_next_write_repairs_a_killed_replacement(tmp_path, stop, monkeypatch):
    """Stop before each rename as SIGKILL does, without cleaning up."""
    no_exchange(monkeypatch)
    out, rename, renames = old_directory(tmp_path / "out"), os.rename, []

    class Killed(BaseException):
        pass

    def count(source, target):
        renames.append(source)
        if len(renames) == stop:
            raise Killed
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", count)
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with contextlib.suppress(Killed):
            write(out, "new")
    files._recover(out, OWN)
    assert contents(out) in (OLD, NEW)
    assert not any(name.startswith(".levit") for name in os.listdir(out))


@pytest.mark.slow
def test_kills_never_leave_a_directory_without_a_complete_set(tmp_path):
    out = old_directory(tmp_path / "out")
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from test_files import write\n"
        "print(flush=True)\n"
        "while True: write(Path(sys.argv[1]), 'new')\n"
    )
    paths = [Path(__file__).parent, Path(files.__file__).parents[1]]
    for i in range(10):
        command = [sys.executable, "-c", program, out, *paths]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            time.sleep(0.003 * i)
            writer.kill()
        found = contents(out)
        assert found["config.json"] == found["weights"] and found["notes"] == "old"


def special_files(folder):
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "folder").mkdir()


@pytest.mark.parametrize(
    ("name", "kind"), [("pipe", "a named pipe"), ("device", "a device"), ("folder", "a directory")]
)
def test_only_regular_files_are_opened(tmp_path, name, kind):
    special_files(tmp_path)
    with pytest.raises(OSError, match=f"{name} cannot be read: expected a regular file, found {kind}"):
        files._read_json(tmp_path / name)


def test_sockets_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(OSError, match=r"^socket cannot be read: expected a regular file, found a socket\.$"):
            files._check_regular(Path("socket"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_links_that_lead_nowhere_raise_a_sentence(tmp_path):
    for name, target in (("link", "gone"), ("first", "second"), ("second", "first")):
        (tmp_path / name).symlink_to(target)
    with pytest.raises(FileNotFoundError, match=r"link cannot be read: it is a link to gone, which does not exist\."):
        files._check_regular(tmp_path / "link")
    with pytest.raises(OSError, match=r"first cannot be read: its links form a loop\. Check the path\.$"):
        files._check_regular(tmp_path / "first")
    with pytest.raises(FileNotFoundError, match=r"gone does not exist\. Check the path\.$"):
        files._check_regular(tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "found"), [("[]", "an array"), ("null", "null"), ("3", "a number"), ('"x"', "a string"), ("true", "true")]
)
def test_json_that_is_no_object_raises(tmp_path, text, found):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"is malformed: expected a JSON object, found {found}"):
        files._read_json(tmp_path / "config.json")


def test_absurd_headers_are_not_read(tmp_path):
    (tmp_path / "weights").write_bytes((2**24).to_bytes(8, "little") + b"{")
    with pytest.raises(ValueError, match="expected a header of at most 8 MiB, found one of 16777216 bytes"):
        files._check_header(tmp_path / "weights")


def test_large_text_files_are_refused(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(8 * 2**30)
    with pytest.raises(ValueError, match=r"config\.json is too large: expected at most 16 MiB"):
        files._read_json(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
def test_invalid_json_raises(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        files._read_json(tmp_path / "config.json")
