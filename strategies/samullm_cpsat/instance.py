"""The scheduling instance a solver sees: whole numbers only, no requests, no latencies.

All times are ticks; durations are rounded up when an instance is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from samullm_plugin import Cluster, InputError, ParallelConfig

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run a task.

    Attributes:
        parallel: parallel sizes.
        load: ticks of an engine start.
        duration: ticks of the whole task, engine start included, all inputs being there.
        gpu: name of the kind of device.
        machines: on how many each replica lies, equally many stages on each.
    """

    parallel: ParallelConfig
    load: int
    duration: int
    gpu: str = ""
    machines: int = 1

    def __post_init__(self) -> None:
        """Refuse impossible durations.

        Raises:
            InputError: naming the mode.
        """
        if not 0 <= self.load <= self.duration or self.duration < 1:
            raise InputError(
                f"mode {self.parallel}: needs 0 <= load <= duration and duration >= 1, got "
                f"{self.load} and {self.duration} ticks"
            )

    @property
    def devices(self) -> int:
        """Return the devices it holds."""
        return self.parallel.num_devices

    @property
    def stages_together(self) -> int:
        """Return the pipeline stages of a replica that lie on one machine."""
        return self.parallel.pipeline_parallel_size // self.machines

    @property
    def work(self) -> int:
        """Return the ticks without the engine start."""
        return self.duration - self.load


@dataclass(frozen=True, slots=True)
class Task:
    """One node of the application and its modes."""

    name: str
    modes: tuple[Mode, ...]


@dataclass(frozen=True, slots=True)
class Lag:
    """A consumer that may overlap its producer.

    Attributes:
        producer: index of a task.
        consumer: index of a task.
        tail: ticks the consumer still needs after the producer's end, by the producer's mode and
            the consumer's mode.
    """

    producer: int
    consumer: int
    tail: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """Interchangeable devices: of one kind, on one machine, joined by NVLink.

    Attributes:
        devices: device indices.
        gpu: name of their kind.
        machine: index of their machine.
    """

    devices: tuple[int, ...]
    gpu: str = ""
    machine: int = 0

    @property
    def alike(self) -> tuple[int, str, int]:
        """Return what pools that may be exchanged have in common."""
        return len(self.devices), self.gpu, self.machine


