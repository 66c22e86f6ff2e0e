"""The repository, the files and the calls that the tests of the Hub share."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from levit_flax.hub import _HubOptions, _resolve, _Resolved

REPO = "levit/tiny"
WEIGHTS = (
    "flax_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FILES = ("config.json", "preprocessor_config.json")
MODEL = {"config.json": b"{}", "model.safetensors": b"safe" * 1000, "pytorch_model.bin": b"pickle", "README.md": b"#"}

# A failure that needs no answer from a network must not keep the user waiting.
PROMPT_SECONDS = 3


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def load(source: str | Path = REPO, **options: Any) -> _Resolved:
    return _resolve(source, weights=WEIGHTS, files=FILES, options=_HubOptions(**options))


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text and text.endswith("."), text
    return text
