"""The `levit-flax` command."""

from .main import main as main
