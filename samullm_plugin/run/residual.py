"""What is left of a run, as a problem of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.engine import StepLatency
from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.model.application import Application, ModelNode, PythonNode
from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.requests import NodePart, RequestTable
from samullm_plugin.model.scenarios import LengthScenario, draw_taken, make_scenario
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.planning.building import check_lengths
from samullm_plugin.rules.sleeping import Asleep
from samullm_plugin.rules.transition import Running
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


class Renumbering:
    """The devices that are not lost, as the residual problem counts them.

    Args:
        devices: those devices, by the numbers of the whole cluster.
    """

    def __init__(self, devices: Sequence[int]) -> None:
        self._whole = tuple(devices)
        self._residual = {d: i for i, d in enumerate(devices)}

    def residual(self, plan: Plan) -> Plan | None:
        """Return a plan of the whole cluster in the residual numbers; None if it uses lost ones."""
        used = {d for s in plan.stages for a in s.assignments for d in a.devices}
        return None if used - self._residual.keys() else _renumbered(plan, self._residual)

    def whole(self, plan: Plan) -> Plan:
        """Return a plan of the residual problem in the numbers of the whole cluster."""
        return _renumbered(plan, dict(enumerate(self._whole)))

    def engines(self, running: Running) -> Running:
        """Return an engine in the residual numbers, as planned where it is."""
        devices = tuple(self._residual[d] for d in running.devices)
        planned = Assignment(running.planned.node, running.planned.parallel, devices)
        return Running(planned, devices, 0)

    def asleep(self, engines: Iterable[Asleep], problem: Problem) -> tuple[Asleep, ...]:
        """Return those engines that sleep of which a residual problem still has nodes."""
        return tuple(
            replace(a, devices=tuple(self._residual[d] for d in a.devices))
            for a in engines
            if a.engine in problem.engine_numbers and self._residual.keys() >= set(a.devices)
        )


def _renumbered(plan: Plan, new: Mapping[int, int]) -> Plan:
    def moved(a: Assignment) -> Assignment:
        return Assignment(a.node, a.parallel, tuple(new[d] for d in a.devices))

    return Plan(tuple(Stage(tuple(map(moved, s.assignments)), s.end) for s in plan.stages))


def residual_plan(
    plan: Plan,
    stage: int,
    left: ResidualWork,
    status: Sequence[NDArray[np.int8]],
    running: Mapping[str, Running],
) -> Plan:
    """Return what is left of a plan from a stage on.

    Args:
        plan: the plan.
        stage: the current stage.
        left: what is left to do.
        status: per node of the whole application, as in the ledger.
        running: engines by node name; where they are not on their planned devices, the rest of the
            plan is changed to the devices they hold.
    """
    names = {n.name: left.kept[k] for k, n in enumerate(left.app.nodes)}
    stages: list[Stage] = []
    for index in range(max(stage, 0), len(plan.stages)):
        old = plan.stages[index]
        assignments = tuple(_held(a, running) for a in old.assignments if a.node in names)
        if not assignments:
            continue
        end = old.end
        if end.node is not None and end.node not in names:
            if index + 1 < len(plan.stages):
                continue  # its end event has happened
            end = StageEnd("all_finished")
        elif end.kind == "node_progress" and end.node is not None:
            whole, rows = names[end.node]
            total = len(status[whole])
            wanted = end.fraction * total - (total - len(rows))
            if wanted <= 0:
                continue
            end = replace(end, fraction=min(1.0, wanted / len(rows)))
        stages.append(Stage(assignments, end))
    if not stages:  # engines in their nodes' last stages go on to their end
        last = tuple(_held(r.planned, running) for n, r in running.items() if n in names)
        stages.append(Stage(last, StageEnd("all_finished")))
    return Plan(tuple(stages))


def whole_plan(plan: Plan, left: ResidualWork, status: Sequence[NDArray[np.int8]]) -> Plan:
    """Return a plan for what is left as one for the run: its shares are of all requests of a node.

    Args:
        plan: the plan, whose shares are of the requests that were left.
        left: what was left to do.
        status: per node of the whole application, as in the ledger at that moment.
    """
    sizes = {
        n.name: (len(status[i]), len(rows))
        for n, (i, rows) in zip(left.app.nodes, left.kept, strict=True)
    }
    stages: list[Stage] = []
    for stage in plan.stages:
        end = stage.end
        if end.kind == "node_progress" and end.node is not None:
            total, rest = sizes[end.node]
            end = replace(end, fraction=(total - rest + end.fraction * rest) / total)
        stages.append(Stage(stage.assignments, end))
    return Plan(tuple(stages))


def _held(assignment: Assignment, running: Mapping[str, Running]) -> Assignment:
    engine = running.get(assignment.node)
    if engine is None or engine.planned != assignment:
        return assignment
    return Assignment(assignment.node, assignment.parallel, engine.devices)


def aligned(plan: Plan, problem: Problem, running: Mapping[str, Running]) -> Plan:
    """Return the same plan on other devices, so that running engines can stay where they are.

    Machines change places with machines of their shape, NVLink groups with groups of their kind on
    the machine that took their machine's place, and devices within a group.
    """
    cluster = problem.cluster
    group = {d: g for g in cluster.nvlink_groups for d in g}
    kind = {g: (len(g), tuple(cluster.kinds[d] for d in g)) for g in cluster.nvlink_groups}
    on_machine: dict[int, list[tuple[int, ...]]] = {m: [] for m in range(len(cluster.machines))}
    for g in cluster.nvlink_groups:
        on_machine[cluster.machine_of(g[0])].append(g)
    shape = {m: sorted(kind[g] for g in groups) for m, groups in on_machine.items()}
    devices: dict[int, int] = {}
    groups: dict[tuple[int, ...], tuple[int, ...]] = {}
    machines: dict[int, int] = {}
    first = plan.stages[0].assignments
    for assignment in sorted(first, key=lambda a: -len(a.devices)):
        held = running.get(assignment.node)
        if held is None or held.planned.parallel != assignment.parallel:
            continue
        wish, wish_groups, wish_machines = dict(devices), dict(groups), dict(machines)
        for old, new in zip(assignment.devices, held.devices, strict=True):
            here, there = cluster.machine_of(old), cluster.machine_of(new)
            fits = shape[here] == shape[there] and kind[group[old]] == kind[group[new]]
            fits &= wish.setdefault(old, new) == new
            fits &= wish_groups.setdefault(group[old], group[new]) == group[new]
            fits &= wish_machines.setdefault(here, there) == there
            if not fits:
                break
        else:
            maps: tuple[Mapping[Any, Any], ...] = (wish, wish_groups, wish_machines)
            if all(len(set(m.values())) == len(m) for m in maps):
                devices, groups, machines = wish, wish_groups, wish_machines
    for machine in on_machine:
        if machine not in machines:
            taken = set(machines.values())
            alike = [m for m in on_machine if m not in taken and shape[m] == shape[machine]]
            machines[machine] = machine if machine in alike else alike[0]
    for old_group in cluster.nvlink_groups:
        if old_group not in groups:
            used = set(groups.values())
            target = on_machine[machines[cluster.machine_of(old_group[0])]]
            open_ = [g for g in target if g not in used and kind[g] == kind[old_group]]
            groups[old_group] = old_group if old_group in open_ else open_[0]
        free = iter([d for d in groups[old_group] if d not in devices.values()])
        for device in old_group:
            if device not in devices:
                devices[device] = next(free)
    return _renumbered(plan, devices)
