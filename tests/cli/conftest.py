"""The compiler of the tests of the command line."""

import pytest
from quick_compiler import quick_compiler


@pytest.fixture(scope="module", autouse=True)
def compiled(compiled_directory):
    """The directory where this process keeps what it compiles."""
    with quick_compiler(compiled_directory):
        yield compiled_directory
