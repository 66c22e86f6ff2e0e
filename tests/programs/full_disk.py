"""Save a model to a disk that is too small and print each error, then the files that are left.

python full_disk.py FOLDER SUFFIX...
"""

import os
import resource
import signal
import sys
from pathlib import Path

import levit_flax as lf
from levit_flax import convert

folder, suffixes = Path(sys.argv[1]), sys.argv[2:]
model, variables = lf.from_pretrained("cifar10")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full disk does not end the process
for limit in (100_000, 100):  # first the weights do not fit, then not even config.json
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for write in (
        lambda: lf.save_pretrained(folder / "model", model, variables),
        *(lambda end=suffix: convert.save_torch(folder / f"model.{end}", model, variables) for suffix in suffixes),
    ):
        try:
            write()
        except OSError as error:
            print(error)
print(os.listdir(folder))
