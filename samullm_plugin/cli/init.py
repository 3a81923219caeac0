"""``samullm init``: a folder with an application that runs."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from samullm_plugin.cli.output import console
from samullm_plugin.errors import InputError, suggest


def init(
    directory: Annotated[Path, typer.Argument(help="Folder to write; must be empty or new.")],
    example: Annotated[
        str, typer.Option(help="What to start from: preference, judging, extraction or cascade.")
    ] = "preference",
) -> None:
    """Write a runnable application: app.yaml and what belongs to it."""
    starters = files("samullm_plugin") / "data" / "starters"
    known = sorted(p.name for p in starters.iterdir())
    if example not in known:
        hint = suggest(example, known)
        raise InputError(f"--example: there is no {example!r}{hint}; there is {', '.join(known)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is not an empty folder; name a new one")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file in (f for f in (starters / example).iterdir() if f.is_file()):
            (directory / file.name).write_bytes(file.read_bytes())
    except OSError as error:
        raise InputError(f"{directory}: {error.strerror}") from error
    out = console()
    out.print(f"{directory / 'app.yaml'} and what belongs to it are written; next:", markup=False)
    for command in ("preview", "plan"):
        out.print(f"  samullm {command} {directory / 'app.yaml'}", markup=False)
    run = directory / "runs" / "1"
    out.print(f"  samullm run {directory / 'app.yaml'} --output-dir {run}", markup=False)
