"""Users' functions looked at before anything starts, in a process of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samullm_plugin.app.functions import Function, Scope, describe_function
from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.schemas import schema_of_class
from samullm_plugin.errors import InputError
from samullm_plugin.host.isolation import IsolatedWorker

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
