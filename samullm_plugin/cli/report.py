"""``samullm report``: a run directory as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samullm_plugin.cli.output import console
from samullm_plugin.errors import InputError


def report(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a run, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Page to write; report.html in the run directory."),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Show the page on 127.0.0.1 while the run goes on."),
    ] = False,
    port: Annotated[
        int, typer.Option(help="Port for --serve; 0: any that is free.", min=0, max=65535)
    ] = 0,
) -> None:
    """Show a run on one page: planned against measured, failures, and where figures come from."""
    from samullm_plugin.run.report import read_run, write_report

    if serve:
        from samullm_plugin.run.report_server import serve_report

        if output is not None:
            raise InputError("--serve writes no file; leave out --output")
        serve_report(
            run_dir, port, lambda text: console().print(text, markup=False, soft_wrap=True)
        )
        return
    run = read_run(run_dir)
    path = output if output is not None else run_dir / "report.html"
    write_report(run, path)
    console().print(f"report written to {path}", markup=False)
