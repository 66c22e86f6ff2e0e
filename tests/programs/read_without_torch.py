"""Read the checkpoints at the paths given without torch; print whether each model is folded, one line of JSON each."""

import json
import sys

import no_torch  # noqa: F401

from levit_flax import convert

for file in sys.argv[1:]:
    print(json.dumps(convert.from_torch(file)[0].folded))
assert "torch" not in sys.modules
