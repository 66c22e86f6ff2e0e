"""Measure the time and the peak memory of a conversion, without the imports.

For each variant, a safetensors file with random weights is converted as by `levit-flax convert --no-verify`: it is
read, checked, converted to the Flax tree, converted back and compared with the file, and written. Each run is a
separate process, measured after its imports.

    python benchmarks/conversion.py [--variants levit-128S ...] [--runs 5] [--layout hf] [--out FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import turns
from machine import describe_machine

RUN = """
import json, resource, sys, time
from pathlib import Path
from levit_flax.convert import workflow

def megabytes():  # peak resident memory so far, including mapped files
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

imports = megabytes()
start = time.perf_counter()
workflow._convert_to_directory(sys.argv[1], Path(sys.argv[2]), verify=False)
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": megabytes() - imports, "imports_mib": imports}))
"""

WRITE = """
import sys
from pathlib import Path
import numpy as np
from flax.traverse_util import unflatten_dict
import levit_flax as lf
from levit_flax import convert
from levit_flax.modeling import _abstract_variables

model = lf.LevitForImageClassificationWithTeacher(lf.VARIANTS[sys.argv[1]])
generator = np.random.default_rng(0)
variables = {
    path: np.abs(generator.standard_normal(leaf.shape)).astype(leaf.dtype)
    for path, leaf in _abstract_variables(model).items()
}
convert.save_torch(Path(sys.argv[2]), model, unflatten_dict(variables, sep="/"), layout=sys.argv[3])
"""


def main() -> None:
    """Measure, then print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ["levit-128S", "levit-128", "levit-192", "levit-256", "levit-384"]
    parser.add_argument("--variants", nargs="+", default=names, choices=names)
    parser.add_argument("--layout", default="hf", choices=["hf", "timm", "timm_conv", "facebook"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "conversion.json")
    arguments = parser.parse_args()
    rows = {}
    print(f"{'variant':12}{'file MiB':>10}{'seconds':>10}{'(range)':>16}{'peak MiB':>10}{'peak/file':>13}")
    for name in arguments.variants:
        rows[name] = row = measure(name, arguments.layout, arguments.runs)
        print(
            f"{name:12}{row['file_mib']:10.1f}{row['seconds']:10.2f}"
            f"{'{:.2f} to {:.2f}'.format(*row['seconds_spread']):>16}{row['peak_mib']:10.1f}{row['peak_of_file']:13.2f}"
        )
    result = {
        "description": "levit-flax convert --no-verify, after imports",
        "layout": arguments.layout,
        "runs": arguments.runs,
        "machine": describe_machine(),
        "variants": rows,
    }
    turns.write(arguments.out, result)


def measure(name: str, layout: str, runs: int) -> dict[str, object]:
    """Return the medians of several processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        python("-c", WRITE, name, str(path), layout)
        results = [json.loads(python("-c", RUN, str(path), f"{folder}/out{i}")) for i in range(runs)]
        mebibytes = path.stat().st_size / 2**20
    seconds = [result["seconds"] for result in results]
    peak = statistics.median(result["peak_mib"] for result in results)
    return {
        "file_mib": mebibytes,
        "seconds": statistics.median(seconds),
        "seconds_spread": [min(seconds), max(seconds)],
        "peak_mib": peak,
        "peak_of_file": peak / mebibytes,
        "imports_mib": statistics.median(result["imports_mib"] for result in results),
    }


def python(*arguments: str) -> str:
    """Run this interpreter and return its output."""
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
