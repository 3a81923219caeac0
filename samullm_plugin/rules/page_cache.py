"""Which checkpoints each machine has in its page cache: simulator and coordinator share the rule.

In a problem whose page caches are cold at first, a checkpoint is read from a machine's disk once:
by the first engine that starts there, or ahead for the next stage. A disk reads one checkpoint
after another; engines that start while theirs is read wait for it, all others find it in memory.
Nothing is thrown out again, so hosts are taken to have room for all checkpoints of the application.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from samullm_plugin.model.costs import ModeCosts
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem

_Read = tuple[str, tuple[int, ...]]


class PageCaches:
    """The checkpoints that machines have read or are reading.

    Args:
        problem: the instance; those it begins with are there from the start.
    """

    __slots__ = ("_free_s", "_problem", "_there_s")

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._there_s = dict.fromkeys(problem.in_page_cache, 0.0)
        self._free_s: dict[int, float] = {}

    def copy(self) -> PageCaches:
        """Return an independent copy."""
        new = PageCaches(self._problem)
        new._there_s, new._free_s = dict(self._there_s), dict(self._free_s)
        return new

    @property
    def held(self) -> frozenset[tuple[str, int]]:
        """Return checkpoints that are read or being read, by name and machine."""
        return frozenset(self._there_s)

    def forget(self, machine: int) -> None:
        """Take a machine for one that has read nothing."""
        self._there_s = {k: s for k, s in self._there_s.items() if k[1] != machine}
        self._free_s.pop(machine, None)

    def ready_s(
        self,
        node: int,
        costs: ModeCosts,
        devices: Sequence[int],
        start_s: float,
        prepared_s: float | None = None,
    ) -> float:
        """Return when engines that are started are ready, and note what they read.

        Args:
            node: index of their node.
            costs: of their size.
            devices: on which they are.
            start_s: when they get them.
            prepared_s: since when what needs no device is being done; None: since they got them.
        """
        load, began_s = costs.load, start_s
        if prepared_s is not None and load.prepare_s > 0.0:
            began_s = prepared_s
        reading_s = load.cold_s - load.warm_s
        name = self._problem.app.nodes[node].model.name
        machines = self._machines(devices)
        there_s = max([self._read(name, m, began_s, reading_s) for m in machines])
        if began_s == start_s:
            return there_s + load.warm_s
        device_s = load.warm_s - load.prepare_s
        return max(start_s, there_s + load.warm_s - device_s) + device_s

    def read_next(
        self, plan: Plan, stage: int, finished: Iterable[str], now_s: float
    ) -> list[_Read]:
        """Have the machines read ahead what the stage after ``stage`` loads on them.

        Args:
            plan: the plan.
            stage: the current one.
            finished: nodes that need nothing any more.
            now_s: the clock.

        Returns:
            What is read now that was not read before: names of nodes and their devices.
        """
        begun: list[_Read] = []
        done = set(finished)
        for assignment in (a for s in plan.stages[stage + 1 : stage + 2] for a in s.assignments):
            if assignment.node in done:
                continue
            name = self._problem.node(assignment.node).model.name
            machine_of = self._problem.cluster.machine_of
            new = tuple(d for d in assignment.devices if (name, machine_of(d)) not in self._there_s)
            if new:
                self.read_ahead(name, new, now_s)
                begun.append((assignment.node, new))
        return begun

    def read_ahead(self, checkpoint: str, devices: Sequence[int], now_s: float) -> None:
        """Have the machines of some devices read a checkpoint from now on."""
        reading_s = self._problem.reading_s(checkpoint)
        for machine in self._machines(devices):
            self._read(checkpoint, machine, now_s, reading_s)

    def _machines(self, devices: Sequence[int]) -> list[int]:
        return list(dict.fromkeys(map(self._problem.cluster.machine_of, devices)))

    def _read(self, name: str, machine: int, began_s: float, reading_s: float) -> float:
        """Return when a checkpoint is in a machine's memory for who asks for it at ``began_s``."""
        if self._problem.page_cache == "warm":
            self._there_s[name, machine] = began_s
            return began_s
        there_s = self._there_s.get((name, machine))
        if there_s is None:
            there_s = max(began_s, self._free_s.get(machine, 0.0)) + reading_s
            self._there_s[name, machine] = there_s
            self._free_s[machine] = there_s
        return max(began_s, there_s)
