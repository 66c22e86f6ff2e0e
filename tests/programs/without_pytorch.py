"""Convert, save, classify and process images while PyTorch and the libraries on top of it cannot be imported.

    python without_pytorch.py FOLDER

FOLDER holds pytorch_model.bin. Prints the best label and whether torch was imported.
"""

import sys


class Block:
    """An import hook that makes packages look missing."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "timm", "torchvision"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Block())

import numpy as np  # noqa: E402

import levit_flax as lf  # noqa: E402
from levit_flax import convert  # noqa: E402

folder = sys.argv[1]
model, variables = convert.from_torch(folder + "/pytorch_model.bin")
lf.save_pretrained(folder + "/flax", model, variables)
[best] = lf.ImageClassifier.from_pretrained(folder + "/flax")(np.zeros((32, 32, 3), np.uint8), top_k=1)
convert.save_torch(folder + "/model.safetensors", model, variables)
lf.LevitImageProcessor()(np.zeros((32, 32, 3), np.uint8), return_tensors="jax")
print(best["label"], "torch" in sys.modules)
