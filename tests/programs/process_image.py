"""Process an image and print the PyTorch packages that this imported.

python process_image.py IMAGE
"""

import sys

from levit_flax.image_processing import LevitImageProcessor

LevitImageProcessor()(sys.argv[1], return_tensors="np")
print(sorted({"torch", "torchvision", "transformers", "timm"} & set(sys.modules)))
