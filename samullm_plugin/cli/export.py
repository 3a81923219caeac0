"""``samullm export``: the joined table of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samullm_plugin.cli.output import console


def export(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a run, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; result.FORMAT in the run directory."),
    ] = None,
    format: Annotated[  # the option's name
        str | None, typer.Option(help="parquet, csv or jsonl; default: as the file's name says.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Columns, comma separated, as in app.yaml's output; default: all."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="NODE", help="One row per request of this node.")
    ] = None,
) -> None:
    """Write one table with a row per item: its inputs, every node's output, and errors."""
    from samullm_plugin.run.table_files import export_table, table_format

    path = output if output is not None else run_dir / f"result.{format or 'parquet'}"
    kind = table_format(path, format)
    names = [c.strip() for c in (columns or "").split(",") if c.strip()]
    count = export_table(run_dir, path, kind, names, rows)
    console().print(f"{count:,} rows written to {path}", markup=False)
