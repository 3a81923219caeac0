"""What commands write: JSON on stdout or in a file, tables and progress for people on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samullm_plugin.cli.streams import is_quiet
from samullm_plugin.files import save, to_json

if TYPE_CHECKING:
    from rich.console import Console

OutputJson = Annotated[
    str | None,
    typer.Option("--output-json", metavar="FILE", help="Write the result as JSON; -: to stdout."),
]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON to stdout.")]

_WIDTH_OF_A_FILE = 160


def write_json(value: object, target: str | None = None) -> None:
    """Write a result as JSON; numbers that JSON lacks (infinite, not a number) become null.

    Args:
        value: dataclasses, numpy values, paths and enums are understood.
        target: file to write; ``-`` or None is stdout.

    Raises:
        InputError: if the file cannot be written.
    """
    data = to_json(value, indent=2) + b"\n"
    if target in (None, "-"):
        sys.stdout.write(data.decode())
        return
    save(Path(str(target)), [data])


def console() -> Console:
    """Return a console on stderr; wide where no terminal limits it."""
    from rich.console import Console

    return Console(
        stderr=True,
        width=None if sys.stderr.isatty() else _WIDTH_OF_A_FILE,
        highlight=False,
    )


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str | None = None,
    numbers: Sequence[str] = (),
) -> None:
    """Print a table for people on stderr.

    Args:
        columns: headings.
        rows: a cell per column; None is shown as ``-``.
        title: above the table.
        numbers: headings of the columns to align right.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    for row in rows:
        table.add_row(*("-" if cell is None else escape(str(cell)) for cell in row))
    console().print(table)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on a terminal, and nothing elsewhere.

    Yields:
        A function to call as each of ``total`` parts starts, with its name.
    """
    if is_quiet() or not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.progress import Progress

    with Progress(console=console(), transient=True) as bars:
        task = bars.add_task(description, total=total)
        started = False

        def advance(name: str) -> None:
            nonlocal started
            bars.update(task, advance=int(started), description=f"{description}: {name}")
            started = True

        yield advance


LOSS = 0.995
"""Speedups below this are losses; what rounds to 1.00x is neither."""


def seconds(value: float | None) -> str:
    """Return seconds with three significant digits or so."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def percent(share: float | None) -> str:
    """Return a share in percent."""
    return "-" if share is None else f"{100 * share:.1f} %"


def speedup(value: float | None) -> str:
    """Return a speedup, a loss marked."""
    return "-" if value is None else f"{value:.2f}x{' !' if value < LOSS else ''}"


def least_speedup(values: list[float]) -> str:
    """Return the worst of some speedups."""
    return f"{min(values):.2f}x" if values else "-"


def median_speedup(values: list[float]) -> str:
    """Return the median of some speedups."""
    from statistics import median

    return f"{median(values):.2f}x" if values else "-"
