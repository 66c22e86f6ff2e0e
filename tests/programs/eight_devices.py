"""Assert that eight virtual devices classify like one, in batches that are a multiple of eight."""

import jax
import numpy as np

import levit_flax as lf
from configs import TINY, random_variables

images = np.random.default_rng(0).integers(0, 256, (19, 40, 40, 3), np.uint8)
assert jax.local_device_count() == 8
model = lf.LevitForImageClassification(lf.LevitConfig(**TINY))
many = lf.ImageClassifier(model, random_variables(model), batch_size=12)
assert many.batch_size == 16 and len(jax.tree.leaves(many.variables)[0].devices()) == 8
one = lf.ImageClassifier(many.model, many.variables, many.processor, devices=jax.local_devices()[:1])
results = [np.stack(list(classifier.stream_logits(images))) for classifier in (many, one)]
np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)
assert sorted(size for size, _ in many._function._programs) == [8, 16]
