"""Applications by what users write: a file, or the name of a bundled one with its options.

Users' functions are looked at before anything starts, in a process of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from samullm_plugin.app.functions import Function, Scope, describe_function
from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import load_application, looks_like_file
from samullm_plugin.app.requestlines import TokenCounter
from samullm_plugin.app.schemas import schema_of_class
from samullm_plugin.checkpoints.tokenizing import OwnTokenizers
from samullm_plugin.errors import InputError
from samullm_plugin.host.isolation import IsolatedWorker
from samullm_plugin.host.manager import PluginHost


def find_application(
    host: PluginHost,
    name: str,
    *,
    count_tokens: TokenCounter | None = None,
    limit: int | None = None,
) -> LoadedApplication:
    """Return an application.

    Args:
        host: knows the bundled applications and those of other plugins.
        name: path of an ``app.yaml``, or a name, with options as in
            ``ensembling:requests=10000,max_tokens=512``.
        count_tokens: counts tokens; None: by the models' own tokenizers, where they are here.
        limit: take no more rows than this of each table of requests.

    Raises:
        InputError: for an unknown name or option, a faulty file, or a limit on an application
            that has no table.
    """

    def bundled(text: str) -> LoadedApplication:
        return build_named(host, text)

    if looks_like_file(name) or Path(name).is_file():
        counter = OwnTokenizers() if count_tokens is None else count_tokens
        loaded = load_application(
            Path(name),
            bundled=bundled,
            count_tokens=counter,
            limit=limit,
            resolve_schema=resolve_schema,
        )
        check_functions(loaded)
        return loaded
    if limit is not None:
        raise InputError(
            f"--limit: {name} is a bundled application and has no table; give it fewer requests by "
            f"its options, as in {name.partition(':')[0]}:requests={limit}"
        )
    return bundled(name)


def build_named(host: PluginHost, text: str) -> LoadedApplication:
    """Return a bundled application.

    Raises:
        InputError: for an unknown name or a wrong option.
    """
    name, options = parse_named(text)
    source = host.create("application", name, options)
    return LoadedApplication(source.build(), source.cluster(), output_tokens=source.output_tokens())


def parse_named(text: str) -> tuple[str, dict[str, object]]:
    """Return name and options of ``name:option=value,option=value``.

    The name may itself be ``distribution:name``.

    Raises:
        InputError: for an option without a value.
    """
    name, separator, rest = text.rpartition(":")
    if not separator or "=" not in rest:
        return text, {}
    options: dict[str, object] = {}
    for part in rest.split(","):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not (key and equals and value):
            raise InputError(
                f"application {text!r}: {part!r} is not option=value; write for example "
                "ensembling:requests=10000,max_tokens=512"
            )
        if key in options:
            raise InputError(f"application {text!r}: the option {key!r} is given twice")
        options[key] = yaml.safe_load(value)
    return name, options


LIMIT_S = 60.0
"""Seconds that importing a user's module may take."""


def check_functions(loaded: LoadedApplication) -> None:
    """Refuse functions that are missing or cannot be called with what they will be given.

    Raises:
        InputError: naming node and field, and the remedy.
    """
    wanted: list[tuple[str, Function, Scope]] = []
    for source in loaded.sources or ():
        where = f"{loaded.path or loaded.app.name}: nodes.{source.name}"
        if source.call is not None:
            wanted.append((f"{where}.python", source.call.function, source.call.scope))
        if source.check is not None:
            wanted.append((f"{where}.check", source.check, "row"))
    if not wanted:
        return
    worker = IsolatedWorker()
    try:
        for where, function, scope in wanted:
            _refuse(worker, where, function, scope)
    finally:
        worker.close()


def _refuse(worker: IsolatedWorker, where: str, function: Function, scope: Scope) -> None:
    failure = worker.try_call(describe_function, LIMIT_S, function, scope).failure
    if failure is not None:
        what = (
            failure.text if failure.kind == "input" else f"importing {function.name} {failure.text}"
        )
        raise InputError(f"{where}: {what}")


def resolve_schema(place: Function, where: str) -> Mapping[str, Any]:
    """Return the JSON schema of a class, imported in a process of its own.

    Raises:
        InputError: if there is no such class.
    """
    worker = IsolatedWorker()
    try:
        answer = worker.try_call(schema_of_class, LIMIT_S, place, where)
    finally:
        worker.close()
    if answer.failure is None:
        found: Mapping[str, Any] = answer.value
        return found
    text = answer.failure.text
    raise InputError(text if answer.failure.kind == "input" else f"{where}: {place.name} {text}")
