"""Executes every notebook from top to bottom; a cell that raises fails the run. Nothing is written back."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

failed = False
for path in sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb")):
    began = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    try:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
        print(f"{path.name}: {len(notebook.cells)} cells in {time.perf_counter() - began:.0f} s", flush=True)
    except CellExecutionError as error:
        failed = True
        print(f"{path.name}: {error}", flush=True)
sys.exit(failed)
