"""Which engines are prepared ahead: the second rule that simulator and coordinator share.

What a start needs no device for is done while others still compute, as far as the memory of the
hosts reaches. Like the transition rule it never looks at a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from samullm_plugin.model.plan import Assignment, Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.sleeping import Asleep, asleep_as, left_by
from samullm_plugin.rules.transition import Running, RunState, overdue


def wanted_ahead(
    problem: Problem, plan: Plan, state: RunState, asleep: Collection[Asleep] = ()
) -> tuple[Assignment, ...]:
    """Return the assignments whose engines are to be prepared now, in the order of the plan.

    These are the ones of the current stage that wait for devices, and those of the first stage
    after it that starts any engine. An assignment whose replicas find no room beside those before
    it in the memory of their machines' hosts is left out, which engines that sleep have first; so
    is one whose engines sleep, or run and will sleep: they wake.

    Args:
        problem: the instance; engines whose start has no such part are left out.
        plan: the plan.
        state: the run after the transition rule was applied and what it says was done.
        asleep: engines that sleep.
    """
    if not any(c.load.prepare_s for costs in problem.costs for c in costs.values()):
        return ()
    left = left_by(problem, asleep)
    there = {*asleep, *(asleep_as(problem, r) for r in state.running.values())}
    there = {a for a in there if a.load(problem).worth_sleeping}
    wanted: dict[str, Assignment] = {}
    for number in range(max(state.stage, 0), len(plan.stages)):
        late = overdue(plan, number, state) if number == state.stage else []
        for assignment in (*late, *plan.stages[number].assignments):
            node = assignment.node
            if node in state.finished or node in wanted:
                continue
            running = state.running.get(node)
            if running is not None and (number == state.stage or running.planned == assignment):
                continue
            if there and asleep_as(problem, Running(assignment, assignment.devices, 0)) in there:
                continue
            if _fits(problem, assignment, left):
                wanted[node] = assignment
        if wanted and number > state.stage:
            break
    return tuple(wanted.values())


def _fits(problem: Problem, assignment: Assignment, left: list[float]) -> bool:
    """Return whether an assignment's engines can be prepared; take their memory if so."""
    node = problem.app.index(assignment.node)
    load = problem.mode(node, assignment.parallel, assignment.devices).load
    if load.prepare_s == 0.0:
        return False
    needed = [0.0] * len(left)
    for devices in assignment.replicas():
        for machine, count in Counter(map(problem.cluster.machine_of, devices)).items():
            needed[machine] += load.prepared_bytes * count / len(devices)
    if any(need > have for need, have in zip(needed, left, strict=True)):
        return False
    left[:] = [have - need for need, have in zip(needed, left, strict=True)]
    return True
