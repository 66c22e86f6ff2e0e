"""Fork one process per host, so that the imports are paid for once; used by the programs beside this file."""

import os
import sys
import traceback
from pathlib import Path


def run_hosts(functions, directory):
    """Run each function in its own process; return their exit statuses.

    Host i writes its output to DIRECTORY/i.out and DIRECTORY/i.err. A function returns the status of its process.
    """
    children = []
    for index, function in enumerate(functions):
        child = os.fork()
        if not child:
            _run_host(function, Path(directory, str(index)))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _run_host(function, path):
    for descriptor, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(path.with_suffix(ending), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    status = 70
    try:
        status = function()
    except BaseException:  # noqa: BLE001  # a forked host must never return to the caller
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
