"""What is left of a run, as a problem of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from samullm_plugin.engine import StepLatency
from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.model.application import Application, ModelNode, PythonNode
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.requests import NodePart, RequestTable
from samullm_plugin.model.scenarios import LengthScenario, draw_taken, make_scenario
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.planning.building import check_lengths
from samullm_plugin.run.drift import Snapshot
from samullm_plugin.run.ledger import Status

ENOUGH_DECIDED = 20
"""Requests that were taken or left out from which a rate is believed."""


@dataclass(frozen=True, slots=True, eq=False)
class ResidualWork:
    """What is left to do.

    Attributes:
        app: the nodes and requests that are not settled, with what they have generated as part of
            their prompts.
        kept: per node of ``app``, its index in the whole application and the requests left of it.
        generated: per node of ``app``, tokens generated so far.
        requests: per node of ``app``, where its requests are in the tables of the user's nodes.
    """

    app: Application
    kept: tuple[tuple[int, Ints], ...]
    generated: tuple[Ints, ...]
    requests: tuple[Ints, ...]


def residual_work(app: Application, snapshot: Snapshot) -> ResidualWork | None:
    """Return what is left of an application; None if nothing is."""
    left = [np.flatnonzero(s < Status.FINISHED) for s in snapshot.status]
    num = len(app.nodes)
    kept = [i for i, rows in enumerate(left[:num]) if len(rows)]
    if not kept:
        return None
    calling = [i for i in range(num, len(left)) if len(left[i])]
    place = {i: k for k, i in enumerate((*kept, *calling))}
    position = []
    for i, rows in enumerate(left):
        at = np.full(len(snapshot.status[i]), -1, np.int64)
        at[rows] = np.arange(len(rows))
        position.append(at)
    nodes = [
        replace(
            app.nodes[i],
            requests=_table(app, i, left[i], place, position, snapshot),
            fused=_parts_left(app.nodes[i], left[i]),
            repeats=0,
        )
        for i in kept
    ]
    python = [
        replace(
            app.python[i - num],
            requests=_table(app, i, left[i], place, position, snapshot),
            num_calls=int((left[i] < app.python[i - num].num_calls).sum()),
            seconds=snapshot.call_s.get(i, app.python[i - num].seconds),
        )
        for i in calling
    ]
    return ResidualWork(
        Application(app.name, tuple(nodes), python=tuple(python)),
        tuple((i, left[i]) for i in kept),
        tuple(snapshot.generated[i][left[i]] for i in kept),
        tuple(_written(app.nodes[i], left[i]) for i in kept),
    )


def taken_rate(app: Application, i: int, snapshot: Snapshot) -> float:
    """Return how many times more requests of a node were taken so far than was expected.

    Filters, lists that functions return, rejected outputs and the like decide it; alternatives of
    routers are left out. 1 until there is enough to go by.
    """
    table, status = app.all_nodes[i].requests, snapshot.status[i]
    decided = np.zeros(len(table), bool)  # by an input that is there, or that failed
    failed = np.zeros(len(table), bool)
    for source in np.unique(table.input_node):
        part = table.input_node == source
        state = snapshot.status[source][table.input_request[part]]
        decided[table.input_row[part][state == Status.FINISHED]] = True
        failed[table.input_row[part][state == Status.FAILED]] = True
    decided |= failed
    for part in app.all_nodes[i].parts:
        decided[part.again] = False  # of repetitions see reject_rate
    decided &= (table.probability < 1) & (table.choice < 0) & (status >= Status.FINISHED)
    expected = float(table.probability[decided].sum())
    if decided.sum() < ENOUGH_DECIDED or expected <= 0:
        return 1.0
    return float(((status != Status.SKIPPED) & ~failed)[decided].sum()) / expected


def reject_rate(snapshot: Snapshot, i: int, part: NodePart) -> float | None:
    """Return the share of a node's outputs that was rejected; None: too few have been judged."""
    rejected = snapshot.rejected.get(part.name, 0)
    judged = rejected + int((snapshot.status[i][part.rows] == Status.FINISHED).sum())
    return rejected / judged if judged >= ENOUGH_DECIDED else None


def _chances(app: Application, i: int, snapshot: Snapshot) -> Floats:
    """Return with what probability each request of a node is taken, as it has turned out so far."""
    table = app.all_nodes[i].requests
    chance = np.minimum(taken_rate(app, i, snapshot) * table.probability, 1.0)
    for part in app.all_nodes[i].parts:
        if part.repeats:
            seen = reject_rate(snapshot, i, part)
            again = part.again
            chance[again] = table.probability[again] if seen is None else seen
    return chance


def _written(node: ModelNode, rows: Ints) -> Ints:
    """Return where requests of a node are in the tables of the user's nodes."""
    starts = np.array([p.start for p in node.parts])
    tries = np.array([1 + p.repeats for p in node.parts])
    part = np.searchsorted(starts, rows, side="right") - 1
    found: Ints = (rows - starts[part]) // tries[part]
    return found


def _parts_left(node: ModelNode, rows: Ints) -> tuple[NodePart, ...]:
    """Return what is left of the user's nodes in a fused one."""
    found, start = [], 0
    for part in node.fused:
        count = int(np.count_nonzero((rows >= part.start) & (rows < part.stop)))
        if count:
            found.append(replace(part, start=start, stop=start + count, repeats=0))
        start += count
    return tuple(found)


