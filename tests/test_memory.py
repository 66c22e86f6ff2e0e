"""What the process does with memory that has been freed."""

import subprocess
import sys

import pytest

from levit_flax import memory
from levit_flax.cli import main


def test_freed_memory_is_kept_for_the_next_call():
    """Without it every call waits while the system clears tens of thousands of pages."""
    program = """
import resource, sys
from levit_flax.memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no glibc")
import jax, jax.numpy as jnp
# A product's operand is not fused with what makes it: a block of 64 MB.
compute = jax.jit(lambda x: (jnp.sin(jnp.outer(x, x)) @ jnp.outer(x, x[:8])).sum())
x = jnp.linspace(-1, 1, 4096)
for i in range(50):
    if i == 10:  # by now the heap has a hole of the right size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    compute(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for way in ("keep", "free"):
        done = subprocess.run([sys.executable, "-c", program, way], capture_output=True, text=True)
        if "no glibc" in done.stderr:
            pytest.skip("only glibc keeps freed memory")
        assert done.returncode == 0, done.stderr
        faults[way] = int(done.stdout)
    # In forty calls, of which a block of 16,384 pages that some heap may still grow by is far less than a tenth.
    assert faults["free"] > 100_000 and faults["keep"] < faults["free"] / 10, faults


@pytest.mark.parametrize("command", ["finetune", "evaluate", "classify"])
def test_the_commands_keep_freed_memory(command, monkeypatch, tmp_path, capsys):
    def keep():
        raise ValueError("asked to keep it")

    monkeypatch.setattr(memory, "keep_freed_memory", keep)
    output = [] if command == "classify" else ["--output", str(tmp_path / "out")]
    assert main([command, str(tmp_path), *output]) == 1
    assert "asked to keep it" in capsys.readouterr().err
