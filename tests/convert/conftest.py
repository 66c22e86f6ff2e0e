"""Fixtures that the tests of the converter share."""

from pathlib import Path
from typing import Any

import pytest
from quick_compiler import quick_compiler


@pytest.fixture(scope="module", autouse=True)
def compiled(compiled_directory):
    """The directory where this process keeps what it compiles."""
    with quick_compiler(compiled_directory):
        yield compiled_directory


@pytest.fixture(name="torch")
def import_torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "levit.pth"
