"""The transition rule between stages: written once, used by the simulator and the coordinator.

Given what runs and what has finished, it says which stage is current, which engines stop and which
start. It never looks at a clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.plan import Assignment, Plan, Stage

FRACTION_SLACK = 1e-9
"""Shares are quotients of whole numbers; one third of three requests is one."""


@dataclass(frozen=True, slots=True)
class Running:
    """An engine that runs.

    Attributes:
        planned: the assignment as the plan states it.
        devices: the devices it really holds.
        stage: index of the stage it was started for; above the current one if it started early.
        takes_over: node that has finished and whose engines go on as these; None: they are started.
    """

    planned: Assignment
    devices: tuple[int, ...]
    stage: int
    takes_over: str | None = None


@dataclass(slots=True)
class RunState:
    """What the rule needs to know of a run.

    Attributes:
        stage: index of the current stage; -1 before the first.
        running: by node.
        finished: nodes that have finished all their requests.
        finished_before: nodes that had finished when the current stage began.
        done_fraction: by node, share of its requests that are finished; needed for the nodes that
            ``node_progress`` events name.
        barred: devices that are lost; nothing starts on them.
        released: by node that has just finished, its engines, which are ready and have nothing to
            do: other nodes of the same engines may take them over, the others stop.
        indexed: a plan, and by node its last assignment there and the index of its stage.
    """

    stage: int = -1
    running: dict[str, Running] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    finished_before: set[str] = field(default_factory=set)
    done_fraction: dict[str, float] = field(default_factory=dict)
    barred: set[int] = field(default_factory=set)
    released: dict[str, Running] = field(default_factory=dict)
    indexed: tuple[Plan, dict[str, tuple[int, Assignment]]] | None = None

    def last_of(self, plan: Plan) -> Mapping[str, tuple[int, Assignment]]:
        """Return, by node, the last stage that assigns it, and that assignment."""
        if self.indexed is None or self.indexed[0] is not plan:
            stages = enumerate(plan.stages)
            self.indexed = plan, {a.node: (k, a) for k, s in stages for a in s.assignments}
        return self.indexed[1]


@dataclass(frozen=True, slots=True)
class Transition:
    """What has to happen now.

    Attributes:
        stage: index of the stage that is current from now on.
        stop: nodes whose engines stop (unfinished ones go on later).
        start: engines to start.
    """

    stage: int
    stop: tuple[str, ...]
    start: tuple[Running, ...]


def stage_ended(stage: Stage, state: RunState) -> bool:
    """Return whether the end event of the current stage has happened."""
    nodes = [a.node for a in stage.assignments]
    if all(n in state.finished for n in nodes):
        return True
    end = stage.end
    if end.kind == "first_finisher":
        return any(n in state.finished and n not in state.finished_before for n in nodes)
    if end.node is None:  # all_finished
        return False
    if end.node in state.finished:
        return True
    reached = state.done_fraction.get(end.node, 0.0) >= end.fraction - FRACTION_SLACK
    return end.kind == "node_progress" and reached


def next_transition(
    plan: Plan,
    cluster: Cluster,
    upstreams: Mapping[str, Sequence[str]],
    state: RunState,
    *,
    stalled: bool = False,
    same_engine: Mapping[str, int] | None = None,
) -> Transition:
    """Apply the rule after something has happened.

    1. While the current stage's end event has happened, the next stage becomes current. If nothing
       runs and nothing of the current stage can, the next one becomes current as well. The same if
       nothing that runs can go on before something else starts; in the last stage everything
       stops then, to make room for what is waited for.
    2. An engine whose planned assignment is equal in the new stage stays untouched. An engine in
       its node's last planned stage stays until the node has finished. The others stop.
    3. The stage's other unfinished nodes start on their planned devices or, if an engine still
       holds one of those, on other free devices of the same kind and shape; else they wait. Before
       them come unfinished nodes whose last stage has passed while they waited.
    4. Nodes of the following stage that do not run start early on devices that are left, planned
       ones or others of the same kind and shape, if each of their upstream nodes has finished or
       runs. So do nodes of the stages after it, as long as all that the stages before assign runs
       as it is planned there or has finished. So no device idles because models finish in another
       order than foreseen.
    5. Engines of a node that has just finished go on as those of a node that is to start, if it
       uses the same engines in the same sizes, on its planned devices or else where the devices
       are planned for nobody else who waits.

    Args:
        plan: the plan.
        cluster: its devices.
        upstreams: by node, the nodes it waits for.
        state: the run so far; ``stage`` and ``finished_before`` are updated in place, engines of
            finished nodes must have been removed from ``running``.
        stalled: nothing that runs can go on, its inputs are those of nodes that do not run.
        same_engine: by node, a number that nodes of the same engines share; nodes that are left
            out share with none.
    """
    last = len(plan.stages) - 1
    make_room = stalled and state.stage == last
    if stalled and 0 <= state.stage < last:
        _enter_next_stage(state)
    while True:
        while state.stage < last and (
            state.stage < 0 or stage_ended(plan.stages[state.stage], state)
        ):
            _enter_next_stage(state)
        stays = {
            n: r for n, r in state.running.items() if not make_room and _stays(plan, state, n, r)
        }
        free = _Free(cluster, state, stays, same_engine or {})
        start = _starts(plan, state.stage, upstreams, state, stays, free)
        if stays or start or state.stage == last:
            stop = tuple(n for n in state.running if n not in stays)
            return Transition(state.stage, stop, tuple(start))
        _enter_next_stage(state)


def _enter_next_stage(state: RunState) -> None:
    state.stage += 1
    state.finished_before = set(state.finished)


def _stays(plan: Plan, state: RunState, node: str, running: Running) -> bool:
    """Return whether an engine goes on untouched in the current stage."""
    wanted = plan.stages[state.stage].assignment(node)
    if wanted is not None:
        return wanted == running.planned
    last, _ = state.last_of(plan).get(node, (-1, None))
    if last <= state.stage:
        return True  # nobody would ever finish it otherwise
    return running.stage > state.stage  # started early


class _Free:
    """Devices that nobody holds, and engines on them that others may take over."""

    def __init__(
        self,
        cluster: Cluster,
        state: RunState,
        stays: Mapping[str, Running],
        same_engine: Mapping[str, int],
    ) -> None:
        """Take all devices but those of engines that stay."""
        self._cluster, self._same = cluster, same_engine
        self._devices = set(range(cluster.num_gpus)) - state.barred
        for running in stays.values():
            self._devices -= set(running.devices)
        self._offers = {n: r for n, r in state.released.items() if n in same_engine}

    def has(self, assignment: Assignment) -> bool:
        """Return whether the planned devices are free."""
        return self._devices.issuperset(assignment.devices)

    def offer(
        self, assignment: Assignment, waiting: Sequence[Assignment]
    ) -> tuple[tuple[int, ...], str] | None:
        """Return engines that an assignment can take over: their devices and their node.

        Args:
            assignment: what is to start.
            waiting: all that is, of which none is to find its devices taken.
        """
        number = self._same.get(assignment.node)
        if number is None or not self._offers:
            return None
        others = {d for a in waiting if a is not assignment for d in a.devices}
        found = None
        for name, running in self._offers.items():
            alike = self._same[name] == number and running.planned.parallel == assignment.parallel
            if not alike or not self._devices.issuperset(running.devices):
                continue
            if set(running.devices) == set(assignment.devices):
                return running.devices, name
            if found is None and others.isdisjoint(running.devices):
                found = running.devices, name
        return found

    def elsewhere(self, assignment: Assignment) -> tuple[int, ...] | None:
        """Return the planned devices if they are free, else others of the same kind and shape."""
        if self.has(assignment):
            return assignment.devices
        kind = self._cluster.gpus[assignment.devices[0]]
        alike = [d for d in self._devices if self._cluster.gpus[d] == kind]
        return self._cluster.find_devices(alike, assignment.parallel)

    def take(self, devices: Sequence[int]) -> None:
        """Take these devices for an engine; what ran on them before ends."""
        self._devices -= set(devices)


def _starts(
    plan: Plan,
    current: int,
    upstreams: Mapping[str, Sequence[str]],
    state: RunState,
    stays: Mapping[str, Running],
    free: _Free,
) -> list[Running]:
    """Return the engines that can start now."""
    starts: list[Running] = []
    stage = plan.stages[current]
    wanted = [*overdue(plan, current, state), *stage.assignments]
    waiting = [a for a in wanted if a.node not in state.finished and a.node not in stays]
    while waiting:
        chosen = _next_start(waiting, upstreams, free, current)
        if chosen is None:
            return starts  # what is free is left to those who wait
        free.take(chosen.devices)
        starts.append(chosen)
        waiting.remove(chosen.planned)
    begun = {r.planned.node: r.planned for r in (*stays.values(), *starts)}
    for number in range(current + 1, len(plan.stages)):
        if not _start_early(plan, number, upstreams, state, begun, free, starts):
            return starts
    return starts


def _start_early(
    plan: Plan,
    number: int,
    upstreams: Mapping[str, Sequence[str]],
    state: RunState,
    begun: dict[str, Assignment],
    free: _Free,
    starts: list[Running],
) -> bool:
    """Start what a later stage assigns on devices that are left, in place.

    Returns:
        Whether all of the stage runs as it is planned, so that those after it may be looked at.
    """
    complete = True
    stage = plan.stages[number].assignments
    waiting = [a for a in stage if a.node not in state.finished and a.node not in begun]
    for assignment in stage:
        node = assignment.node
        if node in state.finished:
            continue
        if node in begun:
            complete &= begun[node] == assignment
            continue
        ready = all(u in state.finished or u in begun for u in upstreams.get(node, ()))
        devices, before = None, None
        if ready and (offer := free.offer(assignment, waiting)) is not None:
            devices, before = offer
        elif ready:
            devices = free.elsewhere(assignment)
        if devices is None:
            complete = False
            continue
        free.take(devices)
        starts.append(Running(assignment, devices, number, before))
        begun[node] = assignment
    return complete


def _next_start(
    waiting: Sequence[Assignment],
    upstreams: Mapping[str, Sequence[str]],
    free: _Free,
    stage: int,
) -> Running | None:
    """Return which of the waiting nodes starts next, and where, or None if none can.

    Engines that can be taken over first, then planned devices for everybody, so that nobody's
    detour takes another's place; and no node before one that it waits for, so that it cannot hold
    the devices that one needs.
    """
    names = {a.node for a in waiting}
    able = [a for a in waiting if names.isdisjoint(upstreams.get(a.node, ()))]
    for assignment in able:
        if (offer := free.offer(assignment, waiting)) is not None:
            return Running(assignment, offer[0], stage, offer[1])
    for assignment in able:
        if free.has(assignment):
            return Running(assignment, assignment.devices, stage)
    for assignment in able:
        devices = free.elsewhere(assignment)
        if devices is not None:
            return Running(assignment, devices, stage)
    return None


def overdue(plan: Plan, current: int, state: RunState) -> list[Assignment]:
    """Return the last assignments of nodes that no stage from ``current`` on assigns, in order.

    One of them that has not finished and does not run waited for devices throughout its last stage.
    """
    return [a for number, a in state.last_of(plan).values() if number < current]
