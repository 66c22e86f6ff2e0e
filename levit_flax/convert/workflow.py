"""From a source to a directory, with a report that proves the result: what `levit-flax convert` does."""

import json
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from levit_flax import checkpoint, files, loading, surgery
from levit_flax.hub import DEFAULTS, HubOptions, Resolved
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.modeling import LevitBase, Variables

from .conversion import Conversion, check_layout, check_transformers_size, convert, save_torch
from .errors import ConversionError
from .sources import WEIGHT_SUFFIXES, Source, open_resolved, open_source, sha256
from .timm_files import write_timm_config
from .verification import (
    PROBE_SEED,
    PROBES,
    Comparison,
    compare,
    compare_with_pytorch,
    find_differing_bytes,
    forward,
    probes,
    rounding_limit,
    same_bytes,
)

TORCH_FILE = checkpoint.TORCH_WEIGHT_FILES[0]
NOT_COMPARED = "not compared with PyTorch"


@dataclass(frozen=True)
class Loaded:
    """A model, wherever it came from.

    Attributes:
        model: the module.
        variables: its variables.
        processor: what prepares its images.
        provenance: where it came from, JSON-ready.
        source: the opened PyTorch checkpoint; None for a model directory of ours.
        conversion: how it was converted; None for a model directory of ours.
    """

    model: LevitBase
    variables: Variables
    processor: LevitImageProcessor
    provenance: dict[str, Any]
    source: Source | None = None
    conversion: Conversion | None = None


