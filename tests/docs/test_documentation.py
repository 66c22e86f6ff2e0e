"""Run the examples of the documentation unchanged: those of docstrings, and each page in its own process."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from quick_compiler import compiler_environment, quick_compiler

import levit_flax
from hub_server import HubServer
from levit_flax import convert

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LONG = (  # they compile several models; other tests in the short run export and evaluate
    "classify.md",
    "command_line.md",
    "convert.md",
    "data.md",
    "evaluate.md",
    "export.md",
    "features.md",
    "finetune.md",
    "from_transformers.md",
    "nnx.md",
    "understand.md",
)
NEEDS = {
    "understand.md": "matplotlib",
    "export.md": "flatbuffers",
    "finetune.md": "grain",
    "nnx.md": "orbax.checkpoint",
}
OBJECT = re.compile(r"^::: (\S+)$", re.MULTILINE)  # as mkdocstrings marks them

PACKAGE = Path(levit_flax.__file__).parent
# Every module with an example in a docstring.
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)
# Their examples compile whole models.
COMPILING = tuple(
    f"levit_flax.{name}"
    for name in (
        "classifier",
        "cli.app",
        "evaluation",
        "modeling",
        "modeling_outputs",
        "nnx",
        "training.finetuning",
        "visualize",
    )
)
# What the examples of a package, a module or a function need.
EXAMPLES_NEED = {
    "levit_flax.visualize": "matplotlib",
    "levit_flax.export": "flatbuffers",
    "levit_flax.onnx_export": "jax2onnx",
    "levit_flax.training": "grain",
}


@pytest.fixture(scope="module", autouse=True)
def compiled(compiled_directory):
    """The directory where this process and those of the pages keep what they compile."""
    with quick_compiler(compiled_directory):
        yield compiled_directory


needs_pages = pytest.mark.skipif(not PAGES, reason="the documentation does not come with the wheel")


@needs_pages
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.name in LONG else ()) for page in PAGES],
    ids=[page.name for page in PAGES],
)
def test_examples_of_a_page(page, compiled, tmp_path):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    if page.name == "reference.md":
        assert not blocks
        return
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    assert blocks
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(tmp_path / "cat.jpg")
    script = "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **compiler_environment(compiled), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def _own_hub(monkeypatch):
    """Redirect uploads of the examples to a Hub on this machine."""
    with HubServer() as hub:
        hub.tokens.add("hf_writer")
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield


def lacking(name):
    """Return the missing packages that the examples of this name need."""
    needed = [package for home, package in EXAMPLES_NEED.items() if f"{name}.".startswith(f"{home}.")]
    return [package for package in needed if find_spec(package) is None]


@pytest.mark.usefixtures("_own_hub")
@pytest.mark.parametrize(
    "module", [pytest.param(module, marks=pytest.mark.slow if module in COMPILING else ()) for module in MODULES]
)
def test_examples_of_docstrings(module):
    if lacking(module):
        pytest.skip(f"not installed: {lacking(module)}")
    runner = doctest.DocTestRunner()
    promotion = "standard" if "training" in module else "strict"  # optax needs the standard one
    with jax.numpy_dtype_promotion(promotion):
        for examples in doctest.DocTestFinder().find(importlib.import_module(module)):
            if not lacking(examples.name):
                runner.run(examples)
    assert runner.tries and not runner.failures


def public_objects():
    """Yield the name and object of everything public: exported by a package or listed in the reference."""
    names = [f"levit_flax.{name}" for name in levit_flax.__all__]
    names += [f"levit_flax.convert.{name}" for name in convert.__all__]
    reference = (DOCS / "reference.md").read_text(encoding="utf-8")
    names += OBJECT.findall(reference)
    for name in names:
        found = pkgutil.resolve_name(name)
        yield from members(name, found) if inspect.ismodule(found) or inspect.isclass(found) else [(name, found)]


def members(name, owner):
    """Yield a class and its public methods and properties, or the public classes and functions of a module."""
    if inspect.isclass(owner):
        yield name, owner
    for key, value in vars(owner).items():
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)  # of properties and class methods
        home = owner.__name__ if inspect.ismodule(owner) else owner.__module__
        if key.startswith("_") or getattr(value, "__module__", None) != home:
            continue  # private, inherited, imported, or made by a decorator
        if inspect.isclass(value):
            yield from members(f"{name}.{key}", value)
        elif inspect.isfunction(value):
            yield f"{name}.{key}", value


@needs_pages
def test_public_objects_have_an_example_that_runs():
    checked, without = 0, []
    for name, found in public_objects():
        if type(found) in (str, tuple, types.GenericAlias):  # plain values and aliases have no docstrings
            continue
        described = found if inspect.isclass(found) or inspect.isfunction(found) else type(found)
        text = described.__doc__ or ""
        example = text.partition("Examples:")[2]
        if not doctest.DocTestParser().get_examples(example) or described.__module__ not in MODULES:
            without.append(name)
        checked += 1
    assert checked > 80 and not without
