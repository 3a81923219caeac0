"""``samullm schema``: what may stand in ``app.yaml``, for editors and checkers."""

from __future__ import annotations

from typing import Annotated

import typer

from samullm_plugin.cli.output import OutputJson, write_json
from samullm_plugin.errors import InputError, suggest


def schema(
    kind: Annotated[
        str | None,
        typer.Argument(help="Of a plugin's options instead: its kind, such as scheduler,"),
    ] = None,
    name: Annotated[str | None, typer.Argument(help="and its name, such as greedy.")] = None,
    output_json: OutputJson = None,
) -> None:
    """Print the JSON Schema of app.yaml, or of a plugin's options."""
    write_json(_app_schema() if kind is None else _options_schema(kind, name), output_json)


def _app_schema() -> dict[str, object]:
    """Return the schema of the application file."""
    from samullm_plugin.app.spec import AppSpec

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **AppSpec.model_json_schema(by_alias=True),
        "title": "samullm application",
    }


def _options_schema(kind: str, name: str | None) -> dict[str, object]:
    """Return the schema of a plugin's options.

    Raises:
        InputError: for an unknown kind or name.
    """
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.host.registration import KINDS

    known = next((k for k in KINDS if k == kind), None)
    if known is None:
        raise InputError(f"unknown kind {kind!r}{suggest(kind, KINDS)}; known: {', '.join(KINDS)}")
    host = PluginHost.from_settings()
    if name is None:
        raise InputError(f"which {kind}? known: {', '.join(host.names(known))}")
    schema: dict[str, object] = host.resolve(known, name).value.Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
