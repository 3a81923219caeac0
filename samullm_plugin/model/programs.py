"""Programs: the requests of all nodes that belong to one document or item of the application."""

from __future__ import annotations

import numpy as np

from samullm_plugin.model.application import Application
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Ints


def program_ids(app: Application) -> tuple[Ints, ...]:
    """Return for every request the program it belongs to.

    Requests that wait for each other, directly or through others, are one program. Programs are
    numbered in the order of their first request.

    Returns:
        Per node, shape ``(n,)``.
    """
    sizes = [len(n.requests) for n in app.all_nodes]
    first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    label = np.arange(first[-1])
    edges = [
        (first[i] + n.requests.input_row, first[n.requests.input_node] + n.requests.input_request)
        for i, n in enumerate(app.all_nodes)
        if len(n.requests.input_node)
    ]
    if edges:
        rows = np.concatenate([e[0] for e in edges])
        sources = np.concatenate([e[1] for e in edges])
        while True:  # labels fall to the least of each program; paths are halved in each round
            least = label.copy()
            np.minimum.at(least, rows, label[sources])
            np.minimum.at(least, sources, label[rows])
            least = np.minimum(least, least[least])
            if np.array_equal(least, label):
                break
            label = least
    _, label = np.unique(label, return_inverse=True)
    return tuple(label[first[i] : first[i + 1]] for i in range(len(sizes)))


def tokens_before(app: Application, lengths: LengthScenario) -> tuple[Ints, ...]:
    """Return for every request the tokens on the longest path of requests that precede it.

    Args:
        app: the application.
        lengths: prompt and output lengths.

    Returns:
        Per node, shape ``(n,)``.
    """
    before: list[Ints] = [np.zeros(len(n.requests), np.int64) for n in app.all_nodes]
    for i in app.full_order:
        table, rows = app.all_nodes[i].requests, app.all_nodes[i].requests.input_row
        own = table.input_node == i
        for source in np.unique(table.input_node[~own]):
            part = table.input_node == source
            requests = table.input_request[part]
            service = lengths.prompt_tokens[source] + lengths.output_tokens[source]
            np.maximum.at(before[i], rows[part], before[source][requests] + service[requests])
        service = lengths.prompt_tokens[i] + lengths.output_tokens[i]
        for r, q in zip(rows[own], table.input_request[own], strict=True):  # earlier ones first
            before[i][r] = max(before[i][r], before[i][q] + service[q])
    return tuple(before)
