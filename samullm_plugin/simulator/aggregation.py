"""A smaller problem that takes about as long: each request stands for several alike.

Where an application has hundreds of thousands of requests, simulating all of them for every plan
that is considered takes longer than it is worth. In the aggregated problem a request stands for
``k`` of its kind that are served side by side: one sequence in the batch counts for ``k``, so an
engine runs ``1 / k`` as many, has ``1 / k`` of the KV cache and of the token budget, and an
iteration costs what ``k`` times as many sequences and tokens cost. Engine starts, the number of
iterations, and what waits for what stay as they are; its engines are brought to the speed of the
whole problem's. Plans are chosen on it and confirmed on the whole problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from samullm_plugin.engine import EngineCache, EngineJob, Workload, simulate_engines
from samullm_plugin.model.application import Application, ModelNode
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.latency import StepLatency, StepModel, StepTable, rescaled
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.requests import NodePart, RequestTable
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Bools, Floats, Ints

MOST_ALIKE, LEAST_BATCH = 12, 10
"""Requests for which one stands at most; sequences that an engine still runs at once at least, so
that batches fill and empty as they do in the whole problem. Choices; the errors with them are in
``docs/planning.md``, "Work, not time"."""

LEAST_GROUPS = 48
"""Groups of requests that hang together that are kept at least: chains and their heavy tails."""


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """The smaller problem.

    Attributes:
        problem: its nodes, scenarios and devices are those of the whole problem, in order.
        kept: by node, the requests of the whole problem that stand for the others, increasing.
        alike: by node, for how many requests one stands, at least 1.
    """

    problem: Problem
    kept: tuple[Ints, ...]
    alike: tuple[float, ...]


def aggregate(problem: Problem, most_requests: int) -> Aggregate | None:
    """Return the aggregated problem, or None if there is nothing to gain.

    Requests that hang together (by inputs, alternatives or gates, over all nodes) stay together.
    Of groups alike in shape, sorted by their tokens, evenly spaced ones are kept, the largest
    always.

    Args:
        problem: the whole problem.
        most_requests: requests of all nodes that are aimed at.
    """
    app = problem.app
    wanted = min(app.num_requests / most_requests, _most_alike(problem))
    if wanted < 2.0:
        return None
    kept = _representatives(problem, wanted)
    counts = [len(n.requests) for n in app.nodes]
    alike = tuple(n / len(k) for n, k in zip(counts, kept, strict=True))
    if sum(map(len, kept)) > 0.6 * sum(counts):
        return None
    nodes = _nodes(app, kept, alike, problem.scenarios)
    scenarios = tuple(
        LengthScenario(
            tuple(p[k] for p, k in zip(s.prompt_tokens, kept, strict=True)),
            tuple(o[k] for o, k in zip(s.output_tokens, kept, strict=True)),
        )
        for s in problem.scenarios
    )
    costs = tuple(
        {
            key: _costs(mode, alike[i], problem.fits(i, key), nodes[i].model.max_model_len)
            for key, mode in of_node.items()
        }
        for i, of_node in enumerate(problem.costs)
    )
    smaller = Application(app.name, tuple(nodes), app.notes)
    same = replace(
        problem, app=smaller, scenarios=scenarios, costs=costs, engine_of=problem.engine_numbers
    )
    return Aggregate(same, kept, alike)


def _most_alike(problem: Problem) -> float:
    """Return for how many a request may stand, so that every node's batches stay deep enough."""
    most = float(MOST_ALIKE)
    for i, node in enumerate(problem.app.nodes):
        scenario = problem.scenarios[0]
        length = scenario.prompt_tokens[i] + scenario.output_tokens[i]
        taken = scenario.output_tokens[i] > 0
        mean = float(length[taken].mean()) if taken.any() else 1.0
        room = max(c.kv_cache_tokens for k, c in problem.costs[i].items() if problem.fits(i, k))
        most = min(most, min(node.model.engine.max_num_seqs, room / mean) / LEAST_BATCH)
    return most


def _representatives(problem: Problem, wanted: float) -> tuple[Ints, ...]:
    """Return by node the requests that are kept, about one of ``wanted``."""
    app = problem.app
    counts = np.array([len(n.requests) for n in app.nodes])
    first = np.cumsum([0, *counts])
    group = _groups(app, first)
    node = np.repeat(np.arange(len(counts)), counts)
    tokens = np.zeros(first[-1])
    for s in problem.scenarios:
        tokens += np.concatenate(s.prompt_tokens) / 8 + np.concatenate(s.output_tokens)
    num = int(group.max()) + 1
    weight = np.bincount(group, tokens, num)
    # Groups are of one shape if they have as many requests of each node; a random key per node
    # tells shapes apart without a matrix of groups by nodes.
    key = np.random.default_rng(0).random(len(counts))
    shape = np.round(np.bincount(group, key[node], num), 6)
    order = np.lexsort((weight, shape))
    starts = np.flatnonzero(np.r_[True, np.diff(shape[order]) != 0])
    chosen = np.zeros(num, bool)
    for part in np.split(order, starts[1:]):
        keep = min(len(part), max(LEAST_GROUPS, round(len(part) / wanted)))
        at = ((np.arange(keep) + 0.5) * len(part) / keep).astype(np.int64)
        chosen[part[at]] = True
        if keep < len(part):
            chosen[part[at[-1]]] = False
            chosen[part[-1]] = True
    every = chosen[group]
    return tuple(np.flatnonzero(every[a:b]) for a, b in pairwise(first))


