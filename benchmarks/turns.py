"""Run measurements as alternating processes, so that noise affects all alike."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "RESULT "


def answer(work: Callable[[], Mapping[str, Any]]) -> None:
    """Run `work` and print its results, or why it cannot run, for the parent process."""
    try:
        found = work()
    except (ImportError, NotImplementedError) as error:
        found = {"missing": f"{type(error).__name__}: {error}".strip().partition("\n")[0]}
    print(MARK + json.dumps(found), flush=True)


def run(script: str, *arguments: Any, **environment: str) -> dict[str, Any]:
    """Run a Python script as a process and return the results that it printed.

    Returns {"missing": reason} if a package is not installed or the process fails. The stderr of a failed process is
    printed.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        sys.stderr.write(done.stderr)
        return {"missing": f"{' '.join(command)} failed with {done.returncode}."}
    line = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    return dict(json.loads(line.removeprefix(MARK)))


def in_turns(
    script: str, commands: Mapping[str, Sequence[Any]], rounds: int, **environment: str
) -> dict[str, list[Any]]:
    """Run each command once per round and return the results by name.

    Each round starts with a different command. A command that cannot run is reported on stderr and has no entry.
    """
    left = dict(commands)
    found: dict[str, list[Any]] = {name: [] for name in commands}
    for i in range(rounds):
        names, begin = list(left), i % max(len(left), 1)
        for name in names[begin:] + names[:begin]:
            result = run(script, *commands[name], **environment)
            if "missing" in result:
                print(f"skipping {name}: {result['missing']}", file=sys.stderr)
                del left[name]
            else:
                found[name].append(result)
    return {name: found[name] for name in left}


def require(found: Mapping[str, Any], *names: str) -> None:
    """Exit if a required measurement is missing."""
    if missing := [name for name in names if name not in found]:
        raise SystemExit(f"Required measurements are missing: {', '.join(missing)}.")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the minimum and the maximum."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
