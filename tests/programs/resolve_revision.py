"""Resolve a repository and print its revision.

python resolve_revision.py REPO_ID
"""

import sys

from levit_flax.hub import _resolve

print(_resolve(sys.argv[1], weights=("model.safetensors",)).revision)