@dataclass(frozen=True, slots=True)
class Instance:
    """Tasks on pools of devices.

    Attributes:
        name: for people.
        tasks: what has to be run.
        lags: what waits for what; acyclic.
        pools: disjoint sets of devices.
        tick_s: seconds of a tick.
    """

    name: str
    tasks: tuple[Task, ...]
    lags: tuple[Lag, ...]
    pools: tuple[Pool, ...]
    tick_s: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a task that can run nowhere.

        Raises:
            InputError: naming the task.
        """
        for task in self.tasks:
            if not any(self.placeable(m) for m in task.modes):
                raise InputError(f"{task.name}: none of its modes fits on the devices")

    @property
    def num_devices(self) -> int:
        """Return the devices of all pools."""
        return sum(len(p.devices) for p in self.pools)

    def parts_in(self, mode: Mode, pool: Pool) -> int:
        """Return how many tensor-parallel groups of a mode a pool can hold at most."""
        if mode.gpu != pool.gpu:
            return 0
        return len(pool.devices) // mode.parallel.tensor_parallel_size

    def placeable(self, mode: Mode) -> bool:
        """Return whether the idle devices can carry the mode."""
        wanted, found = mode.parallel.data_parallel_size, 0
        for machine in {p.machine for p in self.pools}:
            parts = sum(self.parts_in(mode, p) for p in self.pools if p.machine == machine)
            # No replica has two of its parts on one machine.
            found += min(parts // mode.stages_together, wanted)
        return found >= wanted * mode.machines

    def producers(self, task: int) -> list[Lag]:
        """Return the lags towards a task."""
        return [lag for lag in self.lags if lag.consumer == task]

    def order(self) -> list[int]:
        """Return the tasks with producers before consumers.

        Raises:
            InputError: if the lags form a cycle.
        """
        done: list[int] = []
        while len(done) < len(self.tasks):
            ready = [
                i
                for i in range(len(self.tasks))
                if i not in done and all(lag.producer in done for lag in self.producers(i))
            ]
            if not ready:
                raise InputError(f"{self.name}: the tasks wait for each other in a cycle")
            done += ready
        return done

    def simplified(self, *, switching: bool = False) -> Instance:
        """Return an instance of equal optimum with fewer modes and pools.

        Modes that fit nowhere or that another mode makes superfluous are left out; pools are
        joined where no mode can tell them apart.

        Args:
            switching: tasks may change their mode.
        """
        reduced = self
        for i in range(len(self.tasks)):
            keep = _undominated(reduced, i, switching)
            reduced = reduced.with_modes(i, keep)
        single = all(
            m.parallel.devices_per_replica == 1 for task in reduced.tasks for m in task.modes
        )
        if not single:
            return reduced
        joined = {
            gpu: tuple(d for p in self.pools if p.gpu == gpu for d in p.devices)
            for gpu in dict.fromkeys(p.gpu for p in self.pools)
        }
        pools = tuple(Pool(tuple(sorted(devices)), gpu) for gpu, devices in joined.items())
        return Instance(self.name, reduced.tasks, reduced.lags, pools, self.tick_s)

    def with_modes(self, task: int, keep: Sequence[int]) -> Instance:
        """Return the instance with only these modes of a task."""
        tasks = list(self.tasks)
        tasks[task] = Task(tasks[task].name, tuple(tasks[task].modes[m] for m in keep))
        lags = []
        for lag in self.lags:
            tail = lag.tail
            if lag.producer == task:
                tail = tuple(tail[m] for m in keep)
            elif lag.consumer == task:
                tail = tuple(tuple(row[m] for m in keep) for row in tail)
            lags.append(Lag(lag.producer, lag.consumer, tail))
        return Instance(self.name, tuple(tasks), tuple(lags), self.pools, self.tick_s)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "format": FORMAT,
            "name": self.name,
            "tick_s": self.tick_s,
            "pools": [[list(p.devices), p.gpu, p.machine] for p in self.pools],
            "tasks": [
                {
                    "name": t.name,
                    "modes": [
                        [
                            m.parallel.data_parallel_size,
                            m.parallel.tensor_parallel_size,
                            m.parallel.pipeline_parallel_size,
                            m.load,
                            m.duration,
                            m.gpu,
                            m.machines,
                        ]
                        for m in t.modes
                    ],
                }
                for t in self.tasks
            ],
            "lags": [[lag.producer, lag.consumer, lag.tail] for lag in self.lags],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Instance:
        """Return the instance of plain data.

        Raises:
            InputError: if the format is not known.
        """
        if data.get("format") != FORMAT:
            raise InputError(f"instance: format {data.get('format')} is not {FORMAT}")
        return cls(
            data["name"],
            tuple(
                Task(
                    t["name"],
                    tuple(Mode(ParallelConfig(*m[:3]), *m[3:]) for m in t["modes"]),
                )
                for t in data["tasks"]
            ),
            tuple(Lag(p, c, tuple(tuple(row) for row in tail)) for p, c, tail in data["lags"]),
            tuple(Pool(tuple(d), gpu, machine) for d, gpu, machine in data["pools"]),
            data["tick_s"],
        )


def pools_of(cluster: Cluster) -> tuple[Pool, ...]:
    """Return the NVLink groups of a cluster, split by kind of device and by machine."""
    found: dict[tuple[int, str, int], list[int]] = {}
    for number, group in enumerate(cluster.nvlink_groups):
        for device in group:
            key = (number, cluster.kinds[device], cluster.machine_of(device))
            found.setdefault(key, []).append(device)
    return tuple(Pool(tuple(d), gpu, machine) for (_, gpu, machine), d in found.items())


def _undominated(instance: Instance, task: int, switching: bool) -> list[int]:
    """Return the modes of a task that no other mode of it makes superfluous."""
    modes = instance.tasks[task].modes
    left = [m for m in range(len(modes)) if instance.placeable(modes[m])]
    for m in sorted(left, key=lambda m: (-modes[m].devices, -modes[m].duration)):
        if any(o != m and _dominates(instance, task, o, m, switching) for o in left):
            left.remove(m)
    return left


def _dominates(instance: Instance, task: int, better: int, worse: int, switching: bool) -> bool:
    """Return whether ``better`` could stand in for ``worse`` in any schedule, at no loss.

    It must end no later, and so must each consumer: from the task's own start, from each of its
    producers' ends, and where the task may switch from any end.
    """
    a, b = instance.tasks[task].modes[better], instance.tasks[task].modes[worse]
    if a.duration > b.duration or a.load > b.load or a.work > b.work or not _fits_into(a, b):
        return False
    incoming = [row for lag in instance.producers(task) for row in lag.tail]
    if any(row[better] > row[worse] for row in incoming):
        return False
    for lag in instance.lags:
        if lag.producer != task:
            continue
        for x, y in zip(lag.tail[better], lag.tail[worse], strict=True):
            if a.duration + x > b.duration + y or (switching and x > y):
                return False
            if any(row[better] + x > row[worse] + y for row in incoming):
                return False
    return True


def _fits_into(a: Mode, b: Mode) -> bool:
    """Return whether wherever ``b`` can be placed ``a`` can be placed on some of its devices."""
    x, y = a.parallel, b.parallel
    if a.gpu != b.gpu:
        return False
    if x.pipeline_parallel_size > 1:
        return (
            x.pipeline_parallel_size == y.pipeline_parallel_size
            and a.machines == b.machines
            and x.tensor_parallel_size <= y.tensor_parallel_size
            and x.data_parallel_size <= y.data_parallel_size
        )
    parts = y.data_parallel_size * y.pipeline_parallel_size
    return parts * (y.tensor_parallel_size // x.tensor_parallel_size) >= x.data_parallel_size