def _groups(app: Application, first: Ints) -> Ints:
    """Return the number of the group of every request of all nodes, from 0 without gaps."""
    ends: list[tuple[Ints, Ints]] = []
    alternatives: dict[str, list[tuple[Ints, Ints]]] = {"choice": [], "gate": []}
    for i, node in enumerate(app.nodes):
        table = node.requests
        ends.append((first[i] + table.input_row, first[table.input_node] + table.input_request))
        for name, found in alternatives.items():
            ids = getattr(table, name)
            if ids is not None and (rows := np.flatnonzero(ids >= 0)).size:
                found.append((ids[rows], first[i] + rows))
    for pairs in alternatives.values():
        if pairs:
            ids, rows = (np.concatenate(column) for column in zip(*pairs, strict=True))
            order = np.argsort(ids, kind="stable")
            same = np.flatnonzero(np.diff(ids[order]) == 0)
            ends.append((rows[order][same], rows[order][same + 1]))
    a, b = (np.concatenate(column) for column in zip(*ends, strict=True))
    label = np.arange(first[-1])
    while True:  # the least label spreads over each group; labels are followed to their own
        low = np.minimum(label[a], label[b])
        new = label.copy()
        np.minimum.at(new, label[a], low)
        np.minimum.at(new, label[b], low)
        new = new[new]
        if np.array_equal(new, label):
            return np.unique(label, return_inverse=True)[1]
        label = new


def _nodes(
    app: Application,
    kept: Sequence[Ints],
    alike: Sequence[float],
    scenarios: Sequence[LengthScenario],
) -> list[ModelNode]:
    """Return the nodes with the kept requests, and engines for as many fewer."""
    position = []
    for node, rows in zip(app.nodes, kept, strict=True):
        at = np.full(len(node.requests), -1, np.int64)
        at[rows] = np.arange(len(rows))
        position.append(at)
    nodes = []
    for i, node in enumerate(app.nodes):
        longest = max(
            int((s.prompt_tokens[i][kept[i]] + s.output_tokens[i][kept[i]]).max())
            for s in scenarios
        )
        options, k = node.model.engine, alike[i]
        seqs = max(1, round(options.max_num_seqs / k))
        engine = replace(
            options,
            max_num_seqs=seqs,
            max_num_batched_tokens=max(seqs, round(options.max_num_batched_tokens / k)),
        )
        limit = max(longest, int(node.requests.prompt_tokens[kept[i]].max()) + 1)
        model = replace(node.model, max_model_len=limit, engine=engine)
        parts = tuple(
            NodePart(p.name, p.task, *(int(np.searchsorted(kept[i], r)) for r in (p.start, p.stop)))
            for p in node.fused
        )
        table = _table(node.requests, kept[i], position)
        nodes.append(replace(node, model=model, requests=table, fused=parts, repeats=0))
    return nodes


def _table(table: RequestTable, rows: Ints, position: Sequence[Ints]) -> RequestTable:
    """Return the table of some of its requests, whose inputs are kept as well."""
    counts = np.diff(table.input_indptr)
    inside = np.zeros(len(table), bool)
    inside[rows] = True
    entries: Bools = np.repeat(inside, counts)
    sources, requests = table.input_node[entries], table.input_request[entries]
    moved = np.zeros_like(requests)
    for source in np.unique(sources):
        mine = sources == source
        moved[mine] = position[source][requests[mine]]
    by_row = ("prompt_tokens", "max_tokens", "prefix_id", "prefix_tokens", "probability", "choice")
    columns = {name: getattr(table, name)[rows] for name in by_row}
    return RequestTable(
        **columns,
        input_indptr=np.concatenate([[0], np.cumsum(counts[rows])]).astype(np.int64),
        input_node=sources,
        input_request=moved,
        input_in_prompt=table.input_in_prompt[entries],
        gate=None if table.gate is None else table.gate[rows],
    )


