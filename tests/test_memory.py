"""Keeping freed memory in the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from levit_flax import memory
from levit_flax.cli import main


@pytest.mark.slow
def test_freed_memory_is_kept_for_the_next_call():
    """Otherwise the system clears tens of thousands of pages in every call."""
    program = Path(__file__).parent / "programs" / "page_faults.py"
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}  # it computes for longer than it compiles
    faults = {}
    for way in ("keep", "free"):
        done = subprocess.run(
            [sys.executable, program, way], env=environment, capture_output=True, text=True, check=False
        )
        if "no glibc" in done.stderr:
            pytest.skip("only glibc keeps freed memory")
        assert done.returncode == 0, done.stderr
        faults[way] = int(done.stdout)
    # In forty calls. A heap may still grow by one block of 16,384 pages, which is far less than a tenth.
    assert faults["free"] > 100_000 and faults["keep"] < faults["free"] / 10, faults


@pytest.mark.parametrize("command", ["finetune", "evaluate", "classify"])
def test_the_commands_keep_freed_memory(command, monkeypatch, tmp_path, capsys):
    def keep():
        raise ValueError("keep_freed_memory was called")

    monkeypatch.setattr(memory, "keep_freed_memory", keep)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    output = [] if command == "classify" else ["--output", str(tmp_path / "out")]
    assert main([command, str(tmp_path), *output]) == 1
    assert "keep_freed_memory was called" in capsys.readouterr().err
