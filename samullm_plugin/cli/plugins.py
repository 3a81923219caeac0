"""``samullm plugins``: what is installed and whether it works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samullm_plugin.cli.output import Json, print_table, write_json
from samullm_plugin.errors import InputError
from samullm_plugin.host.manager import NO_PLUGINS, PluginHost
from samullm_plugin.host.registration import PluginProvenance

app = typer.Typer(add_completion=False, invoke_without_command=True)


@app.callback()
def plugins(
    context: typer.Context,
    json: Json = False,
    requirements: Annotated[
        bool, typer.Option("--requirements", help="Print distribution==version lines for pip.")
    ] = False,
) -> None:
    """List plugins and whether they work: kind, name, distribution, version, module, status."""
    if context.invoked_subcommand is not None:
        return
    rows = PluginHost.from_settings().provenance()
    if not rows:
        raise InputError(NO_PLUGINS)
    if requirements:
        lines = {f"{row.distribution}=={row.version}" for row in rows if row.version}
        typer.echo("\n".join(sorted(lines)))
    elif json:
        write_json(rows)
    else:
        _show(rows)


def _show(rows: list[PluginProvenance]) -> None:
    """Print the table for people."""
    print_table(
        ["Kind", "Name", "Distribution", "Version", "Module", "Status"],
        [
            (
                row.kind,
                row.name,
                row.distribution,
                row.version,
                row.module,
                f"{row.status}: {row.reason}" if row.reason else row.status,
            )
            for row in rows
        ],
    )


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Name of the plugin, such as longest-first.")],
    kind: Annotated[
        str,
        typer.Option(
            help="scheduler, length-estimator, latency-model, request-policy or executor."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write the package to.")],
) -> None:
    """Write a package for a plugin of your own: it installs and passes its tests as it is."""
    from samullm_plugin.host.scaffolding import write_plugin

    for path in write_plugin(name, kind, output):
        typer.echo(path)
