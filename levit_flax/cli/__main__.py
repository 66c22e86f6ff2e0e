"""Run the command as `python -m levit_flax.cli`."""

import sys

from .main import main

sys.exit(main())
