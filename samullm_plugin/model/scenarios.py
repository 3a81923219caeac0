"""Length scenarios: for every request of every node, how long prompt and output are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application
from samullm_plugin.model.chains import chains_of
from samullm_plugin.model.types import Bools, Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class LengthScenario:
    """One possible world.

    Attributes:
        prompt_tokens: per node, shape ``(n,)``: full prompt lengths, upstream outputs included.
        output_tokens: per node, shape ``(n,)``: output lengths; 0 where a request is not taken.
    """

    prompt_tokens: tuple[Ints, ...]
    output_tokens: tuple[Ints, ...]


def draw_taken(app: Application, rng: np.random.Generator) -> tuple[Bools, ...]:
    """Draw which requests are needed, by their probabilities and choices.

    A request all of whose inputs are not taken is not taken itself.

    Returns:
        Per node a boolean array of shape ``(n,)``.
    """
    draws = [rng.random(len(n.requests)) for n in app.nodes]
    _share_gates(app, draws, rng)
    taken = [u < n.requests.probability for n, u in zip(app.nodes, draws, strict=True)]
    members: dict[int, list[tuple[int, int]]] = {}
    for i, node in enumerate(app.nodes):
        for r in np.flatnonzero(node.requests.choice >= 0).tolist():
            members.setdefault(int(node.requests.choice[r]), []).append((i, r))
    for alternatives in members.values():
        weights = np.array([app.nodes[i].requests.probability[r] for i, r in alternatives])
        chosen = rng.choice(len(alternatives), p=weights / weights.sum())
        for k, (i, r) in enumerate(alternatives):
            taken[i][r] = k == chosen
    for i in app.order:
        table = app.nodes[i].requests
        for level in _levels(app, i):
            waits = level[np.diff(table.input_indptr)[level] > 0]
            for r in waits.tolist() if _any_untaken(app, i, taken) else ():
                part = slice(table.input_indptr[r], table.input_indptr[r + 1])
                pairs = zip(table.input_node[part], table.input_request[part], strict=True)
                taken[i][r] &= any(taken[s][q] for s, q in pairs)
    return tuple(taken)


def _share_gates(app: Application, draws: Sequence[Floats], rng: np.random.Generator) -> None:
    """Give requests behind the same gate the same draw, in place."""
    gates = [n.requests.gate for n in app.nodes]
    size = max((int(g.max(initial=-1)) for g in gates if g is not None), default=-1) + 1
    if not size:
        return
    shared = rng.random(size)
    for own, gate in zip(draws, gates, strict=True):
        if gate is not None:
            own[gate >= 0] = shared[gate[gate >= 0]]


def _any_untaken(app: Application, i: int, taken: Sequence[Bools]) -> bool:
    """Return whether any input of node ``i`` may be missing."""
    return not all(taken[s].all() for s in (*app.upstreams[i], i))


def _levels(app: Application, i: int) -> list[Ints]:
    """Return the requests of node ``i`` by their depth in the node's own chains."""
    table = app.nodes[i].requests
    own = table.input_node == i
    if own.any():
        chains = chains_of(len(table), table.input_row[own], table.input_request[own])
        depth = np.asarray(chains.depth)
        order = np.argsort(depth, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(depth[order])) + 1)
    return [np.arange(len(table))]


def make_scenario(
    app: Application,
    sampled_outputs: Sequence[Ints],
    taken: Sequence[Bools] | None = None,
) -> LengthScenario:
    """Return the scenario in which requests generate the sampled lengths, where limits allow.

    Prompts grow by the outputs that enter them and are cut to ``max_model_len - 1`` tokens, as a
    runner truncates them; outputs end at ``max_tokens`` and at ``max_model_len``.

    Args:
        app: the application.
        sampled_outputs: per node, shape ``(n,)``, at least 1 each.
        taken: per node which requests are needed; None: all.

    Raises:
        InputError: if an array has the wrong length or a length is below one.
    """
    prompts: list[Ints] = [np.empty(0, np.int64)] * len(app.nodes)
    outputs: list[Ints] = [np.empty(0, np.int64)] * len(app.nodes)
    for i in app.order:
        node, table = app.nodes[i], app.nodes[i].requests
        sampled = np.asarray(sampled_outputs[i], dtype=np.int64)
        if sampled.shape != (len(table),):
            raise InputError(
                f"node {node.name}: {len(table)} output lengths are needed, got {sampled.shape}"
            )
        if (sampled < 1).any():
            raise InputError(f"node {node.name}: an output length is below 1")
        prompts[i] = table.prompt_tokens.copy()
        outputs[i] = np.zeros(len(table), np.int64)
        mask = np.ones(len(table), bool) if taken is None else taken[i]
        limit = node.model.max_model_len
        for level in _levels(app, i):
            if len(table.input_node):
                _add_inputs(prompts[i], outputs, app, i, level)
            prompts[i][level] = np.minimum(prompts[i][level], limit - 1)
            room = np.minimum(table.max_tokens[level], limit - prompts[i][level])
            outputs[i][level] = np.where(mask[level], np.minimum(sampled[level], room), 0)
    return LengthScenario(tuple(prompts), tuple(outputs))


def _add_inputs(
    prompts: Ints, outputs: Sequence[Ints], app: Application, i: int, level: Ints
) -> None:
    """Add to the prompts of ``level`` the upstream outputs that enter them."""
    table = app.nodes[i].requests
    inside = np.zeros(len(table), bool)
    inside[level] = True
    rows = table.input_row
    for source in np.unique(table.input_node):
        part = (table.input_node == source) & table.input_in_prompt & inside[rows]
        np.add.at(prompts, rows[part], outputs[source][table.input_request[part]])
