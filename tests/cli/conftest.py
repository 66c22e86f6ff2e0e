"""The compiler of the tests of the command line."""

import pytest
from quick_compiler import quick_compiler


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The directory where this process keeps what it compiles."""
    directory = tmp_path_factory.mktemp("compiled")
    with quick_compiler(directory):
        yield directory
