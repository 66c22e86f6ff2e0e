"""Import modules and print the heavy packages that this loaded.

python imported_modules.py MODULE...
"""

import importlib
import sys

HEAVY = {"jax", "flax", "numpy", "torch", "PIL", "huggingface_hub", "safetensors"}

for name in sys.argv[1:]:
    importlib.import_module(name)
print(sorted(HEAVY & set(sys.modules)))
