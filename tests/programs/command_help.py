"""Print the help of the commands that are given, and assert that none imports a heavy package."""

import sys

from levit_flax.cli import main

HEAVY = {"jax", "flax", "numpy", "PIL", "torch", "huggingface_hub", "safetensors"}
for command in sys.argv[1:]:
    assert main([command, "--help"]) == 0
    assert not HEAVY & set(sys.modules), (command, HEAVY & set(sys.modules))
