"""``samullm validate``: find what is wrong with an application before it costs anything."""

from __future__ import annotations

from typing import Annotated

import typer

from samullm_plugin.cli.output import Json, console, print_table, write_json


def validate(
    application: Annotated[
        str,
        typer.Argument(
            metavar="APP", help="An app.yaml, or a bundled application such as routing."
        ),
    ],
    json: Json = False,
) -> None:
    """Check fields, requests, graph, plugins and options, and that each model fits.

    Ends with exit code 2 and one message if anything is wrong.
    """
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.planning.applications import find_application
    from samullm_plugin.planning.validating import validate_application

    host = PluginHost.from_settings()
    report = validate_application(host, find_application(host, application))
    if json:
        write_json(report)
        return
    print_table(
        ["Node", "Model", "Requests", "Prompt", "Output", "Fits as", "Lengths", "Latency"],
        [
            (
                node.node,
                node.model,
                f"{node.num_requests:,}",
                f"{node.prompt_tokens:,.0f}",
                None if node.output_tokens != node.output_tokens else f"{node.output_tokens:,.0f}",
                "\n".join(node.fits) or None,
                node.lengths,
                node.latency or None,
            )
            for node in report.nodes
        ],
        numbers=["Requests", "Prompt", "Output"],
    )
    for note in report.notes:
        console().print(f"assumed: {note}", markup=False)
    where = "it names no cluster, so memory was not checked"
    if report.num_gpus is not None:
        where = f"every model fits on its {report.num_gpus} GPUs"
    console().print(f"{report.name} is valid; {where}", markup=False)
