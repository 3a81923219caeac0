"""Several applications as one, planned and run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application, ModelNode, PythonNode
from samullm_plugin.model.requests import RequestTable
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
    python: list[PythonNode] = []
    num_nodes = sum(len(part.nodes) for part in parts)
    offsets = {"choice": 0, "gate": 0, "prefix_id": 0}
    for part in parts:
        place = np.array(
            [len(nodes) + i for i in range(len(part.nodes))]
            + [num_nodes + len(python) + k for k in range(len(part.python))]
        )
        for node in part.all_nodes:
            table = _shifted(node.requests, place, offsets)
            own = f"{part.name}/{node.name}"
            if isinstance(node, PythonNode):
                python.append(replace(node, name=own, requests=table))
                continue
            fused = tuple(replace(p, name=f"{part.name}/{p.name}") for p in node.fused)
            nodes.append(replace(node, name=own, requests=table, fused=fused))
        for field in offsets:
            ids = [getattr(n.requests, field) for n in part.all_nodes]
            top = max((int(i.max(initial=-1)) for i in ids if i is not None), default=-1)
            offsets[field] += top + 1
    notes = tuple(f"{part.name}: {note}" for part in parts for note in part.notes)
    return Application(name, tuple(nodes), notes, tuple(python))


def _shifted(table: RequestTable, place: Ints, offsets: dict[str, int]) -> RequestTable:
    """Return the table with node indices and shared ids moved out of the other parts' way."""

    def moved(ids: Ints, by: int) -> Ints:
        return np.where(ids >= 0, ids + by, ids)

    return replace(
        table,
        input_node=place[table.input_node],
        choice=moved(table.choice, offsets["choice"]),
        prefix_id=moved(table.prefix_id, offsets["prefix_id"]),
        gate=None if table.gate is None else moved(table.gate, offsets["gate"]),
    )