def convert_to_directory(
    source: str,
    out: Path,
    *,
    layout: str | None = None,
    dtype: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    ema: bool = False,
    fold: bool = False,
    merge: bool = False,
    verify: bool = True,
    options: HubOptions = DEFAULTS,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert a model into a directory, whole or not at all, and prove the result.

    Args:
        source: a weight file, directory or Hub id with PyTorch weights, or a model directory of ours.
        out: the directory to write.
        layout: the PyTorch layout to write; None for a model directory of ours.
        dtype: type of the floating-point arrays; None keeps the source's.
        image_size: as in `from_torch`.
        ema: as in `from_torch`.
        fold: fold the batch norms.
        merge: merge the two heads.
        verify: compare with PyTorch, where it is installed. The way back to the source's bytes is always checked.
        options: how to access the Hub.
        overwrite: replace the model that is there.

    Returns:
        The report, JSON-ready; the directory holds it too.

    Raises:
        ValueError: the source cannot be converted, the layout has no place for the model, or the result is not proved
            right. Nothing is written.
        OSError: the source cannot be read, or the directory not be written.
    """
    files.check_free(out, overwrite)
    found = find(source, layout is not None, options)
    if found is not None and found.weights is not None and found.weights.name == checkpoint.WEIGHTS_FILE:
        if image_size is not None or ema:
            raise ValueError(f"{source} is a converted model: --image-size and --ema are for PyTorch checkpoints.")
        loaded = load_own(source, found, dtype)
    else:
        opened = open_source(source, ema=ema) if found is None else open_resolved(source, found, ema)
        with ThreadPoolExecutor(1) as pool:  # hashing takes as long as converting, and another core
            digests = pool.submit(hash_files, opened.files)
            loaded = load_torch(opened, convert(opened, dtype, image_size=image_size), image_size is not None)
            loaded.provenance["files"] = digests.result()
    model, variables = loaded.model, loaded.variables
    report: dict[str, Any] = {"source": loaded.provenance, "proof": {}}
    if loaded.source is not None and loaded.conversion is not None:
        report |= describe_conversion(loaded.source, loaded.conversion)
        report["proof"]["round trip"] = prove_round_trip(loaded.source, loaded.conversion)
        if layout is None:
            report["proof"]["PyTorch"] = prove_with_pytorch(loaded.source, loaded.conversion, verify)
    provenance = loaded.provenance
    if merge or fold:
        if merge:
            model, variables = surgery.merge_heads(model, variables)
        if fold and not model.folded:
            model, variables = surgery.fold_batch_norm(model, variables)
        provenance = provenance | {"merged_heads": merge, "folded_batch_norm": model.folded}
        report["proof"]["surgery"] = prove_surgery(loaded, model, variables)
    if layout is not None:
        check_layout(model, layout)
    report["model"] = describe_model(model, variables)
    with files.staged_directory(out, overwrite, checkpoint.OWN_FILES) as staging:
        if layout is None:
            checkpoint.write_model(staging, model, variables, loaded.processor, provenance)
        else:
            write_torch_directory(staging, model, variables, loaded.processor, layout)
            report["proof"] |= prove_written(staging, model, variables, verify)
        report["written"] = {
            "layout": layout or "levit_flax",
            "bytes": {file.name: file.stat().st_size for file in sorted(staging.iterdir())},
        }
        if layout == "hf":
            try:
                check_transformers_size(model.config)
            except ConversionError as error:
                report["written"]["note"] = str(error)
        report["versions"] = {name: version(name) for name in ("levit-flax", "jax", "flax", "numpy")}
        report["versions"]["python"] = platform.python_version()
        check_proof(report["proof"])
        (staging / checkpoint.REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (staging / checkpoint.READABLE_REPORT_FILE).write_text(readable(report), encoding="utf-8")
    return report


def find(source: str, prefer_own: bool, options: HubOptions) -> Resolved | None:
    """Return where the weights of a directory or Hub repository are, or None where the source is a file.

    Where our weights and PyTorch's lie side by side, `prefer_own` decides.
    """
    path = Path(source).expanduser()
    if path.is_file() or path.suffix in WEIGHT_SUFFIXES:
        return None
    own, torch = (checkpoint.WEIGHTS_FILE,), checkpoint.TORCH_WEIGHT_FILES
    return loading.resolve(source, options, weights=own + torch if prefer_own else torch + own)


def hash_files(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name."""
    return {file.name: sha256(file) for file in files}


def load_own(source: str, resolved: Resolved, dtype: str | None) -> Loaded:
    """Load a converted model."""
    directory = resolved.directory
    model, variables = checkpoint.read_directory(directory)
    if dtype is not None:
        model, variables = checkpoint.cast(model, variables, dtype)
    return Loaded(
        model=model,
        variables=variables,
        processor=loading.load_processor(directory, model.config),
        provenance={
            "source": source,
            **({"revision": resolved.revision} if resolved.revision else {}),
            "files": hash_files([directory / checkpoint.WEIGHTS_FILE]),
            "layout": "levit_flax",
            "converted from": checkpoint.read_provenance(directory),
        },
    )


def load_torch(source: Source, conversion: Conversion, resized: bool) -> Loaded:
    """Put a conversion together with the processor that belongs to it, and to its own image size if that was given."""
    processor = loading.load_processor(conversion.directory, conversion.model.config)
    return Loaded(
        model=conversion.model,
        variables=conversion.variables,
        processor=loading.resize_processor(processor, conversion.model.config) if resized else processor,
        provenance=conversion.provenance,
        source=source,
        conversion=conversion,
    )


def write_torch_directory(
    directory: Path, model: LevitBase, variables: Variables, processor: LevitImageProcessor, layout: str
) -> None:
    """Write what the layout's own library opens: weights, and config and preprocessing where it knows such files."""
    save_torch(directory / TORCH_FILE, model, variables, layout)
    if layout == "hf":
        values = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        (directory / checkpoint.CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        processor.save_pretrained(directory)
    elif layout.startswith("timm"):
        config = write_timm_config(model.config, model.head_names, processor, convolutional=layout == "timm_conv")
        (directory / checkpoint.CONFIG_FILE).write_text(config, encoding="utf-8")


def describe_conversion(source: Source, conversion: Conversion) -> dict[str, Any]:
    """Return what was found in a checkpoint, JSON-ready."""
    config = conversion.model.config
    return {
        "checkpoint": {
            "layout": conversion.layout.name,
            "batch norm": "fused" if conversion.model.folded else "present",
            "heads": list(conversion.model.head_names),
            "taken out of": list(source.wrappers),
            "architecture": "read from the shapes" if conversion.inferred else "read from config.json",
            "image size": list(config.image_height_width),
            "classes": config.num_labels,
            "blocks per stage": list(config.depths),
            "mapped": {row.torch: row.flax for row in conversion.rows},
            "ignored": {reason: list(names) for reason, names in conversion.ignored.items()},
            "notes": list(conversion.notes),
        }
    }


def describe_model(model: LevitBase, variables: Variables) -> dict[str, Any]:
    """Return what was written, JSON-ready."""
    return {
        "class": type(model).__name__,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "dtype": str(np.dtype(model.param_dtype)),
        "folded": model.folded,
    }


def prove_round_trip(source: Source, conversion: Conversion) -> dict[str, Any]:
    """Turn the conversion back into the source's layout, and count the tensors that have the source's bytes."""
    differing = find_differing_bytes(source, conversion)
    as_source = "the source's bytes" if conversion.dtype is None else f"the source's values as {conversion.dtype}"
    return {
        "passed": not differing,
        "tensors": len(conversion.rows),
        "with": as_source,
        "differing": differing,
    }


def prove_with_pytorch(source: Source, conversion: Conversion, verify: bool) -> dict[str, Any]:
    """Compare every block and the logits with PyTorch, or say why not."""
    result = compare_with_pytorch(source, conversion) if verify else "--no-verify"
    if isinstance(result, str):
        return {"passed": None, "outcome": NOT_COMPARED, "because": result}
    return {
        "reference": result.reference,
        "probes": PROBES,
        "seed": PROBE_SEED,
        **as_dict(result.logits),
        "blocks": {
            path: {"absolute": block.absolute, "relative": block.relative} for path, block in result.blocks.items()
        },
    }


def prove_surgery(loaded: Loaded, model: LevitBase, variables: Variables) -> dict[str, Any]:
    """Compare the logits of the model that was operated on with those before."""
    pixels = probes(model)
    result, reference = forward(model, variables, pixels), forward(loaded.model, loaded.variables, pixels)
    return as_dict(compare(result, reference, rounding_limit(model.param_dtype)))


def prove_written(directory: Path, model: LevitBase, variables: Variables, verify: bool) -> dict[str, Any]:
    """Read a PyTorch directory that was just written, and compare it with what it should hold and with PyTorch."""
    opened = open_source(directory)
    # Layouts without a config do not say these; with one, it is read and checked.
    conversion = convert(opened, config=model.config if opened.config is None else None)
    flat, back = (flatten_dict(tree, sep="/") for tree in (variables, conversion.variables))
    differing = [path for path, leaf in flat.items() if not same_bytes(np.asarray(leaf), back[path])]
    return {
        "read back": {"passed": not differing, "tensors": len(flat), "with": "the same bytes", "differing": differing},
        "PyTorch": prove_with_pytorch(opened, conversion, verify),
    }


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison JSON-ready."""
    return {"passed": comparison.passed, **comparison._asdict()}


def check_proof(proof: dict[str, dict[str, Any]]) -> None:
    """Raise ConversionError where a part of the proof failed."""
    failed = [f"{name}: {outcome(part)}" for name, part in proof.items() if part["passed"] is False]
    if failed:
        raise ConversionError(f"The result is not proved right, so nothing was written. {'; '.join(failed)}.")


def outcome(part: dict[str, Any]) -> str:
    """Return one part of a proof as a sentence without its full stop."""
    if part["passed"] is None:
        return f"{part['outcome']} ({part['because']})"
    if "tensors" in part:
        if part["differing"]:
            return f"{len(part['differing'])} of {part['tensors']} tensors differ, first {part['differing'][0]}"
        return f"{part['tensors']} tensors with {part['with']}"
    reference = f" from {part['reference']}" if "reference" in part else ""
    return (
        f"logits differ{reference} by {part['absolute']:.1e} at most, {part['relative']:.1e} of the largest (limit"
        f" {part['limit']:.0e})"
    )


def summary(report: dict[str, Any]) -> dict[str, str]:
    """Return what a reader wants to know of a report, a line for each name."""
    found, model = report.get("checkpoint"), report["model"]
    lines = {"source": report["source"]["source"]}
    lines |= {f"sha256 of {name}": digest for name, digest in report["source"].get("files", {}).items()}
    if "revision" in report["source"]:
        lines["revision"] = report["source"]["revision"]
    if found:
        taken = f", taken out of {' '.join(found['taken out of'])}" if found["taken out of"] else ""
        lines["layout"] = f"{found['layout']}, batch norm {found['batch norm']}{taken}"
        height, width = found["image size"]
        lines["architecture"] = (
            f"{found['architecture']}: {height}x{width} pixels, {found['classes']} classes, heads"
            f" {', '.join(found['heads']) or 'none'}, blocks per stage {', '.join(map(str, found['blocks per stage']))}"
        )
        lines["mapped"] = f"{len(found['mapped'])} tensors"
        if found["ignored"]:
            lines["ignored"] = "; ".join(
                f"{len(names)} tensors: {reason}" for reason, names in found["ignored"].items()
            )
        if found["notes"]:
            lines["notes"] = " ".join(found["notes"])
    lines["model"] = (
        f"{model['class']}, {model['parameters']:,} parameters, {model['dtype']}{', folded' if model['folded'] else ''}"
    )
    lines["written as"] = ". ".join(report["written"][key] for key in ("layout", "note") if key in report["written"])
    lines |= {name: outcome(part) for name, part in report["proof"].items()}
    return lines


def readable(report: dict[str, Any]) -> str:
    """Return a report as a page of Markdown."""
    lines = ["# Conversion report", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in summary(report).items()]
    blocks = report["proof"].get("PyTorch", {}).get("blocks", {})
    if blocks:
        lines += ["", "Largest differences behind each block:", "", "| block | absolute | relative |", "|---|---|---|"]
        lines += [f"| {path} | {block['absolute']:.1e} | {block['relative']:.1e} |" for path, block in blocks.items()]
    if "checkpoint" in report:
        lines += ["", "Where each tensor went:", "", "| in the checkpoint | in the variables |", "|---|---|"]
        lines += [f"| {torch} | {flax} |" for torch, flax in report["checkpoint"]["mapped"].items()]
    return "\n".join(lines) + "\n"
