"""Kill a training at random moments, check what each kill leaves, and resume until it ends.

python killed_training.py FOLDER OUTPUT KILLS PROCESSES EPOCHS

Each training runs in a fork of this process, so that the imports are paid for once.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import no_torch  # noqa: F401  # tensorboardX would import torch, which takes longer than the training
from training_runs import STEPS_PER_EPOCH, BlankFigure, checkpoint_steps, tiny_recipe

from levit_flax.training import finetune, loop, outputs

outputs.draw_curves = lambda history: BlankFigure()


def train_in_child(folder, output, recipe, processes):
    """Begin or resume in a child; return its id and a file that reports each batch and each save."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, os.fdopen(reader)

    class ReportingSession(loop._Session):
        def next_batch(self):
            os.write(writer, f"batch {self.step}\n".encode())
            time.sleep(0.1)  # otherwise saving would take all of the time
            return super().next_batch()

        def save(self):
            super().save()  # waits for the previous save first
            os.write(writer, f"saving {self.step}\n".encode())

    loop._Session = ReportingSession
    finetune(folder, output, recipe=recipe, resume=True, processes=processes)
    os._exit(0)


def wait_for_a_moment(events, generator, during_startup, startup, most):
    """Sleep until a random moment, counted in lines of `events`; return these and the seconds before the first."""
    if during_startup:
        time.sleep(generator.uniform(0, startup))
        return [], startup
    begin, seen = time.perf_counter(), []
    for _ in range(generator.randint(1, most)):
        seen.append(events.readline().strip())
        if len(seen) == 1:
            startup = time.perf_counter() - begin
    time.sleep(generator.uniform(0, 0.2))
    return seen, startup


def numbers(events, kind):
    return [int(event.split()[1]) for event in events if event.startswith(kind)]


def check_kill(last, steps, saves, whole):
    """Assert that at most one save and one epoch of steps were lost."""
    begun = [last, *saves]
    assert whole >= begun[-2:][0], (whole, begun)
    if steps:
        assert steps[0] == last, (steps, last)  # resumed from the last whole checkpoint
        assert steps[-1] + 1 - begun[-1] <= STEPS_PER_EPOCH, (steps, begun)


def main(folder, output, kills, processes, epochs):
    recipe, total = tiny_recipe(epochs=epochs), STEPS_PER_EPOCH * epochs
    generator, startup, outcomes = random.Random(0), 0.0, Counter()
    for killed in range(kills + 1):
        last = max(checkpoint_steps(output), default=0)
        child, reports = train_in_child(folder, output, recipe, processes)
        if killed == kills:
            steps = numbers(reports.read().splitlines(), "batch")
            assert os.waitpid(child, 0)[1] == 0
            assert not steps or steps[0] == last, (steps, last)
            break
        # So far that on average the kills are spread over all of the run.
        most = max(1, 2 * ((total - last) * 4 // 3) // (kills - killed + 1))
        events, startup = wait_for_a_moment(reports, generator, killed % 5 == 4, startup, most)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        events += reports.read().splitlines()
        reports.close()
        steps, whole = numbers(events, "batch"), max(checkpoint_steps(output), default=0)
        check_kill(last, steps, numbers(events, "saving"), whole)
        half = any("tmp" in path.name for path in (output / "checkpoints").glob("*"))
        outcomes["during startup" if not steps else "while saving" if half else "between saves"] += 1
        print(f"kill {killed + 1}: at step {steps[-1:]}, resumes from {whole}", flush=True)
    print(dict(outcomes))


if __name__ == "__main__":  # the worker processes of Grain import this file
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
