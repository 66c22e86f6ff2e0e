"""Do one step of `conversion.py` in a separate process.

    python benchmarks/conversion_process.py write VARIANT FILE LAYOUT
    python benchmarks/conversion_process.py convert FILE DIRECTORY

`write` saves a random model as a PyTorch checkpoint. `convert` converts it and prints the time and the memory as JSON.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

import levit_flax as lf
from levit_flax import convert
from levit_flax.convert import workflow
from levit_flax.modeling_variables import _abstract_variables


def write_checkpoint(variant: str, path: str, layout: str) -> None:
    """Write a model with random weights."""
    model = lf.LevitForImageClassificationWithTeacher(lf.VARIANTS[variant])
    generator = np.random.default_rng(0)
    variables = {
        path: np.abs(generator.standard_normal(leaf.shape)).astype(leaf.dtype)
        for path, leaf in _abstract_variables(model).items()
    }
    convert.save_torch(path, model, unflatten_dict(variables, sep="/"), layout=layout)


def peak_mebibytes() -> float:
    """Return the peak resident memory of this process, including mapped files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_conversion(source: str, out: str) -> None:
    """Convert a checkpoint, and print the time and the memory in addition to the imports."""
    imports = peak_mebibytes()
    start = time.perf_counter()
    workflow._convert_to_directory(source, Path(out), verify=False)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mebibytes() - imports, "imports_mib": imports}))


if __name__ == "__main__":
    {"write": write_checkpoint, "convert": measure_conversion}[sys.argv[1]](*sys.argv[2:])
