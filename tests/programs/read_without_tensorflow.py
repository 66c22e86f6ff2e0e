"""Train on a dataset of TensorFlow Datasets and evaluate the model; fail if anything imports TensorFlow.

python read_without_tensorflow.py SOURCE OUTPUT
"""

import sys


class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "tensorflow" or "importlib.util" in sys._getframe(2).f_code.co_filename:
            return  # `importlib.util.find_spec` only asks whether TensorFlow is installed
        raise AssertionError(f"{name} is imported")


sys.meta_path.insert(0, Forbidden())

import no_torch  # noqa: E402, F401  # tensorboardX would import torch, which takes longer than the training
from training_runs import BlankFigure, tiny_recipe  # noqa: E402

from levit_flax import ImageClassifier  # noqa: E402
from levit_flax.evaluation import evaluate, read_data  # noqa: E402
from levit_flax.training import finetune, outputs  # noqa: E402

source, output = sys.argv[1:]
outputs.draw_curves = lambda history: BlankFigure()
report = finetune(source, output, recipe=tiny_recipe(epochs=1, warmup_epochs=0))
classifier = ImageClassifier.from_pretrained(f"{output}/model", fast_start=True)
result = evaluate(classifier, read_data(source, classifier.model.config.id2label, "train"))
print(result.images, "tensorflow" in sys.modules)
