"""Convert a checkpoint once, then kill further conversions at random moments.

python killed_conversion.py SOURCE FOLDER KILLS SEED DELAY

The undisturbed conversion writes FOLDER/whole; number i of the killed ones writes FOLDER/out<i> or nothing.
Every file is opened for writing DELAY seconds late, so that kills hit the writing of small models too.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from levit_flax.convert import workflow


def delay_writing(folder, delay):
    def wait(event, arguments):
        if event == "open" and str(arguments[0]).startswith(str(folder)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            time.sleep(delay)

    sys.addaudithook(wait)


def convert_in_child(source, out):
    child = os.fork()
    if child:
        return child
    workflow._convert_to_directory(source, out, verify=False)
    os._exit(0)


def main(source, folder, kills, seed, delay):
    delay_writing(folder, delay)
    start = time.perf_counter()
    assert os.waitpid(convert_in_child(source, folder / "whole"), 0)[1] == 0
    seconds = time.perf_counter() - start
    generator = random.Random(seed)
    for i in range(kills):
        child = convert_in_child(source, folder / f"out{i}")
        time.sleep(generator.uniform(0.4, 1.4) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seconds *= 0.8 if (folder / f"out{i}").exists() else 1.25  # other work on the machine comes and goes


main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
