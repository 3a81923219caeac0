"""What must not change between a run and its continuation, field by field.

A run's journal depends on which requests there are and what they ask. How they are served (engine
arguments, paths, devices, planner) may be repaired before a run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from samullm_plugin.app.keptrows import RowFields
from samullm_plugin.app.loaded import LoadedApplication, NodeSource

_WRITTEN_AS: Mapping[str, str] = {
    "ids": "requests",
    "items": "requests",
    "fields": "requests",
    "labels": "inputs",
    "template": "prompt",
    "own_prompt": "requests",
    "sampling": "sampling_params",
    "request_sampling": "requests",
    "request_chat": "requests",
    "samples": "sampling_params",
    "prompt_token_ids": "requests",
    "branches": "route",
}
"""What a field of a node's source is called in app.yaml, where the names differ."""

_NOT_ASKED = {"refused"}
"""Fields that say nothing about the requests that are asked."""

SHOWN = 8


def identity_of(loaded: LoadedApplication) -> dict[str, str]:
    """Return a hash of every field that a run's journal depends on, by its place in app.yaml."""
    found: dict[str, Any] = {}

    def add(key: str, value: object) -> None:
        digest = found.setdefault(key, hashlib.sha256())
        if isinstance(value, RowFields) and len(value) <= SHOWN:
            value = tuple(value)
        if isinstance(value, tuple | RowFields) and len(value) > SHOWN:
            for item in value:  # not all requests' texts once more in memory
                digest.update(repr(item).encode(errors="surrogatepass"))
        else:
            digest.update(repr(_plain(value)).encode(errors="surrogatepass"))

    for index, node in enumerate(loaded.app.nodes):
        where, table = f"nodes.{node.name}", node.requests
        add(f"{where}.model", node.model.name)
        add(f"{where}.inputs", [
            c.tobytes() for c in (table.input_indptr, table.input_node, table.input_request)
        ])  # fmt: skip
        add(f"{where}.sampling_params", table.max_tokens.tobytes())
        if loaded.sources is None:
            add(f"{where}.requests", table.prompt_tokens.tobytes())
            continue
        source = loaded.sources[index]
        for one in dataclasses.fields(NodeSource):
            if one.name not in _NOT_ASKED:
                name = _WRITTEN_AS.get(one.name, one.name)
                add(f"{where}.{name}", getattr(source, one.name))
    return {key: digest.hexdigest()[:24] for key, digest in found.items()}


def _plain(value: object) -> object:
    """Return a value whose ``repr`` is the same in every process."""
    if isinstance(value, re.Pattern):
        return value.pattern
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_plain(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return sorted((str(k), repr(_plain(v))) for k, v in value.items())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if callable(value):
        return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
    return value


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the fields that differ, those of a node together."""
    found: list[str] = []
    nodes = {key.rpartition(".")[0]: None for key in (*before, *now)}
    for node in nodes:
        mine = [k for k in (*before, *(k for k in now if k not in before)) if k.startswith(node)]
        mine = [k for k in mine if k.rpartition(".")[0] == node]
        changed = [k.rpartition(".")[2] for k in mine if before.get(k) != now.get(k)]
        if not changed:
            continue
        if not any(k in before for k in mine):
            found.append(f"{node} is new")
        elif not any(k in now for k in mine):
            found.append(f"{node} is gone")
        else:
            found.append(f"{node}: {', '.join(changed)}")
    return found
