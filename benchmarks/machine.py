"""Describe the machine and the software of a measurement."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
OURS = ("levit-flax", "jax", "flax", "numpy", "safetensors")


def describe_machine(packages: tuple[str, ...] = ()) -> dict[str, str | int | list[str] | None]:
    """Return the hardware, the commit and package versions; None if not installed."""
    return {
        "processor": processor(),
        "vector_extensions": vector_extensions(),
        "cores": os.cpu_count(),
        "gpu": gpu(),
        "python": platform.python_version(),
        **{name: installed(name) for name in (*OURS, *packages)},
        "commit": commit(),
    }


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def vector_extensions() -> list[str]:
    """Return the instruction sets that decide which kernels the libraries use; empty if Linux does not tell."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return []
    return [name for name in ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in flags]


def gpu() -> str | None:
    """Return the names of the NVIDIA GPUs, or None."""
    if not shutil.which("nvidia-smi"):
        return None
    return output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").replace("\n", ", ") or None


def commit() -> str | None:
    """Return the commit, with "-dirty" if files other than results have changed."""
    git = ("git", "-C", str(REPOSITORY))
    head = output(*git, "rev-parse", "HEAD")
    changed = output(*git, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{head}-dirty" if head and changed else head or None


def output(*command: str) -> str:
    """Return the output of a command, or an empty string if it fails."""
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
