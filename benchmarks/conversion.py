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

PROCESS = str(Path(__file__).parent / "conversion_process.py")


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
        python(PROCESS, "write", name, str(path), layout)
        results = [json.loads(python(PROCESS, "convert", str(path), f"{folder}/out{i}")) for i in range(runs)]
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
