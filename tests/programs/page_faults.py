"""Print the page faults of forty calls, with freed memory kept (keep) or returned to the system (free).

python page_faults.py keep|free
"""

import resource
import sys

from levit_flax.memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no glibc")
import jax
import jax.numpy as jnp

# The operand of a product is not fused, so it takes a block of 64 MB.
compute = jax.jit(lambda x: (jnp.sin(jnp.outer(x, x)) @ jnp.outer(x, x[:8])).sum())
x = jnp.linspace(-1, 1, 4096)
for i in range(50):
    if i == 10:  # the heap has a free block of the right size by now
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    compute(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
