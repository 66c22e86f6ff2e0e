"""The fine-tuning example of the README learns, run as a user runs it."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

SECONDS = 180
ACCURACY = 0.97


@pytest.mark.measurement
def test_digits_are_learned_in_three_minutes(tmp_path):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    for i, (levels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = tmp_path / "digits" / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((levels * 255 / 16).round().astype(np.uint8)).save(path)
    begin = time.perf_counter()
    arguments = "finetune digits --model cifar10 --output run --export-torch hf"
    changes = "--set epochs=12 --set image_size=96 --set flip=0 --set crop_scale=[0.6,1]"
    subprocess.run(
        [sys.executable, "-m", "levit_flax", *arguments.split(), *changes.split()],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    seconds = time.perf_counter() - begin
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 12 and float(rows[-1]["validation_loss"]) < float(rows[0]["validation_loss"])
    assert report["best"]["validation_accuracy"] > ACCURACY
    assert Path(tmp_path, "run", "torch", "model.safetensors").is_file()
    assert seconds < SECONDS
