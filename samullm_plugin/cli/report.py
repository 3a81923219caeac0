"""``samullm report``: a run directory as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samullm_plugin.cli.output import console


def report(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a run, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Page to write; report.html in the run directory."),
    ] = None,
) -> None:
    """Show a run on one page: planned against measured, failures, and what figures rest on."""
    from samullm_plugin.run.report import read_run, write_report

    run = read_run(run_dir)
    path = output if output is not None else run_dir / "report.html"
    write_report(run, path)
    console().print(f"report written to {path}", markup=False)
