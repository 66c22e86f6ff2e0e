"""Measurements in processes of their own, taken in turns, so that a machine's moods fall on all of them alike."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "RESULT "


def answer(found: dict[str, Any]) -> None:
    """Tell the process that waits for this one what was found."""
    print(MARK + json.dumps(found), flush=True)


def run(script: str, *arguments: Any, **environment: str) -> dict[str, Any]:
    """Run a Python script in a process of its own, and return what it answered.

    A package that is not installed makes it {"missing": why}.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        if last and last[0].startswith(("ModuleNotFoundError", "ImportError", "NotImplementedError")):
            return {"missing": last[0]}
        sys.stderr.write(done.stderr)
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}.")
    line = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    return dict(json.loads(line.removeprefix(MARK)))


def in_turns(
    script: str, commands: Mapping[str, Sequence[Any]], rounds: int, **environment: str
) -> dict[str, list[Any]]:
    """Run each command once a round; return the answers by name, and name on stderr what is missing.

    What is missing in the first round has no entry.
    """
    found: dict[str, list[Any]] = {}
    left_out: set[str] = set()
    for _ in range(rounds):
        for name, arguments in commands.items():
            if name in left_out:
                continue
            result = run(script, *arguments, **environment)
            if "missing" in result:
                print(f"{name} is left out: {result['missing']}", file=sys.stderr)
                left_out.add(name)
            else:
                found.setdefault(name, []).append(result)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
