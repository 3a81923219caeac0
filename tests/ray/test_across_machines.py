"""Engines on two machines at once: the agents of both are in this process, Ray is not asked."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from time import monotonic
from unittest.mock import patch

import psutil
import pytest

from samullm_plugin import (
    Cluster,
    EngineEvent,
    EngineOptions,
    EngineRequest,
    EngineSpec,
    Gpu,
    ModelSpec,
)
from samullm_plugin.model.cluster import Network
from tests.models import make_tiny_llama

pytest.importorskip("ray")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

from samullm_ray.agent import Agent  # noqa: E402  # needs Ray
from samullm_ray.executor import RayExecutor, RayOptions  # noqa: E402
from samullm_ray.machine import Machine  # noqa: E402
from samullm_ray.messages import MachineFacts  # noqa: E402
from samullm_vllm.fork_launching import _ForkServer  # noqa: E402
from samullm_vllm.processes import (  # noqa: E402
    RecordedProcess,
    alive,
    strike,
    wait_gone,
    with_children,
)

GPU = Gpu("core", 1 << 30)
CLUSTER = Cluster((GPU, GPU), (), ((0,), (1,)), network=Network(1e9, 1e-4))
LIMIT_S = 800.0


class Nearby:
    """Calls an agent of this process, as Ray would one of another."""

    def __init__(self, agent: Agent) -> None:
        self._agent, self._calls = agent, ThreadPoolExecutor(4)

    def call(self, data: bytes) -> Future[bytes]:
        return self._calls.submit(self._agent.exchange, data)

    def final(self, error: BaseException) -> str | None:
        return str(error)

    def fence(self) -> None:
        self._agent.stop()


class TwoMachines(RayExecutor):
    """The executor with the agents of two machines that are this one."""

    def _prepare(self, cluster: Cluster) -> None:
        self._cluster, self._platform = cluster, "cpu"
        self._places = {0: (0, 0), 1: (1, 0)}
        self._agents = {m: Agent("cpu", 1, "fork") for m in range(2)}
        with ThreadPoolExecutor(2) as greeting:
            self._facts = list(greeting.map(lambda a: a.hello(LIMIT_S), self._agents.values()))
        assert [f.fault for f in self._facts] == ["", ""]

    def _machine(self, number: int, agent: Agent, facts: MachineFacts) -> Machine:
        return Machine(
            number, (number,), Nearby(agent), facts, self._ring,
            poll_s=0.5, linger_s=0.01, lost_timeout_s=120.0,
        )  # fmt: skip

    def parts(self) -> list[list[RecordedProcess]]:
        """Return by machine the processes of its engines, and what these have started."""
        found = []
        for agent in self._agents.values():
            leaders = [r for e in agent._relay.engines.values() for r in e.launched.processes]
            found.append([*leaders, *(with_children(leaders) - set(leaders))])
        return found

    def check_cores(self, parts: Sequence[Sequence[RecordedProcess]]) -> None:
        """See to it that each machine has an engine's process and a rank, on its one core."""
        for agent, part in zip(self._agents.values(), parts, strict=True):
            names = [p.name() for p in alive(part)]
            assert sum("Worker" in name for name in names) == 1, names
            ranks = [p for p in alive(part) if "Worker" in p.name()]
            assert {c for p in ranks for c in p.cpu_affinity() or ()} == {int(agent._devices[0])}


@pytest.fixture(scope="module")
def executor() -> Iterator[TwoMachines]:
    if len(psutil.Process().cpu_affinity() or ()) < 2:
        pytest.skip("needs two cores")
    made = TwoMachines(RayOptions(load_timeout_s=LIMIT_S, stop_timeout_s=10.0, hang_timeout_s=120))
    # What was kept for other tests is left to them: each machine has a process of its own to fork.
    with patch.multiple(_ForkServer, kept={}, keeping=False):
        try:
            made.open(CLUSTER, None)
            yield made
        finally:
            made.close()
            for agent in made._agents.values():
                agent.stop()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    """A replica of two stages, one on each machine."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    options = EngineOptions(
        max_num_seqs=8, max_num_batched_tokens=512, block_size=32, dtype="float32"
    )
    model = ModelSpec("tiny", 512, path=str(folder), engine=options)
    return EngineSpec("wide", 0, model, (0, 1), 1, 2, 8192)


def request(index: int, tokens: int = 12) -> EngineRequest:
    return EngineRequest(
        index,
        tuple(range(3 + index, 9 + 2 * index)),
        6 + index,
        tokens,
        sampling={"ignore_eos": True, "temperature": 0.0},
    )


def until(executor: TwoMachines, kind: str, events: list[EngineEvent]) -> None:
    """Poll until an event of a kind has come."""
    deadline_s = monotonic() + LIMIT_S
    while not any(e.kind == kind for e in events):
        events += executor.poll(1.0)
        assert monotonic() < deadline_s
        assert kind == "failed" or not any(e.kind == "failed" for e in events), events


def answers(executor: TwoMachines, spec: EngineSpec, count: int = 6) -> dict[int, object]:
    """Start an engine, have it answer, and stop it; return its tokens by request."""
    executor.start_engine(spec)
    executor.submit(spec.key, [request(i) for i in range(count)])
    found: dict[int, object] = {}
    while len(found) < count:
        events: list[EngineEvent] = []
        until(executor, "finished", events)
        found |= {o.request: o.token_ids for e in events for o in e.outputs}
    parts = executor.parts()
    if len(spec.devices) > 1:
        executor.check_cores(parts)
    assert executor.stop_engine(spec.key) == []
    assert gone(parts)
    return found


def gone(parts: Sequence[Sequence[RecordedProcess]]) -> bool:
    """Return whether processes are gone, or are so before anything else could start."""
    return wait_gone([r for part in parts for r in part], 2.0)


def test_it_says_what_it_says_on_one_machine(executor: TwoMachines, wide: EngineSpec) -> None:
    """And its part on one machine takes the other with it, and leaves both machines free."""
    told = answers(executor, wide)
    single = replace(wide, key="single", devices=(1,), pipeline_parallel_size=1)
    assert told == answers(executor, single)
    executor.start_engine(replace(wide, key="again", devices=(1, 0)))  # the other machine leads
    executor.submit("again", [request(i, 400) for i in range(8)])
    events: list[EngineEvent] = []
    until(executor, "ready", events)
    parts = executor.parts()
    executor.check_cores(parts)
    strike(parts[0][:1])  # its rank waits within a batch for that of the other machine
    until(executor, "failed", events)
    rest = executor.stop_engine("again")
    assert gone(parts)
    done = [o.request for e in events for o in e.outputs]
    assert sorted([*done, *(o.request for o in rest)]) == list(range(8))
    assert told == answers(executor, replace(single, key="after", devices=(0,)))


def test_a_port_that_somebody_took_fails_the_start(
    executor: TwoMachines, wide: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("samullm_ray.relay._free_port", lambda: port)
        executor.start_engine(wide)
        seen: set[RecordedProcess] = set()
        kinds: set[str] = set()
        deadline_s = monotonic() + LIMIT_S
        while not kinds:
            kinds = {e.kind for e in executor.poll(0.1)}
            seen.update(*executor.parts())
            assert monotonic() < deadline_s
        assert kinds == {"failed"}
        assert len(seen) >= 4  # on each machine an engine's process and a rank
        assert executor.stop_engine(wide.key) == []
        assert gone([list(seen)])
