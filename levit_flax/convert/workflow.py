"""Convert a source to a directory and verify it, as `levit-flax convert` does."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from levit_flax import checkpoint, files, loading, surgery
from levit_flax.choices import _CallError
from levit_flax.configuration import _CONFIG_FILE
from levit_flax.hub import _DEFAULTS, _HubOptions, _Resolved
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.modeling import LevitBase, Variables

from .conversion import _Conversion, _convert
from .errors import ConversionError
from .report import _Checkpoint, _Parity, _ReadBack, _Report, _Result, _RoundTrip, _Skipped, _Surgery, _Written
from .sources import _WEIGHT_SUFFIXES, _open_resolved, _open_source, _sha256, _Source
from .timm_files import _write_timm_config
from .verification import (
    _compare,
    _compare_with_pytorch,
    _find_differing_bytes,
    _forward,
    _probes,
    _rounding_limit,
    _same_bytes,
)
from .writing import _check_layout, _check_transformers_size, save_torch

_TORCH_FILE = checkpoint._TORCH_WEIGHT_FILES[0]


@dataclass(frozen=True)
class _Loaded:
    """A model of any origin.

    Attributes:
        model: the module.
        variables: its variables.
        processor: prepares its images.
        provenance: where it was loaded from, JSON-ready.
        checkpoint: the opened PyTorch checkpoint and its conversion; None for a Flax model directory.
    """

    model: LevitBase
    variables: Variables
    processor: LevitImageProcessor
    provenance: dict[str, Any]
    checkpoint: tuple[_Source, _Conversion] | None = None


def _convert_to_directory(
    source: str,
    out: Path,
    *,
    layout: str | None = None,
    dtype: str | None = None,
    source_image_size: int | tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    ema: bool = False,
    prefix: str | None = None,
    fold: bool = False,
    merge: bool = False,
    verify: bool = True,
    options: _HubOptions = _DEFAULTS,
    overwrite: bool = False,
) -> _Report:
    """Convert a model to a directory, verify it, and return the report, which is also saved in the directory.

    The directory is written completely or not at all.

    Args:
        source: a weight file, directory or Hub id with PyTorch weights, or a Flax model directory.
        out: the directory to write.
        layout: the PyTorch layout to write; None for a Flax model directory.
        dtype: dtype of the floating-point arrays; None keeps the source's.
        source_image_size: as in `from_torch`.
        image_size: as in `from_torch`.
        ema: as in `from_torch`.
        prefix: as in `from_torch`.
        fold: fold the batch norms.
        merge: merge the two heads.
        verify: compare with PyTorch if it is installed. The round trip to the source's bytes is always checked.
        options: how to access the Hub.
        overwrite: replace an existing model.
    """
    files._check_free(out, overwrite)
    if fold and layout == "hf":
        raise _CallError(
            "transformers has no layout for folded models: expected no folding, or the layout timm, timm_conv or"
            " facebook. Leave out one of the two."
        )
    loaded = _load(source, layout is not None, dtype, source_image_size, ema, prefix, options)
    results = _verify_conversion(loaded, compare_pytorch=layout is None, verify=verify)
    model, variables, provenance = loaded.model, loaded.variables, loaded.provenance
    if merge or fold:
        model, variables = _apply_surgery(model, variables, fold=fold, merge=merge)
        provenance = {**provenance, "merged_heads": merge, "folded_batch_norm": model.folded}
        results["surgery"] = _verify_surgery(loaded, model, variables)
    processor = loaded.processor
    if image_size is not None:
        model, variables = surgery.resize_image(model, variables, image_size)
        processor = loading._resize_processor(processor, model.config)
        provenance = {**provenance, "resized from": list(loaded.model.config.image_height_width)}
    if layout is not None:
        _check_layout(model, layout)
    with files._staged_directory(out, overwrite, checkpoint._OWN_FILES, _CONFIG_FILE) as staging:
        if layout is None:
            checkpoint._write_model(staging, model, variables, processor, provenance)
        else:
            _write_torch_directory(staging, model, variables, processor, layout)
            results |= _verify_written(staging, model, variables, verify)
        report = _Report(
            source=loaded.provenance,
            checkpoint=loaded.checkpoint and _Checkpoint.of(*loaded.checkpoint),
            results=results,
            written=_Written.of(model, variables, staging, layout or "levit_flax", _find_limitation(model, layout)),
        )
        report.check()
        text = json.dumps(report.to_dict(), indent=2) + "\n"
        (staging / checkpoint._REPORT_FILE).write_text(text, encoding="utf-8")
        files._write_text(staging / checkpoint._READABLE_REPORT_FILE, report.to_markdown())
    return report


def _load(
    source: str,
    prefer_own: bool,
    dtype: str | None,
    source_image_size: int | tuple[int, int] | None,
    ema: bool,
    prefix: str | None,
    options: _HubOptions,
) -> _Loaded:
    """Load a Flax model directory, or convert a PyTorch checkpoint; `prefer_own` decides if there are both."""
    resolved = _find(source, prefer_own, options)
    if resolved is not None and resolved.weights is not None and resolved.weights.name == checkpoint._WEIGHTS_FILE:
        given = {
            "source_image_size=...": source_image_size is not None,
            "ema=True": ema,
            "prefix=...": prefix is not None,
        }
        unused = " and ".join(name for name, is_given in given.items() if is_given)
        if unused:
            raise ValueError(
                f"{source} is already converted: expected a PyTorch checkpoint with {unused}, found Flax weights. Leave"
                f" out {unused}."
            )
        return _load_own(source, resolved, dtype)
    if resolved is None:
        opened = _open_source(source, ema=ema, prefix=prefix, options=options)
    else:
        opened = _open_resolved(source, resolved, ema, prefix)
    with ThreadPoolExecutor(1) as pool:  # hashing takes as long as converting, so it runs at the same time
        digests = pool.submit(_hash_files, opened.files)
        conversion = _convert(opened, dtype, source_image_size=source_image_size)
        processor = loading._load_processor(opened.directory, conversion.model.config)
        if source_image_size is not None:
            processor = loading._resize_processor(processor, conversion.model.config)
        provenance = {**conversion.provenance, "files": digests.result()}
    return _Loaded(conversion.model, conversion.variables, processor, provenance, (opened, conversion))


def _find(source: str, prefer_own: bool, options: _HubOptions) -> _Resolved | None:
    """Return the files of a directory or a Hub repository, or None if the source is a file."""
    path = Path(source).expanduser()
    if path.is_file() or path.suffix in _WEIGHT_SUFFIXES:
        return None
    own, torch = (checkpoint._WEIGHTS_FILE,), checkpoint._TORCH_WEIGHT_FILES
    return loading._resolve(source, options, weights=own + torch if prefer_own else torch + own)


def _hash_files(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name."""
    return {file.name: _sha256(file) for file in files}


