"""Plans of what is left of a run, and of the run: their devices, stages and shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.sleeping import Asleep
from samullm_plugin.rules.transition import Running
from samullm_plugin.run.residual import ResidualWork


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
