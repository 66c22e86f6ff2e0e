"""What a training leaves for people and programs: metrics, curves, TensorBoard, the model with its card, a report."""

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from levit_flax import checkpoint, files
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.modeling import LevitBase, Variables
from levit_flax.visualize import draw_curves

METRICS_FILE = "metrics.csv"
CURVES_FILE = "curves.png"
REPORT_FILE = "report.json"
CARD_FILE = "README.md"
MODEL_DIRECTORY = "model"
TORCH_DIRECTORY = "torch"
TENSORBOARD_DIRECTORY = "tensorboard"

History = list[dict[str, float]]  # one row for each evaluation: epoch, step, ...


def write_history(directory: Path, history: History) -> None:
    """Write the metrics of every evaluation so far, as CSV and as curves."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    files.write_text(directory / METRICS_FILE, text.getvalue())
    figure = draw_curves(history)
    files.write_atomically(directory / CURVES_FILE, lambda file: figure.savefig(file, format="png"))


class TensorBoard:
    """Event files for TensorBoard, opened at the first evaluation of this process.

    What a run that died had logged from that step on is dropped. Everything is written at once, not by tensorboardX's
    thread, which a full disk kills without a word.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / TENSORBOARD_DIRECTORY
        self._writer: Any = None

    def log(self, row: Mapping[str, float]) -> None:
        """Add the metrics of one evaluation."""
        step = int(row["step"])
        if self._writer is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Named by the second, which a short run that goes on at once would share.
            self._writer = EventsWriter(str(self.directory / "events"), filename_suffix=f".{step}")
            self._add(step, session_log=SessionLog(status=SessionLog.START))
        for name in row.keys() - {"step"}:
            self._add(step, summary=scalar(name, row[name]))
        self._writer.flush()

    def _add(self, step: int, **what: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **what))

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            with suppress(OSError):  # there is something left to write only where that has failed before
                self._writer.close()


def write_best(
    directory: Path,
    model: LevitBase,
    variables: Variables,
    processor: LevitImageProcessor,
    row: Mapping[str, float],
    facts: Mapping[str, Any],
) -> None:
    """Write the model directory, its card and its metrics."""
    with files.staged_directory(directory / MODEL_DIRECTORY, True, checkpoint.OWN_FILES) as staging:
        checkpoint.write_model(staging, model.clone(dtype=None), variables, processor, {"training": dict(facts)})
        (staging / "metrics.json").write_text(json.dumps(dict(row), indent=2) + "\n", encoding="utf-8")
        (staging / CARD_FILE).write_text(model_card(model, row, facts), encoding="utf-8")


def model_card(model: LevitBase, row: Mapping[str, float], facts: Mapping[str, Any]) -> str:
    """Return the model's README, with the Hub's front matter."""
    labels = model.config.id2label
    measured = "\n".join(f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in row.items())
    about = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items() if name != "recipe")
    recipe = "\n".join(f"{key} = {json.dumps(value)}" for key, value in facts["recipe"].items() if value is not None)
    return f"""---
library_name: levit-flax
pipeline_tag: image-classification
tags: [levit, jax]
---
# LeViT for {len(labels)} classes

{", ".join(labels[:20])}{", ..." if len(labels) > 20 else ""}

```python
from levit_flax import ImageClassifier

classifier = ImageClassifier.from_pretrained("{MODEL_DIRECTORY}")  # this directory, or its Hub id
classifier("image.jpg")
```

Measured at the end of the epoch that it was taken from, on the images held back for validation:

| | |
|---|---|
{measured}

How it was trained:

{about}

```toml
{recipe}
```
"""


def best_row(history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Return the best evaluation: of the highest accuracy, or where there is none, of the lowest loss."""
    return max(history, key=goodness)


def goodness(row: Mapping[str, float]) -> float:
    """Return the number by which evaluations are compared; more is better."""
    return row["validation_accuracy"] if "validation_accuracy" in row else -row["validation_loss"]
