"""The `levit-flax` command."""

from .app import main as main
