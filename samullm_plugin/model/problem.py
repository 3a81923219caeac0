"""The frozen instance a scheduler sees."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Literal

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application, ModelNode, ModelSpec
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.costs import LoadTimes, ModeCosts
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.kv_cache import blocks_per_sequence
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.scenarios import LengthScenario

EVERY_SIZE, NEXT_SIZE, EVEN_SHARES = 16, 1.15, 8
"""Up to how many replicas every number is offered; the least ratio of two numbers beyond; parts of
the cluster that are offered whatever their size."""


@dataclass(frozen=True, slots=True)
class ModeKey:
    """What the costs of one replica depend on besides the model.

    Attributes:
        gpu: label of the kind of GPU (:attr:`Cluster.kinds`).
        tensor_parallel_size: devices per layer.
        pipeline_parallel_size: groups of layers.
    """

    gpu: str
    tensor_parallel_size: int
    pipeline_parallel_size: int = 1

    @property
    def num_devices(self) -> int:
        """Return the devices of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def parallel(self, num_replicas: int) -> ParallelConfig:
        """Return the parallel sizes of so many replicas."""
        return ParallelConfig(num_replicas, self.tensor_parallel_size, self.pipeline_parallel_size)

    @property
    def sizes(self) -> str:
        """Return the parallel sizes of a replica as people read them, such as ``tp2xpp2``."""
        stages = self.pipeline_parallel_size
        return f"tp{self.tensor_parallel_size}" + (f"xpp{stages}" if stages > 1 else "")


