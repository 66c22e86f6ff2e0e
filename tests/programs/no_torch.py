"""Make torch impossible to import in this process; imported first by the programs beside this file."""

import os
import sys


class _BlockTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")


os.environ["USE_TORCH"] = "0"  # keeps datasets from asking for it
sys.meta_path.insert(0, _BlockTorch())
