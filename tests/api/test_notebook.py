"""The notebook of the examples runs in a real kernel, and shows what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebooks" / "answers.ipynb"
PROGRAM = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
nbformat.write(book, sys.argv[2])
"""


def outputs(cell: dict[str, Any]) -> str:
    """Return everything a cell shows."""
    found = []
    for output in cell["outputs"]:
        found += [str(v) for v in output.get("data", {}).values()]
        found.append(str(output.get("text", "")))
    return "\n".join(found)


def test_the_notebook_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(NOTEBOOK), "done.ipynb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = [
        c
        for c in json.loads((tmp_path / "done.ipynb").read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    plan, compared, run, table = (outputs(c) for c in cells[2:6])
    assert "answers on 8 GPUs by greedy" in plan
    assert "<td>max-heuristic</td>" in compared
    assert "<td>40 of 40</td>" in run  # the progress was drawn, and drawn again at the end
    assert "finished after" in run
    assert "<th>answer.small</th>" in table
    assert "40 rows" in table
    assert {p.name for p in tmp_path.iterdir()} == {
        "answers",
        "answers.parquet",
        "done.ipynb",
        "runs",
    }
