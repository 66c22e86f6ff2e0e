"""The command line in unusual environments."""

import os
import signal
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "levit_flax.cli"]


def run(arguments, **environment):
    settings = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=settings, check=False)


def test_cache_that_cannot_be_created_is_skipped(tmp_path):
    (tmp_path / "file").touch()
    done = run(["--version"], XDG_CACHE_HOME=str(tmp_path / "file"), JAX_COMPILATION_CACHE_DIR=None)
    assert (done.returncode, done.stderr) == (0, "") and "levit-flax" in done.stdout


def test_version_is_printed():
    done = run(["--version"])
    assert done.returncode == 0 and done.stdout.startswith("levit-flax 0.")


@pytest.mark.parametrize("platforms", ["cuda", "nothing"])
def test_missing_platform_is_one_sentence(tmp_path, platforms):
    done = run(["classify", "-m", "cifar10", tmp_path / "none.png"], JAX_PLATFORMS=platforms)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: JAX cannot compute on JAX_PLATFORMS={platforms}: ")


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="needs POSIX signals")
def test_closed_stdout_ends_the_command_quietly():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run([*COMMAND, "--help"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
