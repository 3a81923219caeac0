"""Machines, their GPUs and which of them a replica may use together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from samullm_plugin.core.parallel import ParallelConfig
from samullm_plugin.errors import InputError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of device.

    Attributes:
        name: as latency profiles name it, such as ``A100-80GB``.
        memory_bytes: device memory in bytes.
    """

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """The devices a plan may use; a device is its index in ``gpus``.

    Attributes:
        gpus: kind of each device.
        nvlink_groups: disjoint sets of devices joined by NVLink. The devices of a tensor-parallel
            replica must lie within one of them. Devices in no group form groups of one.
        machines: disjoint sets of devices, one per machine, covering all. A replica, with all its
            pipeline stages, lies on one machine.
    """

    gpus: tuple[Gpu, ...]
    nvlink_groups: tuple[tuple[int, ...], ...] = ()
    machines: tuple[tuple[int, ...], ...] = ()
    _group_index: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _machine_index: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Complete the groups and refuse impossible ones.

        Raises:
            InputError: naming the field and the device.
        """
        if not self.gpus:
            raise InputError("cluster: gpus is empty; a plan needs at least one GPU")
        for gpu in self.gpus:
            if gpu.memory_bytes <= 0:
                raise InputError(f"cluster: memory of GPU {gpu.name} must be positive")
        every = range(len(self.gpus))
        for kind in ("nvlink_groups", "machines"):
            seen: set[int] = set()
            for group in getattr(self, kind):
                for device in group:
                    if device not in every:
                        raise InputError(
                            f"cluster: {kind} names device {device}; "
                            f"there are devices 0 to {len(self.gpus) - 1}"
                        )
                    if device in seen:
                        raise InputError(f"cluster: {kind} names device {device} twice")
                    seen.add(device)
            rest = [d for d in every if d not in seen]
            if kind == "nvlink_groups" and rest:
                completed = (*self.nvlink_groups, *((d,) for d in rest))
                object.__setattr__(self, kind, tuple(sorted(tuple(sorted(g)) for g in completed)))
            elif kind == "machines" and not self.machines:
                object.__setattr__(self, kind, (tuple(every),))
            elif rest:
                raise InputError(f"cluster: {kind} leaves out device {rest[0]}")
        for name, sets in (("_group_index", self.nvlink_groups), ("_machine_index", self.machines)):
            index = {d: i for i, members in enumerate(sets) for d in members}
            object.__setattr__(self, name, tuple(index[d] for d in every))

    @classmethod
    def uniform(cls, gpu: Gpu, num_gpus: int, *, nvlink: int = 1) -> Cluster:
        """Return one machine of equal GPUs in NVLink groups of ``nvlink`` neighbours.

        Raises:
            InputError: if ``num_gpus`` is below one.
        """
        if num_gpus < 1:
            raise InputError(f"cluster: {num_gpus} GPUs; a plan needs at least one GPU")
        groups = tuple(
            tuple(range(first, min(first + nvlink, num_gpus)))
            for first in range(0, num_gpus, nvlink)
        )
        return cls((gpu,) * num_gpus, groups)

    @property
    def num_gpus(self) -> int:
        """Return the number of devices."""
        return len(self.gpus)

    def group_of(self, device: int) -> tuple[int, ...]:
        """Return the NVLink group of a device."""
        return self.nvlink_groups[self._group_index[device]]

    def machine_of(self, device: int) -> int:
        """Return the index of the machine of a device."""
        return self._machine_index[device]

    def replica_violation(self, devices: Sequence[int], tensor_parallel_size: int) -> str | None:
        """Return why these devices cannot carry one replica, or None if they can.

        Args:
            devices: devices of the replica, one run of ``tensor_parallel_size`` per pipeline stage.
            tensor_parallel_size: devices per pipeline stage.
        """
        if len({self._machine_index[d] for d in devices}) > 1:
            return f"devices {list(devices)} lie on several machines"
        if len({self.gpus[d].name for d in devices}) > 1:
            return f"devices {list(devices)} are of different kinds"
        for first in range(0, len(devices), tensor_parallel_size):
            part = devices[first : first + tensor_parallel_size]
            if len({self._group_index[d] for d in part}) > 1:
                return f"devices {list(part)} are not in one NVLink group"
        return None

    def find_devices(
        self, free: Collection[int], parallel: ParallelConfig, *, avoid: Collection[int] = ()
    ) -> tuple[int, ...] | None:
        """Return free devices of one kind for all replicas of a model, or None if there are none.

        Groups that are left with the fewest free devices are filled first, so that large groups
        stay whole for models that need them.

        Args:
            free: devices nobody holds.
            parallel: sizes to place.
            avoid: free devices to take only if no others do.
        """
        kinds = dict.fromkeys(self.gpus[d] for d in sorted(free))
        for kind in kinds:
            alike = {d for d in free if self.gpus[d] == kind}
            chosen = self._replicas(alike, parallel, set(avoid))
            if chosen is not None:
                return chosen
        return None

    def idle_devices(self, parallel: ParallelConfig) -> tuple[int, ...] | None:
        """Return :meth:`find_devices` with every device free."""
        return _idle_devices(self, parallel)

    def _replicas(
        self, left: set[int], parallel: ParallelConfig, shunned: set[int]
    ) -> tuple[int, ...] | None:
        """Return devices among ``left``, which are of one kind, for all replicas."""
        tp = parallel.tensor_parallel_size
        chosen: list[int] = []
        for _ in range(parallel.data_parallel_size):
            replica: list[int] = []
            for _ in range(parallel.pipeline_parallel_size):
                part = self._part(left, shunned, tp, replica)
                if part is None:
                    return None
                replica += part
                left -= set(part)
            chosen += replica
        return tuple(chosen)

    def _part(
        self, left: set[int], shunned: set[int], tp: int, replica: Sequence[int]
    ) -> list[int] | None:
        """Return ``tp`` devices of one group for the next pipeline stage of ``replica``."""
        best: tuple[tuple[int, int, int], list[int]] | None = None
        for group in self.nvlink_groups:
            members = [d for d in group if d in left]
            if replica:
                home = self.machine_of(replica[0])
                members = [d for d in members if self.machine_of(d) == home]
            if len(members) < tp:
                continue
            if shunned:
                members.sort(key=lambda d: (d in shunned, d))
            part = members[:tp]
            key = (sum(d in shunned for d in part) if shunned else 0, len(members), part[0])
            if best is not None and key >= best[0]:
                continue
            if self.replica_violation(part, tp):
                continue
            best = (key, part)
            if key[:2] == (0, tp):  # nothing fits better, and groups come in order
                break
        return None if best is None else best[1]


@lru_cache(maxsize=4096)
def _idle_devices(cluster: Cluster, parallel: ParallelConfig) -> tuple[int, ...] | None:
    return cluster.find_devices(range(cluster.num_gpus), parallel)
