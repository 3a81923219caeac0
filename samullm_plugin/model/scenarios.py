"""Length scenarios: for every request of every node, how long prompt and output are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application, PythonNode
from samullm_plugin.model.chains import chains_of
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.model.types import Bools, Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class LengthScenario:
    """One possible world.

    Attributes:
        prompt_tokens: per node, shape ``(n,)``: full prompt lengths, upstream outputs included;
            behind the nodes of models, per Python node the tokens of the outputs that enter a row.
        output_tokens: per node, shape ``(n,)``: output lengths; 0 where a request is not taken;
            behind the nodes of models, per Python node the tokens of its values.
    """

    prompt_tokens: tuple[Ints, ...]
    output_tokens: tuple[Ints, ...]


def draw_taken(app: Application, rng: np.random.Generator) -> tuple[Bools, ...]:
    """Draw which requests are needed, by their probabilities and choices.

    A request all of whose inputs are not taken is not taken itself, nor is one that lacks an input
    it needs.

    Returns:
        Per node, Python nodes last, a boolean array of shape ``(n,)``.
    """
    tables = [n.requests for n in app.all_nodes]
    draws = [rng.random(len(t)) for t in tables]
    _share_gates(app, draws, rng)
    taken = [u < t.probability for t, u in zip(tables, draws, strict=True)]
    members: dict[int, list[tuple[int, int]]] = {}
    for i, table in enumerate(tables):
        for r in np.flatnonzero(table.choice >= 0).tolist():
            members.setdefault(int(table.choice[r]), []).append((i, r))
    for alternatives in members.values():
        weights = np.array([tables[i].probability[r] for i, r in alternatives])
        left_out = max(0.0, 1.0 - float(weights.sum()))  # no branch at all
        weights = np.append(weights, left_out)
        chosen = rng.choice(len(weights), p=weights / weights.sum())
        for k, (i, r) in enumerate(alternatives):
            taken[i][r] = k == chosen
    for i in app.full_order:
        if all(taken[s].all() for s in (*np.unique(tables[i].input_node), i)):
            continue
        for level in _levels(app, i):
            _leave_out(tables[i], taken, i, level)
    return tuple(taken)


def _leave_out(table: RequestTable, taken: Sequence[Bools], i: int, level: Ints) -> None:
    """Take none of ``level`` that lacks a needed input, or all of its inputs, in place."""
    inside = np.zeros(len(table), bool)
    inside[level] = True
    rows = table.input_row
    entries = np.flatnonzero(inside[rows])
    if not len(entries):
        return
    there = np.empty(len(entries), bool)
    nodes, requests = table.input_node[entries], table.input_request[entries]
    for source in np.unique(nodes):
        part = nodes == source
        there[part] = taken[source][requests[part]]
    mine = rows[entries]
    some = np.ones(len(table), bool)
    some[mine] = False
    some[mine[there]] = True
    if table.input_needed is not None:
        some[mine[~there & table.input_needed[entries]]] = False
    taken[i][level] &= some[level]


def _share_gates(app: Application, draws: Sequence[Floats], rng: np.random.Generator) -> None:
    """Give requests behind the same gate the same draw, in place."""
    gates = [n.requests.gate for n in app.all_nodes]
    size = max((int(g.max(initial=-1)) for g in gates if g is not None), default=-1) + 1
    if not size:
        return
    shared = rng.random(size)
    for own, gate in zip(draws, gates, strict=True):
        if gate is not None:
            own[gate >= 0] = shared[gate[gate >= 0]]


def _levels(app: Application, i: int) -> list[Ints]:
    """Return the requests of node ``i`` by their depth in the node's own chains."""
    node, table = app.all_nodes[i], app.all_nodes[i].requests
    own = table.input_node == i
    if isinstance(node, PythonNode):
        levels = np.split(np.arange(len(table)), [node.num_calls])
        return [level for level in levels if len(level)]
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
    prompts: list[Ints] = [np.empty(0, np.int64)] * len(app.all_nodes)
    outputs: list[Ints] = [np.empty(0, np.int64)] * len(app.all_nodes)
    for i in app.full_order:
        node, table = app.all_nodes[i], app.all_nodes[i].requests
        if isinstance(node, PythonNode):
            prompts[i] = np.zeros(len(table), np.int64)
            outputs[i] = np.zeros(len(table), np.int64)
            for level in _levels(app, i):
                prompts[i] += entering_tokens(app, i, outputs, level)
                value = node.value_tokens(level, prompts[i][level])
                outputs[i][level] = value if taken is None else np.where(taken[i][level], value, 0)
            continue
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
                prompts[i] += entering_tokens(app, i, outputs, level)
            prompts[i][level] = np.minimum(prompts[i][level], limit - 1)
            room = np.minimum(table.max_tokens[level], limit - prompts[i][level])
            outputs[i][level] = np.where(mask[level], np.minimum(sampled[level], room), 0)
    return LengthScenario(tuple(prompts), tuple(outputs))


def entering_tokens(
    app: Application, i: int, outputs: Sequence[Ints], level: Ints | None = None
) -> Ints:
    """Return the tokens of the outputs that enter each request of a node, shape ``(n,)``.

    Args:
        app: the application.
        i: index of the node.
        outputs: per node, tokens of its outputs.
        level: the requests to look at, the others get 0; None: all.
    """
    table = app.all_nodes[i].requests
    rows, enters = table.input_row, table.input_in_prompt
    if level is not None:
        inside = np.zeros(len(table), bool)
        inside[level] = True
        enters = enters & inside[rows]
    found = np.zeros(len(table), np.int64)
    for source in np.unique(table.input_node):
        part = (table.input_node == source) & enters
        np.add.at(found, rows[part], outputs[source][table.input_request[part]])
    return found
