"""The benchmark scripts run; what they promise is measured where there is time for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SECONDS = 2.0
OF_THE_FILE = 2.0

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks do not come with the wheel")


def run(script, out, *arguments):
    command = [sys.executable, BENCHMARKS / script, *arguments, "--out", out]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return json.loads(out.read_text())


def test_conversion_at_small_size(tmp_path):
    result = run("conversion.py", tmp_path / "out.json", "--variants", "levit-128S", "--runs", 1, "--layout", "timm")
    row = result["variants"]["levit-128S"]
    assert row["seconds"] > 0 and row["peak_mib"] > 0 and row["file_mib"] == pytest.approx(29.9, abs=0.2)
    assert result["machine"]["jax"] and result["layout"] == "timm"


def test_training_at_tiny_size(tmp_path):
    for module in ("grain", "orbax.checkpoint", "tensorboardX", "torch", "transformers"):
        pytest.importorskip(module)
    options = {"--variant": "tiny", "--batch": 8, "--steps": 2, "--rounds": 1, "--pictures": 24}
    result = run("training.py", tmp_path / "out.json", *(part for option in options.items() for part in option))
    assert result["times_as_fast"]["median"] > 0 and result["machine"]["torch"]
    assert 0 <= result["data"]["share_waiting_for_data"] < 1 and result["data"]["ceiling_pictures_per_second"]


@pytest.mark.measurement
def test_the_largest_model_converts_in_two_seconds_and_twice_its_size(tmp_path):
    result = run("conversion.py", tmp_path / "out.json", "--variants", "levit-384", "--runs", 3)
    row = result["variants"]["levit-384"]
    assert row["seconds"] < SECONDS and row["peak_of_file"] < OF_THE_FILE
