"""Machines, their GPUs and which of them a replica may use together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from samullm_plugin.errors import InputError
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.replica_places import Place, take_replicas


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of device.

    Attributes:
        name: as latency profiles name it, such as ``A100-80GB``.
        memory_bytes: device memory in bytes; of a GPU that engines share, of one engine's part.
        engines: that share such a GPU; each of its parts is a device.
        slowdown: factor on iterations on a GPU that engines share.
    """

    name: str
    memory_bytes: int
    engines: int = 1
    slowdown: float = 1.0

    @property
    def is_core(self) -> bool:
        """Return whether it is a CPU core, by its name."""
        return re.search(r"cpu|core", self.name.lower()) is not None


@dataclass(frozen=True, slots=True)
class Network:
    """What joins the machines of a cluster.

    Attributes:
        bytes_per_s: from one machine to another.
        latency_s: seconds until the first byte is there.
    """

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """The devices a plan may use; a device is its index in ``gpus``.

    Attributes:
        gpus: kind of each device.
        nvlink_groups: disjoint sets of devices joined by NVLink. The devices of a tensor-parallel
            replica must lie within one of them. Devices in no group form groups of one.
        machines: disjoint sets of devices, one per machine, covering all.
        host_memory_bytes: memory of each machine's host; None: taken to be that of its devices
            together.
        network: joins the machines, so that the pipeline stages of a replica that has room on none
            may lie on several (:meth:`machines_per_replica`); None: every replica lies on one.
        cards: disjoint sets of devices that are parts of one GPU; devices in no set are whole ones.
        kinds: label of each device's kind: its name, its memory too where devices of one name
            differ in it, and how many engines share it. What a replica costs depends on it.
    """

    gpus: tuple[Gpu, ...]
    nvlink_groups: tuple[tuple[int, ...], ...] = ()
    machines: tuple[tuple[int, ...], ...] = ()
    host_memory_bytes: int | None = None
    network: Network | None = None
    cards: tuple[tuple[int, ...], ...] = ()
    kinds: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _place: tuple[Place, ...] = field(init=False, repr=False, compare=False)
    _card: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _places: dict[Gpu, dict[Place, list[int]]] = field(init=False, repr=False, compare=False)
    _replicas: dict[tuple[str, int, int], list[int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _whole: Cluster | None = field(default=None, init=False, repr=False, compare=False)
    _spread: dict[tuple[str, int, int], int] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        for kind in ("nvlink_groups", "machines", "cards"):
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
            if kind != "machines" and rest:
                completed = (*getattr(self, kind), *((d,) for d in rest))
                object.__setattr__(self, kind, tuple(sorted(tuple(sorted(g)) for g in completed)))
            elif kind == "machines" and not self.machines:
                object.__setattr__(self, kind, (tuple(every),))
            elif rest:
                raise InputError(f"cluster: {kind} leaves out device {rest[0]}")
        labels = {gpu: self._label(gpu, set(self.gpus)) for gpu in set(self.gpus)}
        object.__setattr__(self, "kinds", tuple(labels[gpu] for gpu in self.gpus))
        machine, group = (
            {d: i for i, members in enumerate(sets) for d in members}
            for sets in (self.machines, self.nvlink_groups)
        )
        card = {d: i for i, parts in enumerate(self.cards) for d in parts}
        place = tuple((machine[d], group[d]) for d in every)
        places: dict[Gpu, dict[Place, list[int]]] = {}
        for device, gpu in enumerate(self.gpus):
            places.setdefault(gpu, {}).setdefault(place[device], []).append(device)
        object.__setattr__(self, "_place", place)
        object.__setattr__(self, "_card", tuple(card[d] for d in every))
        object.__setattr__(self, "_places", places)
        for kind in ("nvlink_groups", "cards"):
            for members in getattr(self, kind):
                if len({machine[d] for d in members}) > 1:
                    raise InputError(
                        f"cluster: {kind} joins devices {list(members)}, which are on several "
                        "machines; they must be on one"
                    )

    @staticmethod
    def _label(gpu: Gpu, kinds: Collection[Gpu]) -> str:
        """Return what tells a kind of GPU from the others of the cluster."""
        alike = [o for o in kinds if (o.name, o.engines) == (gpu.name, gpu.engines)]
        label = gpu.name
        if len({other.memory_bytes for other in alike}) > 1:
            label += f" with {_exact(gpu.memory_bytes / 2**30)} GiB"
        if gpu.engines > 1:
            label += f" shared by {gpu.engines} (x {_exact(gpu.slowdown)})"
        return label

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

    @property
    def size_text(self) -> str:
        """Return how many GPUs there are, for people."""
        devices = f" ({len(self.gpus)} devices)" if self.cards_if_shared else ""
        return f"{len(self.cards)} GPUs{devices}"

    def group_of(self, device: int) -> tuple[int, ...]:
        """Return the NVLink group of a device."""
        return self.nvlink_groups[self._place[device][1]]

    def machine_of(self, device: int) -> int:
        """Return the index of the machine of a device."""
        return self._place[device][0]

    def card_of(self, device: int) -> int:
        """Return the index of the GPU that a device is, or is a part of."""
        return self._card[device]

    def host_bytes(self, machine: int) -> int:
        """Return the memory of a machine's host."""
        if self.host_memory_bytes is not None:
            return self.host_memory_bytes
        return sum(self.gpus[d].memory_bytes for d in self.machines[machine])

    @property
    def machines_if_several(self) -> tuple[tuple[int, ...], ...]:
        """Return the machines, for tables that name them; nothing if there is only one."""
        return self.machines if len(self.machines) > 1 else ()

    @property
    def cards_if_shared(self) -> tuple[tuple[int, ...], ...]:
        """Return the devices of each GPU, for texts that name them; nothing if all are whole."""
        return self.cards if len(self.cards) < len(self.gpus) else ()

    @property
    def device_word(self) -> str:
        """Return what a device is called: a GPU, if none is a part of one."""
        return "device" if self.cards_if_shared else "GPU"

    def subset(self, devices: Sequence[int]) -> Cluster:
        """Return the cluster of some of the devices, which are renumbered in their order.

        What replicas cost is the same as here: kinds keep their labels, and replicas of a size lie
        on as many machines.

        Raises:
            InputError: if there are none.
        """
        some = self._some(devices)
        object.__setattr__(some, "kinds", tuple(self.kinds[d] for d in devices))
        object.__setattr__(some, "_whole", self._whole or self)
        return some

    def _some(self, devices: Sequence[int]) -> Cluster:
        new = {d: i for i, d in enumerate(devices)}

        def kept(sets: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
            parts = (tuple(new[d] for d in members if d in new) for members in sets)
            return tuple(p for p in parts if p)

        gpus = tuple(self.gpus[d] for d in devices)
        groups, machines, cards = map(kept, (self.nvlink_groups, self.machines, self.cards))
        return Cluster(gpus, groups, machines, self.host_memory_bytes, self.network, cards)

    def with_gpus(self, count: int) -> Cluster:
        """Return so many GPUs: machine after machine, and from the first again.

        Raises:
            InputError: if there are none.
        """
        copies = range(-(-count // len(self.cards)))

        def repeated(sets: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(c * self.num_gpus + d for d in s) for c in copies for s in sets)

        several = Cluster(
            self.gpus * len(copies),
            repeated(self.nvlink_groups),
            repeated(self.machines),
            self.host_memory_bytes,
            self.network,
            repeated(self.cards),
        )
        devices = [d for m in several.machines for d in m]
        taken = set(list(dict.fromkeys(map(several.card_of, devices)))[:count])
        return several._some([d for d in devices if several.card_of(d) in taken])

    def replica_violation(self, devices: Sequence[int], tensor_parallel_size: int) -> str | None:
        """Return why these devices cannot carry one replica, or None if they can.

        Args:
            devices: devices of the replica, one run of ``tensor_parallel_size`` per pipeline stage.
            tensor_parallel_size: devices per pipeline stage.
        """
        stages = len(devices) // tensor_parallel_size
        count = self.machines_per_replica(self.kinds[devices[0]], tensor_parallel_size, stages)
        step = len(devices) // count
        machines = [self._place[d][0] for d in devices]
        parts = [set(machines[i * step : (i + 1) * step]) for i in range(count)]
        if any(len(p) > 1 for p in parts) or len(set(machines)) < count:
            if count == 1:
                return f"devices {list(devices)} lie on several machines"
            return (
                f"devices {list(devices)} do not lie on {count} machines with {stages // count} "
                "pipeline stages on each"
            )
        if len({self.kinds[d] for d in devices}) > 1:
            return f"devices {list(devices)} are of different kinds"
        if len({self._card[d] for d in devices}) < len(devices):
            return f"devices {list(devices)} are parts of one GPU"
        for first in range(0, len(devices), tensor_parallel_size):
            part = devices[first : first + tensor_parallel_size]
            if len({self._place[d] for d in part}) > 1:
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
        if parallel.num_devices > len(free):
            return None
        return FreeDevices(self, free).take(parallel, avoid=avoid)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle all but what is kept between questions, which is asked again.

        Python before 3.11.4 passes over ``__getstate__`` of dataclasses with slots.
        """
        kept = ("_replicas", "_spread")
        return _unpickled, (
            {f.name: {} if f.name in kept else getattr(self, f.name) for f in fields(self)},
        )

    def machines_per_replica(
        self, kind: str, tensor_parallel_size: int, pipeline_parallel_size: int
    ) -> int:
        """Return on how many machines each replica of a size lies, equally many stages on each.

        One, if any machine has room for it; else as few as can be, if there is a network.
        """
        stages, whole = pipeline_parallel_size, self._whole or self
        if self.network is None or stages == 1:
            return 1
        key = kind, tensor_parallel_size, stages
        if key not in self._spread:
            parts = whole._parts_by_machine(kind, tensor_parallel_size)
            counts = (
                count
                for count in range(1, stages + 1)
                if stages % count == 0 and sum(p >= stages // count for p in parts) >= count
            )
            self._spread[key] = next(counts, 1)
        return self._spread[key]

    def _parts_by_machine(self, kind: str, tensor_parallel_size: int) -> list[int]:
        """Return by machine how many tensor-parallel groups its idle devices of a kind carry."""
        groups = Counter(p for p, k in zip(self._place, self.kinds, strict=True) if k == kind)
        parts = [0] * len(self.machines)
        for (machine, _), count in groups.items():
            parts[machine] += count // tensor_parallel_size
        return parts

    def replicas_by_machine(
        self, kind: str, tensor_parallel_size: int, pipeline_parallel_size: int
    ) -> list[int]:
        """Return by machine how many replicas its devices of a kind carry when they are idle.

        Of replicas that lie on several machines it is a 1 for each that the cluster carries.
        """
        key = kind, tensor_parallel_size, pipeline_parallel_size
        if key not in self._replicas:
            parts, count = self._parts_by_machine(*key[:2]), self.machines_per_replica(*key)
            found = [p // (pipeline_parallel_size // count) for p in parts]
            if count > 1:  # no replica has two of its parts on one machine
                most = sum(found) // count
                while sum(min(n, most) for n in found) < most * count:
                    most -= 1
                found = [1] * most
            self._replicas[key] = found
        return self._replicas[key]


def _exact(value: float) -> str:
    """Return a number with as many digits as tell it from every other one."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _unpickled(state: Mapping[str, object]) -> Cluster:
    """Return a cluster with all its fields as they are given."""
    cluster = object.__new__(Cluster)
    for name, value in state.items():
        object.__setattr__(cluster, name, value)
    return cluster


class FreeDevices:
    """Devices that nobody holds, taken and given back as plans are made.

    Attributes:
        count: how many there are.
    """

    def __init__(self, cluster: Cluster, free: Collection[int]) -> None:
        """Begin with some devices of a cluster."""
        free = set(free)
        self._cluster = cluster
        self._by_kind: dict[str, dict[Place, list[int]]] = {}
        for places in cluster._places.values():
            kind = cluster.kinds[next(iter(places.values()))[0]]
            self._by_kind[kind] = {p: [d for d in of if d in free] for p, of in places.items()}
        self.count = len(free)

    def take(
        self,
        parallel: ParallelConfig,
        *,
        avoid: Collection[int] = (),
        kinds: Collection[str] | None = None,
    ) -> tuple[int, ...] | None:
        """Take devices of one kind for all replicas of a model, or none if there are too few.

        See :meth:`Cluster.find_devices`.

        Args:
            parallel: sizes to place.
            avoid: free devices to take only if no others do.
            kinds: labels of the kinds that may be taken; None: all.
        """
        tp, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        parts = parallel.data_parallel_size * stages
        for kind, places in self._by_kind.items():
            if kinds is not None and kind not in kinds:
                continue
            if sum([len(members) // tp for members in places.values()]) < parts:
                continue
            tried = places if stages == 1 else dict(places)
            machines = self._cluster.machines_per_replica(kind, tp, stages)
            chosen = take_replicas(tried, parallel, set(avoid), machines)
            if chosen is not None:
                self._by_kind[kind] = tried
                self.count -= len(chosen)
                return chosen
        return None

    def copy(self) -> FreeDevices:
        """Return an independent copy."""
        new = object.__new__(FreeDevices)
        new._cluster, new.count = self._cluster, self.count
        new._by_kind = {kind: dict(places) for kind, places in self._by_kind.items()}
        return new

    def put(self, devices: Collection[int]) -> None:
        """Give devices back."""
        for device in devices:
            places = self._by_kind[self._cluster.kinds[device]]
            place = self._cluster._place[device]
            places[place] = sorted((*places[place], device))
        self.count += len(devices)

    def remove(self, devices: Collection[int]) -> None:
        """Take these very devices, which must be free."""
        for device in devices:
            places = self._by_kind[self._cluster.kinds[device]]
            place = self._cluster._place[device]
            places[place] = [d for d in places[place] if d != device]
        self.count -= len(devices)
