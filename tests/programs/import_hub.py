"""Assert that importing the module does not import huggingface_hub."""

import sys

import levit_flax.hub  # noqa: F401

assert "huggingface_hub" not in sys.modules
