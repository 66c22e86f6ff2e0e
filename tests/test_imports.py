"""Importing costs little, and nothing that is used without PyTorch touches PyTorch."""

import subprocess
import sys
import textwrap

import pytest

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "timm", "torchvision"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_the_package_imports_nothing_heavy():
    done = run("""
        import sys
        import levit_flax, levit_flax.cli
        print(sorted({"jax", "flax", "numpy", "torch", "PIL", "huggingface_hub", "safetensors"} & set(sys.modules)))
    """)
    assert done.stdout.strip() == "[]", done


def test_every_public_name_resolves():
    done = run("""
        import levit_flax
        for name in levit_flax.__all__:
            getattr(levit_flax, name)
        assert set(levit_flax.__all__) <= set(dir(levit_flax))
        try:
            levit_flax.nothing
        except AttributeError as error:
            print(error)
    """)
    assert done.stdout.strip() == "module 'levit_flax' has no attribute 'nothing'", done


def test_everything_works_without_pytorch(tmp_path):
    pytest.importorskip("torch")  # without it, every test of this suite proves the same
    import numpy as np
    import torch

    from levit_flax import from_pretrained
    from levit_flax.convert import to_torch

    state = {name: torch.from_numpy(np.array(a)) for name, a in to_torch(*from_pretrained("cifar10")).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    done = run(
        BLOCK
        + """
import numpy as np
import levit_flax as lf
from levit_flax import convert

model, variables = convert.from_torch(sys.argv[1] + "/pytorch_model.bin")
lf.save_pretrained(sys.argv[1] + "/flax", model, variables)
[best] = lf.ImageClassifier.from_pretrained(sys.argv[1] + "/flax")(np.zeros((32, 32, 3), np.uint8), top_k=1)
convert.save_torch(sys.argv[1] + "/model.safetensors", model, variables)
lf.LevitImageProcessor()(np.zeros((32, 32, 3), np.uint8), return_tensors="jax")
print(best[0]["label"], "torch" in sys.modules)
""",
        str(tmp_path),
    )
    assert done.returncode == 0 and done.stdout.split()[1] == "False", done
