"""Train on one host or several and print every step's loss.

python training_hosts.py DIRECTORY ADDRESS HOSTS FOLDER OUTPUT DTYPE STOP_AT RECIPE

Host 0 gets SIGTERM after step STOP_AT. RECIPE is JSON: changes to the tiny recipe.
"""

import functools
import json
import os
import signal
import sys

import jax
import no_torch  # noqa: F401  # tensorboardX would import torch, which takes longer than the training
from hosts import run_hosts
from training_runs import BlankFigure, tiny_recipe

from levit_flax import checkpoint
from levit_flax.training import finetune, loop, outputs, plan


def train(index, address, hosts, folder, output, dtype, stop_at, changes):
    if hosts > 1:
        jax.distributed.initialize(address, hosts, index)
    jax.config.update("jax_enable_x64", dtype == "float64")
    make_student, add, losses = plan._make_student, loop._Totals.add, []

    def make_student_of_dtype(*arguments, **options):
        student = make_student(*arguments, **options)
        model, variables = checkpoint._cast(student.model, student.variables, dtype)
        return student._replace(model=model, variables=variables)

    def note_loss(self, loss, *others):
        losses.append(loss)
        add(self, loss, *others)

    def stop(now):
        if now.step == stop_at and index == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    plan._make_student, loop._Totals.add = make_student_of_dtype, note_loss
    outputs.draw_curves = lambda history: BlankFigure()
    try:
        finetune(folder, output, recipe=tiny_recipe(**changes), resume=True, show=stop, processes=0)
    except loop.TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
    print("losses", json.dumps(losses))  # gloo prints too
    return 0


directory, address, hosts, folder, output, dtype, stop_at, changes = sys.argv[1:]
arguments = address, int(hosts), folder, output, dtype, int(stop_at), json.loads(changes)
statuses = run_hosts([functools.partial(train, index, *arguments) for index in range(int(hosts))], directory)
sys.exit(max(map(abs, statuses)))
