"""Which engines sleep until they are needed again: a rule that simulator and coordinator share.

An engine that nobody needs now stops, or sleeps: its devices are free, but its processes are there,
and waking takes less than starting. Like the transition rule it never looks at a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from samullm_plugin.model.costs import LoadTimes
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.transition import Running, RunState, Transition, overdue


@dataclass(frozen=True, slots=True)
class Asleep:
    """Engines that sleep, or fall asleep.

    Attributes:
        engine: their number (:attr:`~samullm_plugin.model.problem.Problem.engine_numbers`).
        parallel: parallel sizes.
        devices: those they had, and wake on.
    """

    engine: int
    parallel: ParallelConfig
    devices: tuple[int, ...]

    def replicas(self) -> Iterator[tuple[int, ...]]:
        """Return the devices of each replica."""
        return self.parallel.replicas(self.devices)

    def load(self, problem: Problem) -> LoadTimes:
        """Return what starting them takes, and sleeping."""
        node = problem.engine_numbers.index(self.engine)
        return problem.mode(node, self.parallel, self.devices).load


@dataclass(frozen=True, slots=True)
class Sleeping:
    """What becomes of engines that sleep, or could, when the transition rule has been applied.

    Attributes:
        end: those that are needed no more.
        begin: by node that has finished, as what its engines sleep from now on.
        wake: by node that starts, which engines wake for it.
    """

    end: tuple[Asleep, ...] = ()
    begin: Mapping[str, Asleep] = field(default_factory=dict)
    wake: Mapping[str, Asleep] = field(default_factory=dict)


def can_sleep(problem: Problem) -> bool:
    """Return whether any engine would."""
    return any(c.load.worth_sleeping for costs in problem.costs for c in costs.values())


def sleeping(
    problem: Problem, plan: Plan, state: RunState, move: Transition, asleep: Iterable[Asleep]
) -> Sleeping:
    """Apply the rule, after the transition rule and before what that says is done.

    1. A node that starts, and takes over no engines, wakes those that sleep on its devices, if they
       are its own in the same sizes.
    2. Engines of a node that has finished, which nobody takes over, sleep if some later assignment
       of the plan is the same engines' in the same sizes on the same devices, and if that holds
       devices shorter than starting them again.
    3. Sleep is limited: by the memory of the hosts, and on each device by what engines leave free
       there (``gpu_memory_utilization``). Who sleeps already comes first.

    Args:
        problem: the instance.
        plan: the plan.
        state: the run as the transition rule was applied to it.
        move: what that rule said.
        asleep: engines that sleep, in the order in which they began.
    """
    left = [a for a in asleep if state.barred.isdisjoint(a.devices)]
    wake: dict[str, Asleep] = {}
    for running in move.start:
        mine = asleep_as(problem, running)
        if running.takes_over is None and mine in left:
            wake[running.planned.node] = mine
            left.remove(mine)
    running_on = {n: r for n, r in state.running.items() if n not in move.stop}
    running_on |= {r.planned.node: r for r in move.start}
    wanted = set(_to_come(problem, plan, state, move, running_on))
    taken_over = {r.takes_over for r in move.start}
    room = _Room(problem)
    kept = [a for a in left if a in wanted and room.take(a)]
    begin: dict[str, Asleep] = {}
    for name, running in state.released.items():
        mine = asleep_as(problem, running)
        if name in taken_over or mine not in wanted or mine in kept:
            continue
        if mine.load(problem).worth_sleeping and room.take(mine):
            begin[name] = mine
    end = tuple(a for a in asleep if a not in kept and a not in wake.values())
    return Sleeping(end, begin, wake)


def asleep_as(problem: Problem, running: Running) -> Asleep:
    """Return what a node's engines are once they sleep."""
    number = problem.engine_numbers[problem.app.index(running.planned.node)]
    return Asleep(number, running.planned.parallel, running.devices)


def _to_come(
    problem: Problem,
    plan: Plan,
    state: RunState,
    move: Transition,
    running_on: Mapping[str, Running],
) -> Iterator[Asleep]:
    """Yield the engines of assignments that are still to be started."""
    for number in range(move.stage, len(plan.stages)):
        late = overdue(plan, number, state) if number == move.stage else []
        for assignment in (*late, *plan.stages[number].assignments):
            node = assignment.node
            if node in state.finished:
                continue
            running = running_on.get(node)
            if running is not None and (number == move.stage or running.planned == assignment):
                continue
            yield asleep_as(problem, Running(assignment, assignment.devices, number))


def left_by(problem: Problem, asleep: Iterable[Asleep]) -> list[float]:
    """Return by machine the bytes of its host that engines that sleep leave."""
    cluster = problem.cluster
    left = [float(cluster.host_bytes(m)) for m in range(len(cluster.machines))]
    for sleeper in asleep:
        for machine, needed in _host_bytes(problem, sleeper):
            left[machine] -= needed
    return left


def _host_bytes(problem: Problem, asleep: Asleep) -> Iterator[tuple[int, float]]:
    """Yield the machines of engines, and bytes of their hosts that they take asleep."""
    needed = asleep.load(problem).asleep_bytes
    for devices in asleep.replicas():
        for machine, count in Counter(map(problem.cluster.machine_of, devices)).items():
            yield machine, needed * count / len(devices)


class _Room:
    """Memory that engines may take asleep."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._host = left_by(problem, ())
        used = max(n.model.engine.gpu_memory_utilization for n in problem.app.nodes)
        self._device = [(1 - used) * gpu.memory_bytes for gpu in problem.cluster.gpus]

    def take(self, asleep: Asleep) -> bool:
        """Return whether engines find room; take it if so."""
        host, device = self._host.copy(), self._device.copy()
        for machine, needed in _host_bytes(self._problem, asleep):
            host[machine] -= needed
        each = asleep.load(self._problem).asleep_device_bytes
        for d in asleep.devices:
            device[d] -= each
        if min(host) < 0 or min(device) < 0:
            return False
        self._host, self._device = host, device
        return True