def holds_longest(model: ModelSpec, key: ModeKey, costs: ModeCosts) -> bool:
    """Return whether a replica's KV cache holds one longest sequence, as vLLM asks for."""
    if not costs.kv_cache_groups:
        return costs.kv_cache_tokens >= model.max_model_len
    blocks = costs.kv_cache_tokens // model.engine.block_size
    batches = key.pipeline_parallel_size + model.engine.async_scheduling
    return blocks >= blocks_per_sequence(
        costs.kv_cache_groups,
        model.max_model_len,
        batches * model.engine.max_num_batched_tokens,
        prefix_caching=model.engine.enable_prefix_caching,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Application, cluster, length scenarios and costs.

    Attributes:
        app: the application.
        cluster: its devices.
        scenarios: possible lengths, at least one.
        costs: per node the costs of each replica size that was asked for; sizes that do not fit
            have a KV capacity below ``max_model_len``.
        page_cache: whether machines have all files in their page caches; if they are cold, each
            machine reads a checkpoint once.
        in_page_cache: checkpoints, by name and machine, that cold caches have at the beginning.
        engine_of: by node, a number that nodes of the same engines share: one may take over those
            of another that has finished. None: nodes of one checkpoint, with equal engine
            arguments and equal costs, share theirs.
    """

    app: Application
    cluster: Cluster
    scenarios: tuple[LengthScenario, ...]
    costs: tuple[Mapping[ModeKey, ModeCosts], ...]
    page_cache: Literal["warm", "cold"] = "warm"
    in_page_cache: frozenset[tuple[str, int]] = frozenset()
    engine_of: tuple[int, ...] | None = None
    _configs: dict[int, tuple[ParallelConfig, ...]] = field(
        default_factory=dict, init=False, repr=False
    )
    _fitting: dict[tuple[int, int, int], frozenset[str]] = field(
        default_factory=dict, init=False, repr=False
    )
    _same_engine: dict[str, dict[str, int]] = field(default_factory=dict, init=False, repr=False)
    _numbers: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)
    _idle: dict[tuple[frozenset[str], ParallelConfig], tuple[int, ...] | None] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Check that there is a scenario and that every node fits somewhere.

        Raises:
            InputError: naming the node and the memory it lacks.
        """
        if not self.scenarios:
            raise InputError("problem: at least one length scenario is needed")
        for i, node in enumerate(self.app.nodes):
            if not self.parallel_configs(i):
                best = max((c.kv_cache_tokens for c in self.costs[i].values()), default=0)
                raise InputError(
                    f"node {node.name}: model {node.model.name} fits on no set of devices of the "
                    f"cluster: at best a KV cache of {best} tokens is left, and max_model_len is "
                    f"{node.model.max_model_len}; add devices, larger NVLink groups or memory, or "
                    "lower max_model_len"
                    + (
                        ", or set cluster.replicas_across_machines: true"
                        if len(self.cluster.machines) > 1 and self.cluster.network is None
                        else ""
                    )
                    + (", or lower cluster.engines_per_gpu" if self.cluster.cards_if_shared else "")
                )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what was given: what is kept between questions is asked again.

        Python before 3.11.4 passes over ``__getstate__`` of dataclasses with slots.
        """
        return type(self), tuple(getattr(self, f.name) for f in fields(self) if f.init)

    @property
    def same_engine(self) -> Mapping[str, int]:
        """Return by node the number of its engines, for nodes that share theirs with others."""
        if "" not in self._same_engine:
            numbers = self.engine_numbers
            names = (n.name for n in self.app.nodes)
            shared = {n: k for n, k in zip(names, numbers, strict=True) if numbers.count(k) > 1}
            self._same_engine[""] = shared
        return self._same_engine[""]

    @property
    def engine_numbers(self) -> tuple[int, ...]:
        """Return by node the number of its engines."""
        if self.engine_of is not None:
            return self.engine_of
        if "" in self._numbers:
            return self._numbers[""]
        found: list[int] = []
        for i, node in enumerate(self.app.nodes):
            alike = (
                k
                for k in range(i)
                if self.app.nodes[k].model == node.model and self.costs[k] == self.costs[i]
            )
            found.append(next(alike, i))
        self._numbers[""] = tuple(found)
        return self._numbers[""]

    def without_shared_engines(self) -> Problem:
        """Return the same problem in which every node's engines are started for it."""
        return replace(self, engine_of=tuple(range(len(self.app.nodes))))

    def node(self, name: str) -> ModelNode:
        """Return a node by name.

        Raises:
            InputError: if there is none of that name.
        """
        return self.app.nodes[self.app.index(name)]

    def fits(self, node: int, key: ModeKey) -> bool:
        """Return whether vLLM would start a replica: its KV cache holds one longest sequence."""
        costs = self.costs[node].get(key)
        return costs is not None and holds_longest(self.app.nodes[node].model, key, costs)

    def mode_key(self, parallel: ParallelConfig, devices: tuple[int, ...]) -> ModeKey:
        """Return the key of the costs of a replica on these devices."""
        return ModeKey(
            self.cluster.kinds[devices[0]],
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
        )

    def mode(self, node: int, parallel: ParallelConfig, devices: tuple[int, ...]) -> ModeCosts:
        """Return the costs of a replica.

        Raises:
            InputError: if the replica does not fit or its size has no costs.
        """
        key = self.mode_key(parallel, devices)
        if not self.fits(node, key):
            raise InputError(
                f"node {self.app.nodes[node].name}: {parallel} on {key.gpu} does not fit in memory "
                "or has no costs"
            )
        return self.costs[node][key]

    def parallel_configs(self, node: int) -> tuple[ParallelConfig, ...]:
        """Return the parallel configurations of a node that are worth considering.

        All have a place on the idle cluster. Every number of replicas is among them on small
        clusters; beyond ``EVERY_SIZE`` replicas they grow by ``NEXT_SIZE``, and those that fill one
        or several machines, or the cluster or an even share of it, are there as well.
        Ordered by devices, then by tensor-parallel size.
        """
        if node not in self._configs:
            found = {
                key.parallel(dp)
                for key in self.costs[node]
                if self.fits(node, key)
                for dp in _replicas_offered(
                    self.cluster.replicas_by_machine(
                        key.gpu, key.tensor_parallel_size, key.pipeline_parallel_size
                    )
                )
            }
            self._configs[node] = tuple(
                sorted(found, key=lambda p: (p.num_devices, p.tensor_parallel_size))
            )
        return self._configs[node]

    def fitting_devices(
        self, node: int, parallel: ParallelConfig, free: Collection[int]
    ) -> Collection[int]:
        """Return the devices among ``free`` of kinds on which replicas of a node fit."""
        kinds = self.cluster.kinds
        fitting = self.fitting_kinds(node, parallel)
        if fitting.issuperset(kinds):
            return free
        return {d for d in free if kinds[d] in fitting}

    def find_devices(
        self, node: int, parallel: ParallelConfig, free: Collection[int]
    ) -> tuple[int, ...] | None:
        """Return free devices on which all replicas of a node fit, or None if there are none."""
        return self.cluster.find_devices(self.fitting_devices(node, parallel, free), parallel)

    def idle_devices(self, node: int, parallel: ParallelConfig) -> tuple[int, ...] | None:
        """Return :meth:`find_devices` with every device free."""
        key = self.fitting_kinds(node, parallel), parallel
        if key not in self._idle:
            free = [d for d, kind in enumerate(self.cluster.kinds) if kind in key[0]]
            self._idle[key] = self.cluster.find_devices(free, parallel)
        return self._idle[key]

    def fitting_kinds(self, node: int, parallel: ParallelConfig) -> frozenset[str]:
        """Return the kinds of GPU on which replicas of a node in these sizes fit."""
        tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        key = node, tp, pp
        if key not in self._fitting:
            kinds = set(self.cluster.kinds)
            self._fitting[key] = frozenset(k for k in kinds if self.fits(node, ModeKey(k, tp, pp)))
        return self._fitting[key]

    def engine_config(
        self, node: int, costs: ModeCosts, pipeline_parallel_size: int = 1
    ) -> EngineConfig:
        """Return the scheduler settings of a replica of a node.

        Args:
            node: index of the node.
            costs: of a replica of this size.
            pipeline_parallel_size: its pipeline stages.
        """
        model = self.app.nodes[node].model
        options = model.engine
        return EngineConfig(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=model.max_model_len,
            block_size=options.block_size,
            num_blocks=costs.kv_cache_tokens // options.block_size + 1,  # vLLM's null block
            enable_prefix_caching=options.enable_prefix_caching,
            async_scheduling=options.async_scheduling,
            enable_chunked_prefill=options.given("enable_chunked_prefill") is not False,
            pipeline_parallel_size=pipeline_parallel_size,
            kv_cache_groups=costs.kv_cache_groups,
        )

    def load_s(self, costs: ModeCosts) -> float:
        """Return the seconds of starting an engine, the first of its checkpoint on a machine."""
        return costs.load.warm_s if self.page_cache == "warm" else costs.load.cold_s

    def least_start_s(self, costs: ModeCosts) -> float:
        """Return the seconds that an engine start holds its devices at least."""
        return costs.load.least_start_s

    def reading_s(self, checkpoint: str) -> float:
        """Return the seconds at least in which a machine's disk reads a checkpoint."""
        if self.page_cache == "warm":
            return 0.0
        return min(
            costs.load.cold_s - costs.load.warm_s
            for node, sizes in zip(self.app.nodes, self.costs, strict=True)
            if node.model.name == checkpoint
            for costs in sizes.values()
        )

    def first_ready_s(self, node: int, costs: ModeCosts) -> float:
        """Return when the first engine of a node can be ready at the earliest."""
        name = self.app.nodes[node].model.name
        there = any(name == known for known, _ in self.in_page_cache)
        return costs.load.warm_s + (0.0 if there else self.reading_s(name))

    def without_prepared_starts(self) -> Problem:
        """Return the same problem with engine starts of which no part can be done ahead."""
        return self._with_loads(lambda load: replace(load, prepare_s=0.0))

    def without_sleeping_engines(self) -> Problem:
        """Return the same problem with engines that cannot sleep."""
        return self._with_loads(lambda load: replace(load, sleep_s=None, wake_s=None))

    def _with_loads(self, changed: Callable[[LoadTimes], LoadTimes]) -> Problem:
        costs = tuple(
            {k: replace(c, load=changed(c.load)) for k, c in sizes.items()} for sizes in self.costs
        )
        return replace(self, costs=costs)

    def without_pipelines(self) -> Problem:
        """Return the same problem with replicas of one pipeline stage, where a model fits so."""

        def single(node: int, sizes: Mapping[ModeKey, ModeCosts]) -> Mapping[ModeKey, ModeCosts]:
            kept = {k: c for k, c in sizes.items() if k.pipeline_parallel_size == 1}
            return kept if any(self.fits(node, k) for k in kept) else sizes

        return replace(self, costs=tuple(single(i, c) for i, c in enumerate(self.costs)))

    def with_scenarios(self, scenarios: tuple[LengthScenario, ...]) -> Problem:
        """Return the same problem with other lengths."""
        return replace(self, scenarios=scenarios)


def _replicas_offered(by_machine: Sequence[int]) -> list[int]:
    """Return the numbers of replicas to consider.

    Args:
        by_machine: how many have a place on each machine.
    """
    whole = sum(by_machine)
    filled = list(accumulate(sorted(by_machine, reverse=True)))
    filling = {whole // parts for parts in range(1, EVEN_SHARES + 1)}
    filling |= {filled[2**k - 1] for k in range(len(filled).bit_length())}
    kept: list[int] = []
    for n in range(1, whole + 1):
        if n <= EVERY_SIZE or n in filling or n >= NEXT_SIZE * kept[-1]:
            kept.append(n)
    return kept
