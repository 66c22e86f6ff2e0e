"""Run the command line on several hosts and print their exit statuses as JSON.

python command_hosts.py DIRECTORY ADDRESS COMMANDS

COMMANDS is JSON: the arguments of each host.
"""

import functools
import json
import os
import sys

from hosts import run_hosts

import levit_flax.training  # noqa: F401  # imported before the hosts are forked
from levit_flax.cli import main


def command(index, address, count, arguments):
    os.environ["LEVIT_FLAX_COORDINATOR"] = address
    os.environ["LEVIT_FLAX_PROCESS_COUNT"] = str(count)
    os.environ["LEVIT_FLAX_PROCESS_ID"] = str(index)
    return main(arguments)


directory, address, commands = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
works = [functools.partial(command, index, address, len(commands), given) for index, given in enumerate(commands)]
print(json.dumps(run_hosts(works, directory)))
