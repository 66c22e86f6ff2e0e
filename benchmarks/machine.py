"""What the numbers of a benchmark depend on."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def describe_machine(packages: tuple[str, ...] = ()) -> dict[str, str | int | None]:
    """Return what the numbers depend on, with the versions of further packages."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True).stdout.strip()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("levit-flax", "jax", "flax", "numpy", "safetensors", *packages)},
        "commit": commit or None,
    }


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
