"""Importing the package loads nothing heavy, and it works without PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"


def run(program, *arguments):
    command = [sys.executable, "-W", "error", PROGRAMS / program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_importing_the_package_loads_nothing_heavy():
    done = run("imported_modules.py", "levit_flax", "levit_flax.cli")
    assert done.stdout.strip() == "[]", done


def test_every_public_name_resolves():
    done = run("public_names.py")
    assert done.stdout.strip() == "module 'levit_flax' has no attribute 'nothing'", done


def test_conversion_and_classification_work_without_pytorch(tmp_path):
    torch = pytest.importorskip("torch")  # without it, every test of this suite proves the same
    import numpy as np

    from levit_flax import from_pretrained
    from levit_flax.convert import to_torch

    state = {name: torch.from_numpy(np.array(a)) for name, a in to_torch(*from_pretrained("cifar10")).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    done = run("without_pytorch.py", str(tmp_path))
    assert done.returncode == 0 and done.stdout.split()[1] == "False", done
