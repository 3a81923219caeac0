"""Several applications as one, planned and run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application, ModelNode, RequestTable
from samullm_plugin.model.types import Ints


def mix_applications(name: str, parts: Sequence[Application]) -> Application:
    """Return one application that holds all nodes of several.

    Nodes are named ``part/node``; the parts share nothing but the devices.

    Args:
        name: of the whole.
        parts: at least one, with different names.

    Raises:
        InputError: for no parts or two of one name.
    """
    names = [part.name for part in parts]
    if not parts:
        raise InputError(f"application {name}: it mixes no applications")
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"application {name}: two of its applications are named {twice!r}")
    nodes: list[ModelNode] = []
    offsets = {"choice": 0, "gate": 0, "prefix_id": 0}
    for part in parts:
        first = len(nodes)
        for node in part.nodes:
            table = _shifted(node.requests, first, offsets)
            fused = tuple(replace(p, name=f"{part.name}/{p.name}") for p in node.fused)
            own = f"{part.name}/{node.name}"
            nodes.append(replace(node, name=own, requests=table, fused=fused))
        for field in offsets:
            ids = [getattr(n.requests, field) for n in part.nodes]
            top = max((int(i.max(initial=-1)) for i in ids if i is not None), default=-1)
            offsets[field] += top + 1
    notes = tuple(f"{part.name}: {note}" for part in parts for note in part.notes)
    return Application(name, tuple(nodes), notes)


def _shifted(table: RequestTable, first_node: int, offsets: dict[str, int]) -> RequestTable:
    """Return the table with node indices and shared ids moved out of the other parts' way."""

    def moved(ids: Ints, by: int) -> Ints:
        return np.where(ids >= 0, ids + by, ids)

    return replace(
        table,
        input_node=table.input_node + first_node,
        choice=moved(table.choice, offsets["choice"]),
        prefix_id=moved(table.prefix_id, offsets["prefix_id"]),
        gate=None if table.gate is None else moved(table.gate, offsets["gate"]),
    )
