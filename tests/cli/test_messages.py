"""The library's messages name Python parameters, which the command line replaces by its flags."""

import ast
import re
from pathlib import Path

import pytest

import levit_flax
from levit_flax.cli.flags import FLAGS

PACKAGE = Path(levit_flax.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "cli")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
PARAMETER = re.compile(rf"\b(?:{'|'.join(form.partition('=')[0] for form in FLAGS)})=(?:True|False|\.\.\.)")


def messages(path):
    """Return the string constants of a module, except docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_messages_name_parameters_and_no_flags(path):
    for message in messages(path):
        assert not FLAG.search(message), message
        assert set(PARAMETER.findall(message)) <= FLAGS.keys(), message
