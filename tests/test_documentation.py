"""The examples of the documentation run as they stand, each page in a process of its own."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LONG = ("classify.md", "understand.md", "from_transformers.md", "features.md")  # they compile several models
NEEDS = {"understand.md": "matplotlib", "export.md": "flatbuffers"}
MODULES = ["configuration", "modeling", "checkpoint", "surgery", "image_processing", "classifier", "convert.conversion"]

pytestmark = pytest.mark.skipif(not PAGES, reason="the documentation does not come with the wheel")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name in LONG else ()) for page in PAGES],
    ids=[page.name for page in PAGES],
)
def test_examples_of_a_page(page, tmp_path):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    if page.name == "reference.md":
        assert not blocks
        return
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    assert blocks
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(tmp_path / "cat.jpg")
    script = "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"levit_flax.{module}"))
    assert result.attempted and not result.failed
