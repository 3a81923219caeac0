"""A multi-LLM application in the middle of being run, in one length scenario."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment
from samullm_plugin.model.result import EngineSegment
from samullm_plugin.model.types import Floats
from samullm_plugin.rules.page_cache import PageCaches
from samullm_plugin.rules.sleeping import Asleep, Sleeping
from samullm_plugin.rules.transition import Running
from samullm_plugin.simulator.node_run import (
    NodeRun,
    Progress,
    finished_count,
    untaken_finish_s,
)
from samullm_plugin.simulator.python_rows import python_finish_s
from samullm_plugin.simulator.runs import NodeQuery, NodeRuns


@dataclass(slots=True)
class ActiveEngine:
    """A model's engines that hold devices.

    Attributes:
        running: assignment and devices.
        start_s: when their start began.
        base: what was done of the node before.
        available_s: arrivals the run was simulated with.
        run: the simulation to the node's end.
        woken: they slept before.
        cut: time, progress and run of its last evaluation as if stopped.
    """

    running: Running
    start_s: float
    ready_s: float
    base: Progress
    available_s: Floats | None
    run: NodeRun
    woken: bool = False
    cut: tuple[float, NodeRun, Progress, NodeRun] | None = None


class SimulationState:
    """Clock, progress and engines; copies are cheap and independent.

    Attributes:
        clock_s: now.
        active: engines by node name.
        prepared: by node name, what its engines are being prepared for, and since when.
        asleep: engines that sleep, and since when, or until when they fall asleep.
        segments: engines that have ended.
        released: by node that has finished just now, its engines if they were ready: until time
            goes on others may take them over.
        caches: what machines have read.
    """

    def __init__(self, runs: NodeRuns, start: Sequence[Progress], scenario: int) -> None:
        """Begin at time 0 with nothing running.

        Args:
            runs: simulations of single nodes, with the problem they are of.
            start: by node, what is done at the beginning.
            scenario: index of the length scenario.
        """
        self._runs, self._scenario = runs, scenario
        self._problem, self._works = runs.problem, runs.works[scenario]
        self.clock_s = 0.0
        self.progress = list(start)
        self.active: dict[str, ActiveEngine] = {}
        self.prepared: dict[str, tuple[Assignment, float]] = {}
        self.asleep: dict[Asleep, float] = {}
        self.segments: list[EngineSegment] = []
        self.released: dict[str, Running] = {}
        self.caches = PageCaches(runs.problem)
        self.finish_s: list[Floats] = [p.finish_s for p in self.progress]
        self._node_finish_s: list[float | None] = [None] * len(self.finish_s)
        self.refresh()

    @property
    def scenario(self) -> int:
        """Return the index of the length scenario."""
        return self._scenario

    def copy(self) -> SimulationState:
        """Return an independent copy."""
        new = object.__new__(SimulationState)
        new._runs, new._scenario = self._runs, self._scenario
        new._problem, new._works = self._problem, self._works
        new.clock_s = self.clock_s
        new.progress = list(self.progress)
        new.active = {n: replace(a) for n, a in self.active.items()}
        new.prepared = dict(self.prepared)
        new.asleep = dict(self.asleep)
        new.segments = list(self.segments)
        new.released = dict(self.released)
        new.caches = self.caches.copy()
        new.finish_s = list(self.finish_s)
        new._node_finish_s = list(self._node_finish_s)
        return new

    def node_finish_s(self, node: int) -> float:
        """Return when the last request of a node finishes, as things stand (inf: not foreseen)."""
        known = self._node_finish_s[node]
        if known is None:
            known = self._node_finish_s[node] = float(self.finish_s[node].max())
        return known

    def _set_finish_s(self, node: int, finish_s: Floats) -> None:
        if finish_s is not self.finish_s[node]:
            self.finish_s[node] = finish_s
            self._node_finish_s[node] = None

    def finished(self) -> set[str]:
        """Return the nodes that have finished by now."""
        nodes = self._problem.app.nodes
        return {n.name for i, n in enumerate(nodes) if self.node_finish_s(i) <= self.clock_s}

    def has_work(self, node: int) -> bool:
        """Return whether some request of a node has still to be computed."""
        work = self._works[node]
        if work.all_taken:
            return self.node_finish_s(node) > self.clock_s
        return bool((self.finish_s[node][work.taken] > self.clock_s).any())

    def done_fraction(self, node: int) -> float:
        """Return the share of a node's requests that are finished by now."""
        return float(np.mean(self.finish_s[node] <= self.clock_s))

    def time_of_fraction(self, node: int, fraction: float) -> float:
        """Return when a share of a node's requests is finished (inf: not foreseen)."""
        finish = self.finish_s[node]
        rank = min(len(finish), max(1, int(np.ceil(fraction * len(finish) - 1e-9)))) - 1
        return float(np.partition(finish, rank)[rank])

    def sleep(self, change: Sleeping) -> None:
        """Let engines of nodes that have finished fall asleep, and end those that slept enough."""
        for asleep in change.end:
            del self.asleep[asleep]
        for asleep in change.begin.values():
            self.asleep[asleep] = self.clock_s + (asleep.load(self._problem).sleep_s or 0.0)

    def start(self, running: Running, wakes: Asleep | None = None) -> None:
        """Begin to start a node's engines now; ``refresh`` afterwards.

        Args:
            running: its engines.
            wakes: engines that wake for it instead.
        """
        problem, node = self._problem, self._problem.app.index(running.planned.node)
        costs = problem.mode(node, running.planned.parallel, running.devices)
        known = self.prepared.pop(running.planned.node, None)
        since_s = None
        if known is not None and known[0].parallel == running.planned.parallel:
            since_s = known[1]
        held = [s for a, s in self.asleep.items() if not set(a.devices).isdisjoint(running.devices)]
        began_s = max((self.clock_s, *held))
        if wakes is not None:
            del self.asleep[wakes]
            ready = began_s + (costs.load.wake_s or 0.0)
        elif running.takes_over is not None:
            ready = self.clock_s
        else:
            ready = self.caches.ready_s(node, costs, running.devices, began_s, since_s)
        base = self.progress[node]
        run = NodeRun(ready, base, (), (), ())
        self.active[running.planned.node] = ActiveEngine(
            running, self.clock_s, ready, base, None, run, wakes is not None
        )

    def stop(self, name: str) -> None:
        """Stop a node's engines now; its unfinished requests keep their tokens, not their KV."""
        node, engine = self._problem.app.index(name), self.active.pop(name)
        finished = self.node_finish_s(node) <= self.clock_s
        if finished:
            self.progress[node] = Progress(self.finish_s[node], engine.base.generated)
            run = engine.run
        else:
            self.progress[node], run = self._cut(engine)
        self.segments.append(
            EngineSegment(
                name,
                engine.running.planned.parallel,
                engine.running.devices,
                engine.running.stage,
                engine.start_s,
                engine.ready_s,
                self.clock_s,
                run.busy_s,
                finished_count(run.runs),
                sum(r.num_preemptions for r in run.runs),
                finished,
                engine.woken,
            )
        )

    def _query(
        self, node: int, running: Running, base: Progress, available: Floats | None, ready_s: float
    ) -> NodeQuery:
        parallel, device = running.planned.parallel, running.devices[0]
        return NodeQuery(self._scenario, node, parallel, device, base, available, ready_s)

    def _cut(self, engine: ActiveEngine) -> tuple[Progress, NodeRun]:
        """Return what an engine has done by now, and its run until now."""
        if engine.cut is None or engine.cut[0] != self.clock_s or engine.cut[1] is not engine.run:
            # An engine from before the plan has computed nothing for it when that begins.
            until_s = self.clock_s if self.clock_s > 0.0 else min(engine.ready_s, 0.0)
            done, run = engine.run.until(until_s, self._runs.cache)
            engine.cut = self.clock_s, engine.run, done, run
        return engine.cut[2], engine.cut[3]

    def progress_now(self, node: int) -> Progress:
        """Return what would be done of a node if its engines stopped now."""
        engine = self.active.get(self._problem.app.nodes[node].name)
        return self.progress[node] if engine is None else self._cut(engine)[0]

    def restart_query(
        self,
        node: int,
        parallel: ParallelConfig,
        device: int,
        finish_s: Sequence[Floats] | None = None,
    ) -> NodeQuery:
        """Return the query of a node whose engines are started anew now, in this configuration.

        Args:
            node: index of the node.
            parallel: parallel sizes.
            device: one of its devices, for their kind.
            finish_s: per node, when its requests finish, as far as it is foreseen; None: all that
                the node waits for is there.
        """
        problem = self._problem
        # Whole starts, as no plan says yet what comes next: taken to be prepared, they made plans
        # that change engines more often than there is time to prepare them.
        ready_s = self.clock_s
        if not self.can_take_over(node, parallel):
            ready_s += problem.load_s(problem.mode(node, parallel, (device,)))
        available = None
        if finish_s is not None:
            available = self._works[node].inputs.available_s(finish_s)
        base = self.progress_now(node)
        return NodeQuery(self._scenario, node, parallel, device, base, available, ready_s)

    def go_on_query(self, name: str, finish_s: Sequence[Floats]) -> NodeQuery:
        """Return the query of a node that goes on as it runs now; see :meth:`restart_query`."""
        engine, node = self.active[name], self._problem.app.index(name)
        available = self._works[node].inputs.available_s(finish_s)
        return self._query(node, engine.running, engine.base, available, engine.ready_s)

    def foreseen(self, runs: Mapping[int, NodeRun]) -> list[Floats]:
        """Return when each node's requests finish if these nodes, and no others, run from now on.

        Args:
            runs: by node index.
        """
        app, works = self._problem.app, self._works
        result = list(self.finish_s)
        for i in app.full_order:
            if i >= len(app.nodes):
                result[i] = self._python_finish_s(i, works[i].inputs.available_s(result))
                continue
            finish = runs[i].finish_s if i in runs else self.progress_now(i).finish_s
            # When inputs are there matters to requests that are not taken alone.
            available = None if works[i].all_taken else works[i].inputs.available_s(result)
            result[i] = untaken_finish_s(works[i], available, finish)
        return result

    def refresh(self) -> None:
        """Simulate again, in topological order, every engine whose inputs have changed."""
        app = self._problem.app
        works = self._works
        for i in app.full_order:
            work = works[i]
            python = i >= len(app.nodes)
            engine = None if python else self.active.get(app.nodes[i].name)
            if engine is None and not python and work.all_taken:
                self._set_finish_s(i, self.progress[i].finish_s)
                continue
            available = work.inputs.available_s(self.finish_s)
            if python:
                self._set_finish_s(i, self._python_finish_s(i, available))
            elif engine is None:
                self._set_finish_s(i, untaken_finish_s(work, available, self.progress[i].finish_s))
            elif not engine.run.jobs or not _same(available, engine.available_s):
                engine.available_s = available
                query = self._query(i, engine.running, engine.base, available, engine.ready_s)
                engine.run = self._runs.get(query)
                self._set_finish_s(i, untaken_finish_s(work, available, engine.run.finish_s))

    def _python_finish_s(self, node: int, available: Floats | None) -> Floats:
        """Return when the requests of a Python node finish, given when their inputs are there."""
        app, work = self._problem.app, self._works[node]
        python = app.python[node - len(app.nodes)]
        done_s = self.progress[node].finish_s
        return python_finish_s(python, work.inputs, work.taken, available, done_s)

    def prepare(self, wanted: Sequence[Assignment]) -> None:
        """Have the engines of these assignments prepared from now on, and no others."""
        kept = {}
        for assignment in wanted:
            known = self.prepared.get(assignment.node)
            if known is None or known[0].parallel != assignment.parallel:
                known = assignment, self.clock_s
                model = self._problem.node(assignment.node).model
                self.caches.read_ahead(model.name, assignment.devices, self.clock_s)
            kept[assignment.node] = known
        self.prepared = kept

    def keep_only(self, assignments: Iterable[Assignment]) -> None:
        """Stop engines that are not among the assignments and start the missing ones."""
        wanted = {a.node: a for a in assignments}
        for name in list(self.active):
            planned = self.active[name].running.planned
            if name not in wanted or wanted[name] != planned:
                self.stop(name)
        for assignment in wanted.values():
            if assignment.node not in self.active:
                before = self._taken_over(assignment)
                self.start(Running(assignment, assignment.devices, 0, before))
        self.released.clear()
        self.refresh()

    def can_take_over(self, node: int, parallel: ParallelConfig) -> bool:
        """Return whether engines that have just become free can serve a node in these sizes."""
        return parallel in self.offered_sizes(node)

    def offered_sizes(self, node: int) -> set[ParallelConfig]:
        """Return the sizes of engines that have just become free and can serve a node."""
        offers = self._offers(self._problem.app.nodes[node].name) if self.released else ()
        return {running.planned.parallel for _, running in offers}

    def _offers(self, node: str) -> Iterator[tuple[str, Running]]:
        """Yield the engines that a node can take over, by the node they were of."""
        same = self._problem.same_engine
        for name, running in self.released.items() if node in same else ():
            if same.get(name) == same[node]:
                yield name, running

    def _taken_over(self, wanted: Assignment) -> str | None:
        """Return the node whose engines an assignment can take over on its devices."""
        alike, mine = wanted.parallel, set(wanted.devices)
        offers = ((n, r) for n, r in self._offers(wanted.node) if r.planned.parallel == alike)
        return next((n for n, r in offers if set(r.devices) == mine), None)

    def advance_to(self, time_s: float) -> None:
        """Set the clock; engines of nodes that finish by then end at their finish.

        Args:
            time_s: at most the next finish of a running node, so that nothing is skipped.
        """
        self.clock_s = time_s
        self.released.clear()
        for name in [
            n for n in self.active if self.node_finish_s(self._problem.app.index(n)) <= time_s
        ]:
            engine = self.active[name]
            if engine.ready_s <= time_s:
                self.released[name] = engine.running
            self.stop(name)


def _same(a: Floats | None, b: Floats | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or bool(np.array_equal(a, b))
