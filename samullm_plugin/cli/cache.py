"""``samullm cache``: the outputs that are kept for later runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from samullm_plugin.cli.output import Json, console, print_table, write_json
from samullm_plugin.errors import InputError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Outputs that are kept for later runs."
)

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@app.command()
def show(json: Json = False) -> None:
    """Show where the store is and what it holds."""
    from samullm_plugin.run.store import OutputStore, StoreFigures, store_path

    path = store_path()
    figures = StoreFigures(path, {}, 0, None)
    if path.exists():
        with OutputStore(path) as store:
            figures = store.figures()
    if json:
        write_json(figures)
        return
    rows = [(model, f"{count:,}") for model, count in sorted(figures.outputs.items())]
    if rows:
        print_table(["Model", "Outputs"], rows, numbers=["Outputs"])
    line = f"{figures.path}: {figures.file_bytes / 2**20:,.1f} MiB"
    if figures.oldest_s is None:
        line = f"{figures.path}: nothing is stored"
    else:
        days = (time.time() - figures.oldest_s) / _UNITS["d"]
        line += f"; the oldest was last used {days:.0f} days ago"
    console().print(line, markup=False)


@app.command()
def prune(
    older_than: Annotated[
        str | None,
        typer.Option(help="Those not used for so long, such as 30d, 12h, 90m."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Those of this model.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Remove stored outputs."""
    from samullm_plugin.run.store import OutputStore, store_path

    if not (older_than or model or everything):
        raise InputError("say what goes: --older-than 30d, --model NAME, or --all")
    path: Path = store_path()
    age_s = None if older_than is None else _seconds(older_than)
    with OutputStore(path, create=False) as store:
        known = store.figures().outputs
        if model is not None and model not in known:
            raise InputError(
                f"--model {model}: nothing of it is stored; there are {', '.join(known) or 'none'}"
            )
        count = store.prune(older_s=age_s, model=model)
    console().print(f"{count:,} outputs removed from {path}", markup=False)


def _seconds(text: str) -> float:
    """Return a duration such as ``30d`` in seconds.

    Raises:
        InputError: for a text of another form.
    """
    try:
        return float(text[:-1]) * _UNITS[text[-1:]]
    except (KeyError, ValueError) as error:
        raise InputError(
            f"--older-than {text!r}: write a number and one of s, m, h, d, such as 30d"
        ) from error
