"""Engines on two machines at once: the agents of both are in this process, Ray is not asked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from time import monotonic

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
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

from samullm_ray.agent import Agent  # noqa: E402  # needs Ray
from samullm_ray.executor import RayExecutor, RayOptions  # noqa: E402
from samullm_ray.machine import Machine  # noqa: E402
from samullm_ray.messages import MachineFacts  # noqa: E402

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

    def engines(self, machine: int) -> list[psutil.Process]:
        """Return the processes of a machine's engines."""
        engines = self._agents[machine]._engines.values()
        leaders = [r.find() for e in engines for r in e.launched.processes]
        return [p for p in leaders if p is not None]


@pytest.fixture(scope="module")
def executor() -> Iterator[TwoMachines]:
    if len(psutil.Process().cpu_affinity() or ()) < 2:
        pytest.skip("needs two cores")
    made = TwoMachines(RayOptions(load_timeout_s=LIMIT_S, stop_timeout_s=10.0, hang_timeout_s=120))
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
    assert executor.stop_engine(spec.key) == []
    return found


def test_it_says_what_it_says_on_one_machine(executor: TwoMachines, wide: EngineSpec) -> None:
    """And its part on one machine takes the other with it, and leaves both machines free."""
    told = answers(executor, wide)
    single = replace(wide, key="single", devices=(1,), pipeline_parallel_size=1)
    assert told == answers(executor, single)
    executor.start_engine(replace(wide, key="again", devices=(1, 0)))  # the other machine leads
    executor.submit("again", [request(i, 400) for i in range(8)])
    events: list[EngineEvent] = []
    until(executor, "ready", events)
    parts = [executor.engines(machine) for machine in (0, 1)]
    assert [len(p) for p in parts] == [1, 1]
    family = [p for (leader,) in parts for p in (leader, *leader.children(recursive=True))]
    parts[0][0].kill()
    until(executor, "failed", events)
    assert "machine" in next(e.reason for e in events if e.kind == "failed")
    rest = executor.stop_engine("again")
    done = [o.request for e in events for o in e.outputs]
    assert sorted([*done, *(o.request for o in rest)]) == list(range(8))
    _, left = psutil.wait_procs(family, timeout=60.0)
    assert left == []
    assert told == answers(executor, replace(single, key="after", devices=(0,)))
