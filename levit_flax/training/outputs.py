"""Write the results of a training run: metrics, curves and the best model."""

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
from levit_flax.configuration import _CONFIG_FILE
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.modeling import LevitBase, Variables
from levit_flax.visualize import draw_curves

_METRICS_FILE = "metrics.csv"
_CURVES_FILE = "curves.png"
_REPORT_FILE = "report.json"
_CARD_FILE = "README.md"
_MODEL_DIRECTORY = "model"
_MODEL_METRICS_FILE = "metrics.json"
_MODEL_FILES = (*checkpoint._OWN_FILES, _MODEL_METRICS_FILE, _CARD_FILE)
_TORCH_DIRECTORY = "torch"
_TENSORBOARD_DIRECTORY = "tensorboard"

_History = list[dict[str, float]]  # one row per evaluation: epoch, step, ...


def _write_history(directory: Path, history: _History) -> None:
    """Write the metrics of all evaluations so far as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    files._write_text(directory / _METRICS_FILE, text.getvalue())


def _write_curves(directory: Path, history: _History) -> None:
    """Write a plot of the metrics of all evaluations so far."""
    figure = draw_curves(history)
    files._write_atomically(directory / _CURVES_FILE, lambda file: figure.savefig(file, format="png"))


class _TensorBoard:
    """Event files for TensorBoard, opened at the first evaluation of this process.

    A restart event makes TensorBoard drop later events of a killed run. Events are written synchronously, because
    tensorboardX's writer thread dies silently when the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / _TENSORBOARD_DIRECTORY
        self._writer: Any = None

    def log(self, row: Mapping[str, float]) -> None:
        """Add the metrics of one evaluation."""
        step = int(row["step"])
        if self._writer is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            # The step in the name distinguishes files that are created within one second.
            self._writer = EventsWriter(str(self.directory / "events"), filename_suffix=f".{step}")
            self._add(step, session_log=SessionLog(status=SessionLog.START))
        for name in row.keys() - {"step"}:
            self._add(step, summary=scalar(name, row[name]))
        self._writer.flush()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            with suppress(OSError):  # events are still unwritten only if an earlier write has failed
                self._writer.close()


def _write_best(
    directory: Path,
    model: LevitBase,
    variables: Variables,
    processor: LevitImageProcessor,
    row: Mapping[str, float],
    provenance: Mapping[str, Any],
) -> None:
    """Write the model directory with a model card and the metrics of the evaluation `row`."""
    with files._staged_directory(directory / _MODEL_DIRECTORY, True, _MODEL_FILES, _CONFIG_FILE) as staging:
        checkpoint._write_model(staging, model.clone(dtype=None), variables, processor, {"training": dict(provenance)})
        (staging / _MODEL_METRICS_FILE).write_text(json.dumps(dict(row), indent=2) + "\n", encoding="utf-8")
        files._write_text(staging / _CARD_FILE, _model_card(model, row, provenance))


def _model_card(model: LevitBase, row: Mapping[str, float], provenance: Mapping[str, Any]) -> str:
    """Return the model card, with the front matter of the Hub."""
    labels = model.config.id2label
    metrics = "\n".join(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in row.items())
    settings = "\n".join(
        f"- {name.replace('_', ' ')}: {value}" for name, value in provenance.items() if name != "recipe"
    )
    recipe = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in provenance["recipe"].items() if value is not None
    )
    return f"""---
library_name: levit-flax
pipeline_tag: image-classification
tags: [levit, jax]
---
# LeViT for {len(labels)} classes

{", ".join(labels[:20])}{", ..." if len(labels) > 20 else ""}

```python
from levit_flax import ImageClassifier

classifier = ImageClassifier.from_pretrained("{_MODEL_DIRECTORY}")  # this directory, or its Hub id
classifier("image.jpg")
```

Validation metrics at the end of the epoch in which these weights were saved:

| | |
|---|---|
{metrics}

Training settings:

{settings}

```toml
{recipe}
```
"""


def _best_row(history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Return the evaluation with the highest accuracy; among equals, and for regression, that with the lowest loss."""
    return max(history, key=lambda row: (row.get("validation_accuracy", 0), -row["validation_loss"]))
