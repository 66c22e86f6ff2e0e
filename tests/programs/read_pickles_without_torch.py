"""Read the pickles at the paths given without torch; print the weight in each, or the error's text, one line each."""

import sys
from pathlib import Path

import no_torch  # noqa: F401

from levit_flax.convert.pickles import _read_pickle

for file in sys.argv[1:]:
    try:
        result = _read_pickle(Path(file))
        print(result["weight"].tolist(), result["weight"].dtype)
    except ValueError as error:
        print(error)
assert "torch" not in sys.modules
