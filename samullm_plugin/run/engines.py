"""Starts and stops the engines of nodes and keeps account of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from samullm_plugin.host.interfaces.executor import EngineSpec, Executor
from samullm_plugin.host.interfaces.moving import move_rule
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment
from samullm_plugin.model.problem import Problem
from samullm_plugin.rules.page_cache import PageCaches
from samullm_plugin.rules.sleeping import Asleep
from samullm_plugin.rules.transition import Running
from samullm_plugin.run.dispatch import Deployment, Replica
from samullm_plugin.run.log import RunLog
from samullm_plugin.simulator.requests import NodeInputs
from samullm_plugin.simulator.runs import PolicyCall


@dataclass(frozen=True, slots=True)
class PreparedEngines:
    """A node's engines that are prepared before they have devices.

    Attributes:
        assignment: what they are for.
        keys: of the replicas.
        since_s: when that began, on the run's clock.
    """

    assignment: Assignment
    keys: tuple[str, ...]
    since_s: float


@dataclass(frozen=True, slots=True)
class SleepingEngines:
    """Engines that sleep.

    Attributes:
        keys: of the replicas.
        from_s: when the plan's figures have them sleep, on the run's clock.
    """

    keys: tuple[str, ...]
    from_s: float


class Engines:
    """The engines that hold devices, those that are prepared before they do, and those that sleep.

    Attributes:
        deployments: by node, those that hold devices.
        prepared: by node name, those that are prepared.
        asleep: those that sleep, in the order in which they began.
        lost: devices that no engine may be started on.
        caches: what machines have read.
    """

    def __init__(
        self,
        problem: Problem,
        executor: Executor,
        inputs: Sequence[NodeInputs],
        log: RunLog,
        policies: Sequence[PolicyCall | None],
    ) -> None:
        """Begin with none.

        Args:
            problem: the instance.
            executor: starts them.
            inputs: per node, what its requests wait for.
            log: where events are recorded.
            policies: by node, its request policy; engines of nodes that have one run by priority.
        """
        self.deployments: dict[int, Deployment] = {}
        self.prepared: dict[str, PreparedEngines] = {}
        self.asleep: dict[Asleep, SleepingEngines] = {}
        self.lost: set[int] = set()
        self.caches = PageCaches(problem)
        self._problem, self._executor, self._inputs, self._log = problem, executor, inputs, log
        self._policies = policies
        self._by_key: dict[str, tuple[Deployment, Replica]] = {}
        self._nodes: dict[str, int] = {}
        self._starts = [0] * len(problem.app.nodes)

    def find(self, key: str) -> tuple[Deployment, Replica] | None:
        """Return an engine that has not been stopped."""
        return self._by_key.get(key)

    def node_of(self, key: str) -> int | None:
        """Return the node of an engine of this run, stopped or not."""
        return self._nodes.get(key)

    def start(self, running: Running, now_s: float, wakes: Asleep | None = None) -> None:
        """Begin to start a node's engines.

        Args:
            running: they.
            now_s: the clock.
            wakes: engines that wake for it instead.
        """
        node = self._problem.app.index(running.planned.node)
        deployment = Deployment(node, running, self._inputs[node], now_s)
        self.deployments[node] = deployment
        actual = Assignment(running.planned.node, running.planned.parallel, running.devices)
        known = self.prepared.pop(running.planned.node, None)
        if known is not None and known.assignment.parallel != running.planned.parallel:
            self._discard(known.keys)
            known = None
        if known is not None and wakes is not None:
            self._discard(known.keys)
            known = None
        keys = self._new_keys(actual) if known is None else known.keys
        since_s = None if known is None else known.since_s
        if wakes is not None:
            self._wake(deployment, keys, wakes, now_s)
            return
        for key, devices in zip(keys, actual.replicas(), strict=True):
            self._start_replica(deployment, key, devices, now_s, since_s)

    def _wake(
        self, deployment: Deployment, keys: Sequence[str], wakes: Asleep, now_s: float
    ) -> None:
        """Wake engines for a node, each on its devices."""
        planned = deployment.running.planned
        after, free_s = self._before(wakes.devices, now_s)
        slept = self.asleep.pop(wakes)
        wake_s = wakes.load(self._problem).wake_s or 0.0
        for key, old, devices in zip(keys, slept.keys, wakes.replicas(), strict=True):
            spec = self._spec(key, planned, devices)
            spec = replace(spec, after=tuple(k for k in after if k not in slept.keys))
            window = self._executor.window_of(spec)
            ready_s = free_s + wake_s
            replica = Replica(key, devices, now_s, ready_s, window, prepared=True, woken=True)
            self._add(deployment, replica, now_s, wakes=old)
            self._executor.wake_engine(old, spec)

    def _before(self, devices: Iterable[int], now_s: float) -> tuple[tuple[str, ...], float]:
        """Return the engines on some devices that sleep, and when the last of them do."""
        mine = set(devices)
        held = [e for a, e in self.asleep.items() if not mine.isdisjoint(a.devices)]
        return tuple(k for e in held for k in e.keys), max((now_s, *(e.from_s for e in held)))

    def put_to_sleep(self, deployment: Deployment, asleep: Asleep, now_s: float) -> bool:
        """Let a node's engines fall asleep, all of them or none.

        Returns:
            Whether they do; if not, they are to be stopped, which makes them end.
        """
        there = {r.devices: r.key for r in deployment.replicas}
        keys = tuple(there[d] for d in asleep.replicas() if d in there)
        if len(keys) < asleep.parallel.data_parallel_size:  # one has failed for good
            return False
        if not all(self._executor.sleep_engine(k) for k in keys):
            return False
        from_s = now_s + (asleep.load(self._problem).sleep_s or 0.0)
        self.asleep[asleep] = SleepingEngines(keys, from_s)
        for replica in list(deployment.replicas):
            self.forget(deployment, replica, now_s, finished=True, asleep=True)
        del self.deployments[deployment.node]
        return True

    def end_sleep(self, ended: Iterable[Asleep]) -> None:
        """Stop engines that sleep."""
        for asleep in ended:
            self._discard(self.asleep.pop(asleep).keys)

    def take_over(self, running: Running, now_s: float) -> None:
        """Let the engines of a node that has finished go on as those of another."""
        before = self.deployments.pop(self._problem.app.index(str(running.takes_over)))
        node = self._problem.app.index(running.planned.node)
        if (known := self.prepared.pop(running.planned.node, None)) is not None:
            self._discard(known.keys)
        deployment = Deployment(node, running, self._inputs[node], now_s)
        self.deployments[node] = deployment
        actual = Assignment(running.planned.node, running.planned.parallel, running.devices)
        for key, old in zip(self._new_keys(actual), list(before.replicas), strict=True):
            self._executor.pass_on_engine(old.key, self._spec(key, running.planned, old.devices))
            self.forget(before, old, now_s, finished=True)
            replica = Replica(key, old.devices, now_s, now_s, old.window, now_s)
            self._add(deployment, replica, now_s, takes_over=old.key)
            self.note_ready(deployment, replica, now_s)

    def _new_keys(self, assignment: Assignment) -> tuple[str, ...]:
        node = self._problem.app.index(assignment.node)
        number = self._starts[node]
        self._starts[node] += 1
        count = assignment.parallel.data_parallel_size
        return tuple(f"{assignment.node}.{number}.{i}" for i in range(count))

    def prepare(self, wanted: Sequence[Assignment], now_s: float) -> None:
        """Have the engines of these assignments prepared from now on, and no others."""
        parallel = {a.node: a.parallel for a in wanted}
        for name, known in list(self.prepared.items()):
            if parallel.get(name) != known.assignment.parallel:
                self._discard(self.prepared.pop(name).keys)
        for assignment in wanted:
            if assignment.node not in self.prepared:
                self._prepare(assignment, now_s)

    def _prepare(self, assignment: Assignment, now_s: float) -> None:
        """Have the engines of an assignment prepared, all of them or none."""
        keys = self._new_keys(assignment)
        for i, (key, devices) in enumerate(zip(keys, assignment.replicas(), strict=True)):
            if not self._executor.prepare_engine(self._spec(key, assignment, devices)):
                self._discard(keys[:i])
                return
            self._log.add(now_s, "engine_preparing", key=key, node=assignment.node)
        model = self._problem.node(assignment.node).model
        self.caches.read_ahead(model.name, assignment.devices, now_s)
        self.prepared[assignment.node] = PreparedEngines(assignment, keys, now_s)

    def note_unprepared(self, key: str, time_s: float, reason: str) -> bool:
        """Note that an engine without a node has failed: its start begins at the beginning.

        Returns:
            Whether it was being prepared, or slept.
        """
        for asleep, slept in self.asleep.items():
            if key in slept.keys:
                name = self._problem.app.nodes[self._nodes[key]].name
                self._log.add(time_s, "engine_asleep_failed", key=key, node=name, reason=reason)
                self.end_sleep([asleep])
                return True
        for name, known in self.prepared.items():
            if key in known.keys:
                self._log.add(time_s, "engine_preparing_failed", key=key, node=name, reason=reason)
                self._discard(self.prepared.pop(name).keys)
                return True
        return False

    def _discard(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._executor.stop_engine(key)

    def _spec(self, key: str, assignment: Assignment, devices: tuple[int, ...]) -> EngineSpec:
        parallel, node = assignment.parallel, self._problem.app.index(assignment.node)
        costs = self._problem.mode(node, parallel, devices)
        return EngineSpec(
            key,
            node,
            self._problem.app.nodes[node].model,
            devices,
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            costs.kv_cache_tokens,
            "fcfs" if self._policies[node] is None else "priority",
            costs,
        )

    def _start_replica(
        self,
        deployment: Deployment,
        key: str,
        devices: tuple[int, ...],
        now_s: float,
        since_s: float | None = None,
    ) -> None:
        planned = deployment.running.planned
        parallel = planned.parallel
        after, free_s = self._before(deployment.running.devices, now_s)
        spec = replace(self._spec(key, planned, devices), after=after)
        costs = self._problem.mode(deployment.node, parallel, devices)
        ready_s = self.caches.ready_s(deployment.node, costs, devices, free_s, since_s)
        window = self._executor.window_of(spec)
        part = since_s is not None or free_s > now_s
        replica = Replica(key, devices, now_s, ready_s, window, prepared=part)
        self._add(deployment, replica, now_s)
        self._executor.start_engine(spec)

    def _add(
        self,
        deployment: Deployment,
        replica: Replica,
        now_s: float,
        *,
        takes_over: str | None = None,
        wakes: str | None = None,
    ) -> None:
        """Note that an engine is started, taken over from another node, or wakes."""
        deployment.replicas.append(replica)
        self._by_key[replica.key] = (deployment, replica)
        self._nodes[replica.key] = deployment.node
        self._log.add(
            now_s,
            "engine_started",
            key=replica.key,
            node=deployment.running.planned.node,
            devices=replica.devices,
            parallel=str(deployment.running.planned.parallel),
            stage=deployment.running.stage,
            **({} if takes_over is None else {"takes_over": takes_over}),
            **({} if wakes is None else {"wakes": wakes}),
        )

    def note_ready(self, deployment: Deployment, replica: Replica, time_s: float) -> None:
        """Note that an engine can serve."""
        replica.ready_s = time_s
        name = deployment.running.planned.node
        taken_over = deployment.running.takes_over is not None and replica.started_s == time_s
        self._log.add(
            time_s,
            "engine_ready",
            key=replica.key,
            node=name,
            load_s=time_s - replica.started_s,
            planned_load_s=replica.planned_s - replica.started_s,
            parts=(
                {} if taken_over or replica.woken else dict(self._executor.start_parts(replica.key))
            ),
            **({"woken": True} if replica.woken else {}),
        )

    def note_stopped(self, deployment: Deployment, now_s: float, *, finished: bool) -> None:
        """Note that all engines of a node have been stopped."""
        for replica in list(deployment.replicas):
            self.forget(deployment, replica, now_s, finished=finished)
        del self.deployments[deployment.node]

    def forget(
        self,
        deployment: Deployment,
        replica: Replica,
        now_s: float,
        *,
        finished: bool,
        asleep: bool = False,
    ) -> None:
        """Note that one engine has been stopped, or sleeps."""
        replica.note_busy(now_s)
        deployment.drop(replica)
        del self._by_key[replica.key]
        self._log.add(
            now_s,
            "engine_stopped",
            key=replica.key,
            node=deployment.running.planned.node,
            busy_s=replica.busy_s,
            num_finished=replica.num_finished,
            node_finished=finished,
            **({"asleep": True} if asleep else {}),
        )

    def restart(self, deployment: Deployment, replica: Replica, now_s: float) -> None:
        """Start an engine in place of one that has failed, on other free devices if there are."""
        running = deployment.running
        parallel = ParallelConfig(
            1,
            running.planned.parallel.tensor_parallel_size,
            running.planned.parallel.pipeline_parallel_size,
        )
        self.forget(deployment, replica, now_s, finished=False)
        deployment.avoid |= set(replica.devices)
        free = set(range(self._problem.cluster.num_gpus))
        for other in self.deployments.values():
            free -= set(other.running.devices)
        free |= set(replica.devices)
        free -= self.lost
        fitting = self._problem.fitting_devices(deployment.node, parallel, free)
        devices = self._problem.cluster.find_devices(fitting, parallel, avoid=deployment.avoid)
        if devices is None:
            devices = replica.devices
        held = list(running.devices)
        at = held.index(replica.devices[0])
        held[at : at + len(replica.devices)] = devices
        deployment.running = replace(running, devices=tuple(held))
        name = running.planned.node
        key = f"{name}.{self._starts[deployment.node]}.r"
        self._starts[deployment.node] += 1
        self._start_replica(deployment, key, devices, now_s)

    def drop(self, deployment: Deployment, replicas: Sequence[Replica], now_s: float) -> None:
        """Forget replicas whose devices are lost; the node goes on with those that are left."""
        for replica in replicas:
            self.forget(deployment, replica, now_s, finished=False)
        if not deployment.replicas:
            del self.deployments[deployment.node]
            return
        planned = deployment.running.planned
        sizes = replace(planned.parallel, data_parallel_size=len(deployment.replicas))
        devices = tuple(d for r in deployment.replicas for d in r.devices)
        assignment = Assignment(planned.node, sizes, devices)
        deployment.running = replace(deployment.running, planned=assignment, devices=devices)

    def barred(self, node: int) -> bool:
        """Return whether a node's engines have requests that do not survive being stopped."""
        deployment = self.deployments[node]
        return any(
            move_rule(request.sampling) == "bar"
            for replica in deployment.replicas
            for request in replica.outstanding.values()
        )
