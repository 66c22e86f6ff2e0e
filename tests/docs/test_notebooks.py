"""The stored outputs of the notebooks are those of their code; `make notebooks` renews them."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LARGEST = 500_000  # bytes: everyone who clones the repository pays for them
MACHINE = re.compile(r"site-packages|/home/|/root/|/tmp/|/work/|/Users/|[A-Z]:\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def shown(cell):
    """Return the kinds of outputs of a cell and its printed text, without numbers, which depend on the machine."""
    return [
        (output["name"], re.sub(r"\d[\d.,]*", "0", " ".join("".join(output["text"]).split())))
        if output["output_type"] == "stream"
        else (output["output_type"], *sorted(output.get("data", ())))
        for output in cell["outputs"]
    ]


@each_notebook
def test_stored_outputs_are_complete_and_small(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not {"error", "stderr"} & {kind for kind, *_ in shown(cell)}, cell["source"]
        assert not MACHINE.search(json.dumps(cell["outputs"])), cell["source"]
    assert any(cell["outputs"] for cell in cells) and path.stat().st_size < LARGEST
    assert f"- notebooks/{path.name}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.slow
@each_notebook
def test_notebook_reproduces_its_stored_outputs(path, tmp_path):
    for module in ("nbclient", "ipykernel", "skimage", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    copy = Path(shutil.copy(path, tmp_path))
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_notebooks.py", copy],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert list(map(shown, code_cells(copy))) == list(map(shown, code_cells(path)))