def _table(
    app: Application,
    i: int,
    rows: Ints,
    place: dict[int, int],
    position: list[Ints],
    snapshot: Snapshot,
) -> RequestTable:
    """Return the requests left of a node; settled inputs have entered their prompts."""
    node = app.all_nodes[i]
    table = node.requests
    at = position[i]
    own = table.input_row
    mine = at[own] >= 0
    sources, requests = table.input_node[mine], table.input_request[mine]
    targets, enters = at[own[mine]], table.input_in_prompt[mine]
    open_ = np.array(
        [position[s][q] >= 0 for s, q in zip(sources, requests, strict=True)], dtype=bool
    )
    tokens = np.array(
        [snapshot.generated[s][q] for s, q in zip(sources, requests, strict=True)], np.int64
    )
    generated = snapshot.generated[i][rows]
    prompt = table.prompt_tokens[rows] + generated
    entered = np.zeros(len(rows), np.int64)
    np.add.at(entered, targets[~open_ & enters], tokens[~open_ & enters])
    if isinstance(node, PythonNode):
        prompt = table.prompt_tokens[rows] + np.rint(node.tokens_share * entered).astype(np.int64)
    else:
        prompt = np.minimum(prompt + entered, node.model.max_model_len - 1)
    waiting = snapshot.status[i][rows] == Status.WAITING
    chance = _chances(app, i, snapshot)[rows]
    counts = np.bincount(targets[open_], minlength=len(rows))
    gate = None if table.gate is None else np.where(waiting, table.gate[rows], -1)
    return RequestTable(
        prompt,
        np.maximum(table.max_tokens[rows] - generated, 1),
        table.prefix_id[rows],
        table.prefix_tokens[rows],
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.array([place[int(s)] for s in sources[open_]], np.int64),
        np.array(
            [position[s][q] for s, q in zip(sources[open_], requests[open_], strict=True)],
            np.int64,
        ),
        enters[open_],
        np.where(waiting, chance, 1.0),
        np.where(waiting, table.choice[rows], -1),
        gate,
        None if table.input_needed is None else table.input_needed[mine][open_],
    )


def sample_residual(
    left: ResidualWork, estimator: LengthEstimator, rng: np.random.Generator, count: int
) -> tuple[LengthScenario, ...]:
    """Return length scenarios of what is left, conditional on what has been generated."""
    found = []
    for stream in rng.spawn(count):
        taken = draw_taken(left.app, stream)
        outputs: list[Ints] = [np.ones(len(n.requests), np.int64) for n in left.app.nodes]
        for k in left.app.order:
            parts = left.app.nodes[k].parts
            outputs[k] = np.concatenate(
                [_sample_part(left, k, part, estimator, stream) for part in parts]
            )
        found.append(make_scenario(left.app, outputs, taken))
    return tuple(found)


def _sample_part(
    left: ResidualWork,
    k: int,
    part: NodePart,
    estimator: LengthEstimator,
    rng: np.random.Generator,
) -> Ints:
    """Return a sample of the tokens each request of one of the user's nodes will still generate."""
    node, generated = left.app.nodes[k], left.generated[k][part.rows]
    table = node.requests
    query = LengthQuery(
        node.model.name,
        part.task,
        np.maximum(table.prompt_tokens[part.rows] - generated, 1),
        table.max_tokens[part.rows] + generated,
        generated,
        node.model.max_model_len,
        node=part.name,
        requests=left.requests[k][part.rows],
    )
    total = check_lengths(estimator.sample(query, rng, 1), query, 1, estimator.name)[0]
    to_come: Ints = np.maximum(total - generated, 1)
    return to_come


def residual_problem(
    problem: Problem, left: ResidualWork, scenarios: tuple[LengthScenario, ...], snapshot: Snapshot
) -> Problem:
    """Return what is left as a problem, with latencies and load times corrected.

    Its devices are those that are not lost, renumbered (:class:`Renumbering`).
    """
    costs = []
    for i, _ in left.kept:
        factor = snapshot.latency_factor[i]
        costs.append(
            {k: _corrected(c, factor, snapshot.load_factor) for k, c in problem.costs[i].items()}
        )
    cluster = problem.cluster.subset(snapshot.devices)
    engine_of = tuple(problem.engine_numbers[i] for i, _ in left.kept)
    machines = {
        problem.cluster.machine_of(d): cluster.machine_of(i) for i, d in enumerate(snapshot.devices)
    }
    there = frozenset((n, machines[m]) for n, m in snapshot.in_page_cache if m in machines)
    return Problem(left.app, cluster, scenarios, tuple(costs), problem.page_cache, there, engine_of)


def _corrected(costs: ModeCosts, latency_factor: float, load_factor: float) -> ModeCosts:
    latency = costs.latency
    if latency_factor != 1.0 and isinstance(latency, StepLatency):
        latency = latency.scaled(latency_factor)
    load = replace(
        costs.load,
        warm_s=costs.load.warm_s * load_factor,
        cold_s=costs.load.cold_s * load_factor,
        prepare_s=costs.load.prepare_s * load_factor,
    )
    return replace(costs, latency=latency, load=load)
