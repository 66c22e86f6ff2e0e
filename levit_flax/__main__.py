"""Run the command line as `python -m levit_flax`."""

import sys

from .cli import main

sys.exit(main())
