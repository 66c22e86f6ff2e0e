"""Check that functions have at most 60 lines of code and files at most 500 lines.

`make lint` runs this. Docstrings, comments and blank lines of a function are not counted. A comment `# long: REASON` on
the line of `def` exempts a function.

    python tools/check_lengths.py levit_flax benchmarks tools tests
"""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

FUNCTION_LINES, FILE_LINES = 60, 500
EXEMPTION = "# long: "
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that contain code, including docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {line for token in tokens if token.type not in LAYOUT for line in range(token.start[0], token.end[0] + 1)}


def find_long_parts(path: Path) -> Iterator[str]:
    """Yield a message for each function that is too long, and one for the file."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    if len(lines) > FILE_LINES:
        yield f"{path}: {len(lines)} lines, expected at most {FILE_LINES}"
    code = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or EXEMPTION in lines[node.lineno - 1]:
            continue
        own = code.intersection(range(node.lineno, node.end_lineno + 1))
        if ast.get_docstring(node) is not None:
            own.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if len(own) > FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {len(own)} lines of code, expected at most {FUNCTION_LINES}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIRECTORY")
    paths = [path for directory in parser.parse_args().directories for path in sorted(directory.rglob("*.py"))]
    messages = [message for path in paths for message in find_long_parts(path)]
    print(*messages, sep="\n", end="\n" if messages else "")
    sys.exit(bool(messages))


if __name__ == "__main__":
    main()