def _load_own(source: str, resolved: _Resolved, dtype: str | None) -> _Loaded:
    """Load a Flax model directory."""
    directory = resolved.directory
    model, variables = checkpoint._read_directory(directory)
    if dtype is not None:
        model, variables = checkpoint._cast(model, variables, dtype)
    return _Loaded(
        model=model,
        variables=variables,
        processor=loading._load_processor(directory, model.config),
        provenance={
            "source": source,
            **({"revision": resolved.revision} if resolved.revision else {}),
            "files": _hash_files([directory / checkpoint._WEIGHTS_FILE]),
            "layout": "levit_flax",
            "converted from": checkpoint._read_provenance(directory),
        },
    )


def _apply_surgery(model: LevitBase, variables: Variables, *, fold: bool, merge: bool) -> tuple[LevitBase, Variables]:
    if merge:
        model, variables = surgery.merge_heads(model, variables)
    if fold and not model.folded:
        model, variables = surgery.fold_batch_norm(model, variables)
    return model, variables


def _write_torch_directory(
    directory: Path, model: LevitBase, variables: Variables, processor: LevitImageProcessor, layout: str
) -> None:
    """Write the files that the layout's library loads: weights, and its config and preprocessing if it has any."""
    save_torch(directory / _TORCH_FILE, model, variables, layout)
    if layout == "hf":
        values = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        (directory / _CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        processor.save_pretrained(directory)
    elif layout.startswith("timm"):
        config = _write_timm_config(model.config, model.head_names, processor, convolutional=layout == "timm_conv")
        (directory / _CONFIG_FILE).write_text(config, encoding="utf-8")


def _find_limitation(model: LevitBase, layout: str | None) -> str | None:
    """Return why transformers cannot run a model written for it, or None."""
    if layout == "hf":
        try:
            _check_transformers_size(model.config)
        except ConversionError as error:
            return str(error)
    return None


def _verify_conversion(loaded: _Loaded, *, compare_pytorch: bool, verify: bool) -> dict[str, _Result]:
    """Check the round trip of a converted checkpoint, and compare it with PyTorch."""
    if loaded.checkpoint is None:
        return {}
    source, conversion = loaded.checkpoint
    differing = _find_differing_bytes(source, conversion)
    results: dict[str, _Result] = {
        "round trip": _RoundTrip(len(conversion.rows), tuple(differing), dtype=conversion.dtype)
    }
    if compare_pytorch:
        results["PyTorch"] = _verify_with_pytorch(source, conversion, verify)
    return results


def _verify_with_pytorch(source: _Source, conversion: _Conversion, verify: bool) -> _Parity | _Skipped:
    if not verify:
        return _Skipped("verify=False")
    compared = _compare_with_pytorch(source, conversion)
    return _Skipped(compared) if isinstance(compared, str) else _Parity(compared)


def _verify_surgery(loaded: _Loaded, model: LevitBase, variables: Variables) -> _Surgery:
    """Compare the logits before and after surgery."""
    pixels = _probes(model)
    result, reference = _forward(model, variables, pixels), _forward(loaded.model, loaded.variables, pixels)
    return _Surgery(_compare(result, reference, _rounding_limit(model.param_dtype)))


def _verify_written(directory: Path, model: LevitBase, variables: Variables, verify: bool) -> dict[str, _Result]:
    """Read a PyTorch directory back, and compare it with the model and with PyTorch."""
    opened = _open_source(directory)
    # A layout without a config.json needs the model's config; the others have theirs checked here.
    conversion = _convert(opened, config=model.config if opened.config is None else None)
    flat, back = (flatten_dict(tree, sep="/") for tree in (variables, conversion.variables))
    differing = tuple(path for path, leaf in flat.items() if not _same_bytes(np.asarray(leaf), back[path]))
    return {
        "read back": _ReadBack(len(flat), differing),
        "PyTorch": _verify_with_pytorch(opened, conversion, verify),
    }
