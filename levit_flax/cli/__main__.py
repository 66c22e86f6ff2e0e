"""Run the command as `python -m levit_flax.cli`."""

import sys

from .app import main

sys.exit(main())
