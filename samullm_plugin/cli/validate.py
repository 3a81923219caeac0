"""``samullm validate``: find what is wrong with an application before it costs anything."""

from __future__ import annotations

from typing import Annotated

import typer

from samullm_plugin.cli.output import Json, console, print_table, write_json


def validate(
    application: Annotated[
        str,
        typer.Argument(help="An app.yaml, or a bundled application such as routing.", metavar="APP"),
    ],
    json: Json = False,
) -> None:
    """Check fields, requests, graph, plugins and options, and that each model fits.

    Exit code 2 and one message if anything is wrong.
    """
    from samullm_plugin.manager import PluginHost
    from samullm_plugin.services.validation import validate_application

    report = validate_application(PluginHost.from_settings(), application)
    if json:
        write_json(report)
        return
    print_table(
        ["Node", "Model", "Requests", "Prompt tokens", "Max tokens", "Waits for", "Fits as"],
        [
            (
                node.name,
                node.model,
                f"{node.num_requests:,}",
                f"{node.prompt_tokens:,}",
                f"{node.max_tokens:,}",
                ", ".join(node.waits_for) or None,
                ", ".join(node.fits) or None,
            )
            for node in report.nodes
        ],
        numbers=["Requests", "Prompt tokens", "Max tokens"],
    )
    for note in report.notes:
        console().print(f"assumed: {note}", markup=False)
    where = "no cluster is given, so memory was not checked"
    if report.num_gpus is not None:
        where = f"every model fits on its {report.num_gpus} GPUs"
    console().print(f"{report.application} is valid; {where}", markup=False)
