"""Print the memory in use and its peak during a stream of images, in MiB.

    python stream_memory.py METHOD IMAGE WARM PART TOTAL

The first line holds, for every PART images after the first WARM, the least memory in use by the account of the C
library, which leaves out what its heaps keep in reserve. The second line holds the peaks that the operating system saw.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np

import levit_flax as lf

method, path, warm, part, total = *sys.argv[1:3], *map(int, sys.argv[3:])
in_use, peaks = [], []


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2


def allocated():
    account = mallinfo2()
    return (account.uordblks + account.hblkhd) / 2**20


def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def images():
    generator = np.random.default_rng(0)
    for i in range(total):
        if i >= warm:
            if (i - warm) % part == 0:
                in_use.append(allocated())
                peaks.append(peak())
            in_use[-1] = min(in_use[-1], allocated())
        yield path if i % 4 == 0 else generator.integers(0, 256, (96, 128, 3), np.uint8)


classifier = lf.ImageClassifier.from_pretrained("cifar10")
results = map(classifier, images()) if method == "calls" else getattr(classifier, method)(images())
assert sum(1 for _ in results) == total
print(*in_use)
print(*peaks, peak())
