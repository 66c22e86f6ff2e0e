"""The report of a conversion: typed results as text, JSON and Markdown."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from levit_flax.modeling import LevitBase, Variables

from .conversion import _Conversion
from .errors import ConversionError
from .sources import _Source
from .verification import _PROBE_SEED, _PROBES, _Comparison, _PyTorchComparison


class _Result(Protocol):
    """The result of one verification; `str` returns it as a sentence without a period."""

    @property
    def passed(self) -> bool | None:
        """Whether the verification passed; None if it was skipped."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result JSON-ready."""


@dataclass(frozen=True)
class _SameTensors:
    """The tensors that differ after a conversion and its inverse.

    Attributes:
        tensors: number of tensors compared.
        differing: names of those that differ.
    """

    tensors: int
    differing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.differing

    @property
    def common(self) -> str:
        """The property that tensors without a difference share."""
        return "the same bytes"

    def __str__(self) -> str:
        if self.differing:
            return f"{len(self.differing)} of {self.tensors} tensors differ, the first is {self.differing[0]}"
        return f"all {self.tensors} tensors have {self.common}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "tensors": self.tensors,
            "with": self.common,
            "differing": list(self.differing),
        }


@dataclass(frozen=True)
class _RoundTrip(_SameTensors):
    """The comparison of the source with the conversion converted back; `dtype` is the requested dtype, if any."""

    dtype: Any = None

    @property
    def common(self) -> str:
        """The property that tensors without a difference share."""
        return "the source's bytes" if self.dtype is None else f"the source's values as {self.dtype}"


@dataclass(frozen=True)
class _ReadBack(_SameTensors):
    """The comparison of a written PyTorch file with the model, after reading and converting it."""


@dataclass(frozen=True)
class _Surgery:
    """The comparison of the model's logits before and after merging heads and folding batch norms."""

    logits: _Comparison

    @property
    def passed(self) -> bool:
        """Whether the difference is within its limit."""
        return self.logits.passed

    def __str__(self) -> str:
        return f"logits differ by {_difference(self.logits)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result JSON-ready."""
        return {"passed": self.passed, **self.logits._asdict()}


@dataclass(frozen=True)
class _Parity:
    """The comparison of the converted model with PyTorch."""

    comparison: _PyTorchComparison

    @property
    def passed(self) -> bool:
        """Whether the difference in the logits is within its limit."""
        return self.comparison.logits.passed

    def __str__(self) -> str:
        return f"logits differ from {self.comparison.reference} by {_difference(self.comparison.logits)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result JSON-ready."""
        return {
            "reference": self.comparison.reference,
            "probes": _PROBES,
            "seed": _PROBE_SEED,
            "passed": self.passed,
            **self.comparison.logits._asdict(),
            "blocks": {
                path: {"absolute": block.absolute, "relative": block.relative}
                for path, block in self.comparison.blocks.items()
            },
        }


@dataclass(frozen=True)
class _Skipped:
    """A comparison with PyTorch that was skipped."""

    reason: str
    outcome = "not compared with PyTorch"

    @property
    def passed(self) -> None:
        """Neither passed nor failed."""
        return None

    def __str__(self) -> str:
        return f"{self.outcome} ({self.reason})"

    def to_dict(self) -> dict[str, Any]:
        """Return the result JSON-ready."""
        return {"passed": None, "outcome": self.outcome, "because": self.reason}


def _difference(comparison: _Comparison) -> str:
    return (
        f"at most {comparison.absolute:.1e}, or {comparison.relative:.1e} of the largest value (limit"
        f" {comparison.limit:.0e})"
    )


