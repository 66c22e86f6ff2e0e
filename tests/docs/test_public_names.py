"""A name without an underscore is documented: the reference lists exactly the public names of the package."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import levit_flax

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"
PACKAGE = Path(levit_flax.__file__).parent

pytestmark = pytest.mark.skipif(not REFERENCE.is_file(), reason="the documentation does not come with the wheel")


def assigned_names(statement):
    """Yield the names that a statement at the top of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def defined_names():
    """Yield the dotted name of everything without an underscore that a module defines, except in the command line.

    `levit_flax.cli` is a program: its commands are documented by their help texts and docs/command_line.md.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in assigned_names(statement):
                if not name.startswith("_") and (not module.startswith("levit_flax.cli") or name == "main"):
                    yield f"{module}.{name}"


def home(dotted):
    """Return the dotted name under which a documented object is defined."""
    found = pkgutil.resolve_name(dotted)
    if inspect.isclass(found) or inspect.isfunction(found):
        return f"{found.__module__}.{found.__qualname__}"
    # A constant does not know its module: it is the one that defines the name.
    [defined] = [name for name in defined_names() if name.rpartition(".")[2] == dotted.rpartition(".")[2]]
    return defined


def test_reference_lists_exactly_the_public_names():
    documented = re.findall(r"^::: (\S+)$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(documented) == len(set(documented))
    aliases = {
        "levit_flax.image_processing.LevitImageProcessorFast",
        "levit_flax.image_processing.LevitFeatureExtractor",
    }
    assert {home(name) for name in documented} | aliases == set(defined_names())


@pytest.mark.parametrize("package", ["levit_flax", "levit_flax.convert", "levit_flax.training"])
def test_reference_lists_every_exported_name(package):
    exported = importlib.import_module(package).__all__
    documented = REFERENCE.read_text(encoding="utf-8")
    homes = {home(name) for name in re.findall(r"^::: (\S+)$", documented, re.MULTILINE)}
    assert exported and all(home(f"{package}.{name}") in homes for name in exported)
