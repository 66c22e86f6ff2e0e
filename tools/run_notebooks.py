"""Run notebooks and store their outputs. `make notebooks` runs this."""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run_notebook(notebook: nbformat.NotebookNode, directory: Path) -> None:
    # Without times and the Python version, a rerun with equal outputs leaves the file unchanged.
    NotebookClient(
        notebook, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(directory)}}
    ).execute()
    notebook.metadata["language_info"] = {"name": "python"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="NOTEBOOK")
    for path in parser.parse_args().paths:
        print(path)
        notebook = nbformat.read(path, as_version=4)
        run_notebook(notebook, path.parent)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