@dataclass(frozen=True)
class _Checkpoint:
    """The content of a PyTorch checkpoint.

    Attributes:
        layout: name of its layout.
        fused: whether its batch norms are fused.
        heads: names of its classifier heads.
        wrappers: the keys and name prefixes removed around its tensors.
        inferred: whether the architecture was inferred from the shapes.
        image_size: height and width in pixels.
        num_labels: number of classes.
        depths: blocks per stage.
        mapped: for each tensor, the path of its leaf in the variables.
        ignored: names of ignored tensors, by reason.
        notes: assumptions and warnings, as sentences.
    """

    layout: str
    fused: bool
    heads: tuple[str, ...]
    wrappers: tuple[str, ...]
    inferred: bool
    image_size: tuple[int, int]
    num_labels: int
    depths: tuple[int, ...]
    mapped: Mapping[str, str]
    ignored: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, source: _Source, conversion: _Conversion) -> "_Checkpoint":
        """Describe a converted checkpoint."""
        model, config = conversion.model, conversion.model.config
        return cls(
            layout=conversion.layout.name,
            fused=model.folded,
            heads=model.head_names,
            wrappers=source.wrappers,
            inferred=conversion.inferred,
            image_size=config.image_height_width,
            num_labels=config.num_labels,
            depths=config.depths,
            mapped={row.torch: row.flax for row in conversion.rows},
            ignored=conversion.ignored,
            notes=conversion.notes,
        )

    @property
    def batch_norm(self) -> str:
        """The state of the batch norms, in a word."""
        return "fused" if self.fused else "present"

    @property
    def architecture(self) -> str:
        """The origin of the architecture, in a few words."""
        return "inferred from the tensor shapes" if self.inferred else "read from config.json"

    def summary(self) -> dict[str, str]:
        """Return one line of text per topic."""
        unwrapped = f", unwrapped from {' '.join(self.wrappers)}" if self.wrappers else ""
        height, width = self.image_size
        lines = {
            "layout": f"{self.layout}, batch norm {self.batch_norm}{unwrapped}",
            "architecture": f"{self.architecture}: {height}x{width} pixels, {self.num_labels} classes, heads"
            f" {', '.join(self.heads) or 'none'}, blocks per stage {', '.join(map(str, self.depths))}",
            "mapped": f"{len(self.mapped)} tensors",
        }
        if self.ignored:
            lines["ignored"] = "; ".join(f"{len(names)} {reason}" for reason, names in self.ignored.items())
        if self.notes:
            lines["notes"] = " ".join(self.notes)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the description JSON-ready."""
        return {
            "layout": self.layout,
            "batch norm": self.batch_norm,
            "heads": list(self.heads),
            "unwrapped from": list(self.wrappers),
            "architecture": self.architecture,
            "image size": list(self.image_size),
            "classes": self.num_labels,
            "blocks per stage": list(self.depths),
            "mapped": dict(self.mapped),
            "ignored": {reason: list(names) for reason, names in self.ignored.items()},
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Written:
    """The model that was written, and its files.

    Attributes:
        model_class: name of the module's class.
        num_parameters: number of trainable parameters.
        dtype: dtype of the parameters.
        folded: whether the batch norms are folded.
        layout: the layout of the files, "levit_flax" for our own.
        sizes: size of each file in bytes.
        note: a limitation of the files, as a sentence; None if there is none.
    """

    model_class: str
    num_parameters: int
    dtype: str
    folded: bool
    layout: str
    sizes: Mapping[str, int]
    note: str | None = None

    @classmethod
    def of(
        cls, model: LevitBase, variables: Variables, directory: Path, layout: str, note: str | None = None
    ) -> "_Written":
        """Describe a model that was written into a directory."""
        return cls(
            model_class=type(model).__name__,
            num_parameters=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
            dtype=str(np.dtype(model.param_dtype)),
            folded=model.folded,
            layout=layout,
            sizes={file.name: file.stat().st_size for file in sorted(directory.iterdir())},
            note=note,
        )

    def summary(self) -> dict[str, str]:
        """Return one line of text per topic."""
        folded = ", folded" if self.folded else ""
        return {
            "model": f"{self.model_class}, {self.num_parameters:,} parameters, {self.dtype}{folded}",
            "written as": f"{self.layout}. {self.note}" if self.note else self.layout,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the description JSON-ready, under the keys that a report has for it."""
        model = {
            "class": self.model_class,
            "parameters": self.num_parameters,
            "dtype": self.dtype,
            "folded": self.folded,
        }
        written = {"layout": self.layout, "bytes": dict(self.sizes), **({"note": self.note} if self.note else {})}
        return {"model": model, "written": written}


def _versions() -> dict[str, str]:
    packages = ("levit-flax", "jax", "flax", "numpy")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


@dataclass(frozen=True)
class _Report:
    """The report of a conversion.

    Attributes:
        source: where the weights were loaded from, JSON-ready.
        checkpoint: the content of the source; None for a Flax model directory.
        results: the results of the verifications by name.
        written: the model that was written.
        versions: versions of the packages.
    """

    source: Mapping[str, Any]
    checkpoint: _Checkpoint | None
    results: Mapping[str, _Result]
    written: _Written
    versions: Mapping[str, str] = field(default_factory=_versions)

    def check(self) -> None:
        """Raise ConversionError if a verification failed."""
        failed = [f"{name}: {result}" for name, result in self.results.items() if result.passed is False]
        if failed:
            raise ConversionError(f"Verification failed, so nothing was written. {'; '.join(failed)}.")

    def summary(self) -> dict[str, str]:
        """Return the report as one line of text per topic."""
        lines = {"source": str(self.source["source"])}
        lines |= {f"sha256 of {name}": digest for name, digest in self.source.get("files", {}).items()}
        if "revision" in self.source:
            lines["revision"] = self.source["revision"]
        if self.checkpoint is not None:
            lines |= self.checkpoint.summary()
        return lines | self.written.summary() | {name: str(result) for name, result in self.results.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the report JSON-ready."""
        return {
            "source": dict(self.source),
            "proof": {name: result.to_dict() for name, result in self.results.items()},
            **({} if self.checkpoint is None else {"checkpoint": self.checkpoint.to_dict()}),
            **self.written.to_dict(),
            "versions": dict(self.versions),
        }

    def to_markdown(self) -> str:
        """Return the report as a Markdown page."""
        lines = ["# Conversion report", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {text} |" for name, text in self.summary().items()]
        parity = self.results.get("PyTorch")
        if isinstance(parity, _Parity):
            lines += [
                "",
                "Largest difference after each block:",
                "",
                "| block | absolute | relative |",
                "|---|---|---|",
            ]
            lines += [
                f"| {path} | {block.absolute:.1e} | {block.relative:.1e} |"
                for path, block in parity.comparison.blocks.items()
            ]
        if self.checkpoint is not None:
            lines += ["", "Mapping of the tensors:", "", "| in the checkpoint | in the variables |", "|---|---|"]
            lines += [f"| {torch} | {flax} |" for torch, flax in self.checkpoint.mapped.items()]
        return "\n".join(lines) + "\n"