def _costs(costs: ModeCosts, alike: float, fits: bool, longest: int) -> ModeCosts:
    """Return the costs of a replica that serves a request where there were several."""
    room = max(int(costs.kv_cache_tokens / alike), longest) if fits else 0
    latency = costs.latency
    if isinstance(latency, StepLatency):
        latency = latency.aggregated(alike)
    elif alike > 1.0:
        latency = ManyAlike(latency, alike)
    return replace(costs, kv_cache_tokens=room, latency=latency)


@dataclass(frozen=True, slots=True)
class ManyAlike:
    """Latencies by another model's figures for several times as many sequences and tokens."""

    model: StepModel
    alike: float

    def step_seconds(self, steps: StepTable) -> Floats:
        """Return the seconds of each iteration, shape ``(len(steps),)``."""

        def times(column: Ints) -> Ints:
            return np.asarray(np.rint(column * self.alike), dtype=np.int64)

        return self.model.step_seconds(
            StepTable(
                times(steps.num_seqs),
                times(steps.num_tokens),
                times(steps.prefill_seqs),
                times(steps.prefill_tokens),
                steps.prefill_pairs * self.alike,
                steps.context_tokens * self.alike,
                steps.longest_tokens,
            )
        )


SAMPLE_BATCHES = 6
"""Requests of a node, in batches of its engines, whose simulation as they are and aggregated tells
by how much aggregation makes iterations too fast or too slow (a choice)."""

SERVED = 0.75
"""Share of the sample that is finished at the moment that is compared."""


def calibrated_aggregate(
    problem: Problem, most_requests: int, cache: EngineCache
) -> Aggregate | None:
    """Return the aggregated problem, or None if there is nothing to gain.

    Batches of fewer, heavier sequences meet other steps of the latency curves. What that changes
    is measured on a sample of every node in every size, and taken out of its latencies.

    Args:
        problem: the whole problem.
        most_requests: requests of all nodes that are aimed at.
        cache: results of engine simulations.
    """
    if problem.app.python:
        return None  # what Python nodes do to counts and times is simulated whole
    found = aggregate(problem, most_requests)
    if found is None:
        return None
    smaller = found.problem
    asked: list[tuple[int, object]] = []
    jobs: list[EngineJob] = []
    for i, k in enumerate(found.alike):
        if k < 1.5:
            continue
        whole, part = _samples(problem, i, k)
        longest = min(
            int((whole.prompt_tokens + whole.output_tokens).max()),
            problem.app.nodes[i].model.max_model_len,
        )
        for key, costs in smaller.costs[i].items():
            if smaller.fits(i, key):
                asked.append((i, key))
                jobs.append(_job(problem, i, problem.costs[i][key], whole, longest))
                jobs.append(_job(smaller, i, costs, part, longest))
    # Not the end, which the longest request decides, but when most are served.
    ends = [float(np.quantile(run.finish_s, SERVED)) for run in simulate_engines(jobs, cache=cache)]
    ratios = {a: ends[2 * n] / max(ends[2 * n + 1], 1e-9) for n, a in enumerate(asked)}
    costs_of = tuple(
        {key: _rescaled(c, ratios.get((i, key), 1.0)) for key, c in of_node.items()}
        for i, of_node in enumerate(smaller.costs)
    )
    return replace(found, problem=replace(smaller, costs=costs_of))


def _samples(problem: Problem, node: int, alike: float) -> tuple[Workload, Workload]:
    """Return some requests of a node, and about one of ``alike`` of them."""
    scenario = problem.scenarios[0]
    prompts, outputs = scenario.prompt_tokens[node], scenario.output_tokens[node]
    taken = np.flatnonzero(outputs > 0)
    most = SAMPLE_BATCHES * problem.app.nodes[node].model.engine.max_num_seqs
    rows = taken[np.linspace(0, len(taken) - 1, min(most, len(taken))).astype(np.int64)]
    by_size = rows[np.lexsort((prompts[rows], outputs[rows]))]
    keep = max(1, round(len(rows) / alike))
    part = np.sort(by_size[((np.arange(keep) + 0.5) * len(rows) / keep).astype(np.int64)])

    def workload(chosen: Ints) -> Workload:
        return Workload(prompts[chosen], outputs[chosen])

    return workload(rows), workload(part)


def _job(
    problem: Problem, node: int, costs: ModeCosts, workload: Workload, longest: int
) -> EngineJob:
    """Return a simulation of a sample, some of which may be longer than what was kept."""
    room = replace(costs, kv_cache_tokens=max(costs.kv_cache_tokens, longest))
    config = problem.engine_config(node, room)
    limit = max(config.max_model_len, longest)
    config = replace(config, max_model_len=limit, enable_prefix_caching=False)
    return EngineJob(config, workload, costs.latency)


def _rescaled(costs: ModeCosts, ratio: float) -> ModeCosts:
    return costs if ratio == 1.0 else replace(costs, latency=rescaled(costs.latency, ratio))
