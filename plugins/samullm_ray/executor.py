"""The executor ``ray``: vLLM engines on the machines of a Ray cluster."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, ClassVar

import msgspec
from pydantic import BaseModel
from samullm_vllm.launching import Launcher
from samullm_vllm.protocol import Start
from samullm_vllm.vllm_executor import VllmExecutor, check_installed

from samullm_plugin import Cluster, EngineEvent, EngineSpec, InputError, ModelSpec, RunError
from samullm_ray.actors import (
    Actors,
    ActorTransport,
    check_facts,
    end_agents,
    greet_later,
    missing_models,
    say_hello,
)
from samullm_ray.cluster import HeadWatch, check_address, connect, joined, require_ray
from samullm_ray.launcher import RemoteLauncher
from samullm_ray.machine import Machine
from samullm_ray.messages import MachineFacts, Prefetch
from samullm_ray.options import RayOptions

logger = logging.getLogger(__name__)

_POLL_S = 2.0
_CALL_S = 0.0015
"""Processor time of a call, whatever it brings (``benchmarks/ray_coordinator.py --calls``)."""
_CALLS_SHARE = 0.25
"""At most this part of a processor goes into calls under load, however many machines there are."""


class RayExecutor(VllmExecutor):
    """Runs vLLM engines on several machines.

    Each machine has one agent, which runs the same engine processes as the executor ``vllm``. A
    machine that is lost is reported with its devices; a new agent is asked for at once, and when it
    answers, the devices have joined again.
    """

    name = "ray"
    Config: ClassVar[type[BaseModel]] = RayOptions

    _keeping: ClassVar[bool] = False
    _kept: ClassVar[dict[tuple[object, ...], tuple[Actors, dict[int, Any]]]] = {}
    _kept_connection: ClassVar[bool] = False

    @classmethod
    @contextmanager
    def kept_warm(cls) -> Iterator[None]:
        """Let executors opened one after another use the same agents, which have imported vLLM."""
        outer = cls._keeping
        cls._keeping = True
        try:
            yield
        finally:
            cls._keeping = outer
            if not outer:
                cls.end_kept()

    @classmethod
    def end_kept(cls) -> None:
        """End the agents that are kept, and leave the cluster if an executor joined it."""
        while cls._kept:
            actors, agents = cls._kept.popitem()[1]
            end_agents(list(agents.values()))
            actors.close()
        if RayExecutor._kept_connection:
            import ray

            ray.shutdown()
            RayExecutor._kept_connection = False

    def __init__(self, config: BaseModel | None = None) -> None:
        """Keep the options; nothing is started before ``open``."""
        super().__init__(config)
        self._polls = 0
        self._models: dict[str, ModelSpec] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._actors: Actors | None = None
        self._head: HeadWatch | None = None
        self._agents: dict[int, Any] = {}
        self._facts: list[MachineFacts] = []
        self._arrived: queue.SimpleQueue[tuple[int, Any, MachineFacts]] = queue.SimpleQueue()
        self._left = threading.Event()
        self._bell = -1
        self._connected = False
        self._lost = self._joined = 0

    @property
    def ray_options(self) -> RayOptions:
        """Return the options."""
        assert isinstance(self.config, RayOptions)
        return self.config

    def begin_opening(self) -> None:
        """See to vLLM, Ray and a head at the address; agents import vLLM on their machines."""
        check_installed(self.name)
        require_ray()
        check_address(self.ray_options)

    def _prepare(self, cluster: Cluster) -> None:
        """Join the cluster and have an agent on every machine of the plan."""
        check_installed(self.name)
        options = self.ray_options
        if options.address in (None, "local") and len(cluster.machines) > 1 and not joined():
            raise InputError(
                f"executor ray: the cluster has {len(cluster.machines)} machines, and without an "
                "address this machine is all there is; name the head of yours with "
                "--executor-option address=HOST:6379, or `auto` on a machine of it"
            )
        self._connected = connect(options) or self._kept_connection
        RayExecutor._kept_connection = False
        self._left.clear()
        self._cluster = cluster
        self._head = HeadWatch(options.lost_timeout_s)
        kept = self._kept.pop(self._warm_key, None)
        self._actors = Actors(cluster, options) if kept is None else kept[0]
        self._places = {
            d: (m, i) for m, ds in enumerate(cluster.machines) for i, d in enumerate(ds)
        }
        if kept is None:
            self._agents = {m: self._actors.start(m) for m in range(len(cluster.machines))}
        else:
            self._agents = kept[1]
        self._facts = say_hello(list(self._agents.values()), options.load_timeout_s)
        platforms = {f.platform for f in self._facts}
        if len(platforms) > 1:
            raise InputError(
                "executor ray: some machines have GPUs and some have none; name machines of one "
                "kind in the cluster, or set the option platform"
            )
        self._platform = self._facts[0].platform
        for facts, devices in zip(self._facts, cluster.machines, strict=True):
            self._check_gpus(facts, devices)
        missing = missing_models(list(self._agents.values()), self._model_paths)
        for facts, gone in zip(self._facts, missing, strict=True):
            _check_folders(facts, gone)

    @property
    def _model_paths(self) -> list[str]:
        return [m.path for m in self._models.values() if m.path is not None]

    @property
    def _warm_key(self) -> tuple[object, ...]:
        options = self.ray_options
        sizes = tuple(len(m) for m in self._cluster.machines)
        return options.address, options.platform, options.start_method, options.resource, sizes

    def _check_gpus(self, facts: MachineFacts, devices: Sequence[int]) -> None:
        """Warn of GPUs that are not what the plan takes them for."""
        for name, device in zip(facts.gpu_names, devices, strict=False):
            planned = self._cluster.gpus[device].name
            if not _alike(name, planned):
                logger.warning(
                    "machine %s: device %d is a %s, and the plan takes it for a %s",
                    facts.host, device, name, planned,
                )  # fmt: skip

    def _make_launcher(self, log: IO[bytes], environment: Mapping[str, str]) -> Launcher:
        del log, environment  # those of the agents count
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        forked = self.ray_options.start_method != "fresh"
        launcher = RemoteLauncher(
            self._bell,
            self._note_lost,
            rank_processes=forked and self._platform == "cpu",
        )
        for number, facts in enumerate(self._facts):
            launcher.machines[number] = self._machine(number, self._agents[number], facts)
        return launcher

    def _machine(self, number: int, agent: Any, facts: MachineFacts) -> Machine:
        options = self.ray_options
        return Machine(
            number,
            self._cluster.machines[number],
            ActorTransport(agent),
            facts,
            self._ring,
            poll_s=_POLL_S,
            linger_s=max(options.linger_s, len(self._cluster.machines) * _CALL_S / _CALLS_SHARE),
            lost_timeout_s=options.lost_timeout_s,
        )

    def _ring(self) -> None:
        with suppress(OSError, ValueError):  # closed meanwhile
            os.eventfd_write(self._bell, 1)

    @property
    def _remote(self) -> RemoteLauncher:
        launcher = self._running
        assert isinstance(launcher, RemoteLauncher)
        return launcher

    def _note_lost(self, machine: Machine) -> None:
        """Report a machine's devices as lost, and ask for another agent in its place."""
        logger.warning("%s", machine.lost)
        self._lost += 1
        event = EngineEvent("", "lost", self.now_s(), (), machine.lost, machine.devices)
        self._events.append(event)
        head, actors, number = self._head, self._actors, machine.index
        if head is None or head.gone:
            return  # nothing will join a cluster without a head
        assert actors is not None

        def start() -> Any:
            if not head.answers():  # a request to one that is gone ends this process a minute later
                raise ConnectionError(f"the head at {head.address} does not answer")
            if self._left.is_set():  # asked for an agent now, Ray would start a cluster
                raise ConnectionError("the run is over")
            return actors.start(number)

        def heard(agent: Any, facts: MachineFacts) -> None:
            check_facts([facts])
            if facts.platform != self._platform:
                raise InputError(
                    f"executor ray: machine {facts.host}: engines would run on {facts.platform} "
                    f"there, and run on {self._platform} on the others; start a machine like them"
                )
            _check_folders(facts, missing_models([agent], self._model_paths)[0])
            self._check_gpus(facts, self._cluster.machines[number])
            self._arrived.put((number, agent, facts))
            self._ring()

        greet_later(start, self.ray_options.load_timeout_s, heard, self._left)

    def _take_arrivals(self) -> None:
        """Take up machines whose new agents have answered."""
        while True:
            try:
                number, agent, facts = self._arrived.get_nowait()
            except queue.Empty:
                return
            self._agents[number] = agent
            self._remote.machines[number] = self._machine(number, agent, facts)
            self._joined += 1
            devices = self._cluster.machines[number]
            self._events.append(EngineEvent("", "joined", self.now_s(), devices=devices))

    def _pump(self, timeout_s: float) -> None:
        # All that the coordinator said since the last time goes in one call to each machine.
        self._remote.flush()
        super()._pump(timeout_s)
        if self._remote.fed:  # is read before the machines are asked for more
            self._remote.fed = False
            super()._pump(0.0)
        if self._head is not None and self._head.gone:
            raise RunError(
                f"executor ray: the head of the cluster at {self._head.address} has not answered "
                f"for {self.ray_options.lost_timeout_s:g} s (lost_timeout_s); start a cluster "
                "again and go on with --resume"
            )
        self._take_arrivals()

    def check(self, models: Sequence[ModelSpec]) -> None:
        """Note the models; every machine says whether their folders are there when it joins."""
        self._models |= {m.path or m.name: m for m in models}

    def prefetch_on(self, model: ModelSpec, devices: Sequence[int]) -> None:
        """Have the devices' machines read the weights' files into their page caches, meanwhile."""
        for number in {self._places[d][0] for d in devices}:
            if (machine := self._remote.machines.get(number)) is not None:
                machine.tell(Prefetch(model.path or model.name))

    def _device_names(self, spec: EngineSpec) -> list[str]:
        return ["/".join(map(str, self._places[d])) for d in spec.devices]

    def _start_message(self, spec: EngineSpec, rendezvous: str, *, ahead: bool) -> Start:
        start = super()._start_message(spec, rendezvous, ahead=ahead)
        machines = {self._places[d][0] for d in spec.devices}
        if len(machines) == 1:
            return start
        return msgspec.structs.replace(start, num_ranks=1, num_machines=len(machines))

    @property
    def can_prepare(self) -> bool:
        """Whether engines can be prepared ahead: not yet on other machines."""
        return False

    @property
    def can_share_gpus(self) -> bool:
        """Agents give every engine devices of its own."""
        return False

    @property
    def can_sleep(self) -> bool:
        """Whether engines can sleep: not on other machines."""
        return False

    def figures(self) -> Mapping[str, float]:
        """Return how often machines were polled, and how many were lost and joined."""
        if self._launcher is not None:
            self._polls = sum(m.polls for m in self._remote.machines.values())
        return {
            "ray_polls": float(self._polls),
            "machines_lost": float(self._lost),
            "machines_joined": float(self._joined),
        }

    def close(self) -> None:
        """End every engine and agent and leave the cluster; safe to call twice."""
        self._left.set()
        self.figures()
        healthy = self._launcher is not None and not self._lost
        super().close()
        # It may have gone just now: what is asked of it then waits until Ray ends this process.
        head_gone = self._head is not None and not self._head.answers()
        if self._head is not None:
            self._head.close()
            self._head = None
        if self._actors is not None:
            if self._keeping and healthy and not head_gone:
                self._kept[self._warm_key] = self._actors, self._agents
            else:
                end_agents(list(self._agents.values()), head_gone=head_gone)
                if not head_gone:
                    self._actors.close()
            self._actors, self._agents = None, {}
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1
        if self._connected and self._keeping and not head_gone:
            RayExecutor._kept_connection = True
        elif self._connected:
            import ray

            ray.shutdown()
        self._connected = False


def _check_folders(facts: MachineFacts, missing: Sequence[str]) -> None:
    """Refuse a machine on which folders of models are missing.

    Raises:
        InputError: naming the machine and a folder.
    """
    if missing:
        raise InputError(
            f"executor ray: machine {facts.host} has no folder {missing[0]} with a config.json; "
            "copy the model there, or put it on a disk that all machines share"
        )


def _alike(found: str, planned: str) -> bool:
    """Return whether the parts of a planned name, such as H100-80GB, are in a driver's name."""
    words = planned.replace("-", " ").split()
    return all(word.lower() in found.lower() for word in words if not word.upper().endswith("GB"))
