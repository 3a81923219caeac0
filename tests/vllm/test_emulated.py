"""Emulated engines: the real scheduler, the modelled time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from samullm_vllm.emulated_executor import EmulatedExecutor, EmulatedOptions, latency_fields

from samullm_plugin import (
    Cluster,
    EngineOptions,
    EngineRequest,
    EngineSpec,
    Gpu,
    InputError,
    LoadTimes,
    ModeCosts,
    ModelSpec,
    Provenance,
)
from samullm_plugin.engine import (
    Curve,
    EngineConfig,
    StepLatency,
    StepTable,
    Workload,
    simulate_engine,
)
from samullm_plugin.host.interfaces.moving import continued
from samullm_plugin.testing.executor_contract import ExecutorContract
from tests.vllm.conftest import Bench

pytestmark = pytest.mark.vllm

LATENCY = StepLatency(
    by_tokens=Curve((0.0, 256.0, 257.0, 512.0), (0.02, 0.03, 0.035, 0.06)),
    by_seqs=Curve.line(0.001, 0.0001),
    prefill_token_s=1e-5,
    prefill_pair_s=1e-8,
    context_token_s=1e-6,
    longest_token_s=5e-6,
    host_by_seqs=Curve.line(0.002, 0.0001),
    overlap_host=False,
    prefill_seq_s=1e-4,
    launch_s=0.021,
    prefill_launch_s=0.025,
    prefill_step_s=0.002,
    longest_over_seqs=2,
)
CLUSTER = Cluster.uniform(Gpu("A100-80GB", 80 << 30), 8, nvlink=8)


def costs(latency: StepLatency = LATENCY, load_s: float = 0.5) -> ModeCosts:
    return ModeCosts(latency, 4096, LoadTimes(load_s, load_s), Provenance("assumed", "test"))


def spec(key: str, devices: tuple[int, ...], *, asynchronous: bool = False) -> EngineSpec:
    """Return an emulated replica."""
    engine = EngineOptions(
        max_num_seqs=8, max_num_batched_tokens=256, async_scheduling=asynchronous
    )
    model = ModelSpec("big", 2048, engine=engine)
    return EngineSpec(key, 0, model, devices, len(devices), 1, 4096, costs=costs())


def requests(count: int, seed: int = 0) -> list[EngineRequest]:
    """Return requests of various lengths."""
    rng = np.random.default_rng(seed)
    return [
        EngineRequest(
            i,
            None,
            int(rng.integers(20, 400)),
            1000,
            output_tokens=int(rng.integers(5, 60)),
        )
        for i in range(count)
    ]


@pytest.fixture
def emulated(tmp_path: Path) -> Iterator[Bench]:
    executor = EmulatedExecutor(EmulatedOptions(heartbeat_s=0.02))
    executor.open(CLUSTER, tmp_path / "run")
    try:
        yield Bench(executor)
    finally:
        executor.close()


def test_latency_of_one_iteration_is_the_model_s() -> None:
    """The engine's own evaluation, one iteration at a time, equals the host's."""
    from samullm_vllm.step_seconds import StepSeconds

    rng = np.random.default_rng(3)
    for overlap in (False, True):
        latency = replace(LATENCY, overlap_host=overlap)
        seconds = StepSeconds(latency_fields(latency))
        for _ in range(50):
            prefills = [
                (int(b), int(n)) for b, n in rng.integers(1, 300, (int(rng.integers(0, 3)), 2))
            ]
            contexts = rng.integers(1, 2000, int(rng.integers(0, 6))).tolist()
            if not prefills and not contexts:
                continue
            tokens = sum(n for _, n in prefills)
            step = StepTable(
                np.array([len(prefills) + len(contexts)]),
                np.array([tokens + len(contexts)]),
                np.array([len(prefills)]),
                np.array([tokens]),
                np.array([sum(n * b + n * (n + 1) / 2 for b, n in prefills)]),
                np.array([float(sum(contexts))]),
                np.array([float(max(contexts, default=0))]),
            )
            assert seconds(prefills, contexts) == pytest.approx(latency.step_seconds(step)[0])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_takes_the_simulated_time(emulated: Bench, *, asynchronous: bool) -> None:
    """An engine under memory pressure makes the simulator's iterations, and takes their time.

    Other work on the machine makes it late, by an amount that nobody knows, but never early.
    """
    asked = requests(24)
    workload = Workload(
        np.array([r.prompt_tokens for r in asked]), np.array([r.output_tokens for r in asked])
    )
    config = EngineConfig(8, 256, 2048, 16, 4096 // 16 + 1, async_scheduling=asynchronous)
    expected_s = float(simulate_engine(config, workload, LATENCY).finish_s.max())
    emulated.start(spec("a", (0,), asynchronous=asynchronous))
    begin_s = emulated.executor.now_s()
    emulated.executor.submit("a", asked)
    outputs = emulated.gather(24)
    taken_s = emulated.events[-1].time_s - begin_s
    assert [outputs[r.request].num_tokens for r in asked] == [r.output_tokens for r in asked]
    assert {o.finish_reason for o in outputs.values()} == {"stop"}
    steps, seconds = emulated.executor.take_steps("a") or (None, None)
    assert steps is not None
    assert seconds is not None
    iterations_s = LATENCY.step_seconds(steps)
    # Asynchronous, the last request is seen to have ended when one more iteration is on its way.
    more_s = iterations_s.max() if asynchronous else 0.0
    assert expected_s - 1e-6 < iterations_s.sum() < expected_s + more_s + 1e-6
    assert taken_s > 0.99 * expected_s
    assert np.median(seconds / iterations_s) == pytest.approx(1.0, abs=0.05)


def test_more_devices_than_cores_and_moving(emulated: Bench) -> None:
    """Engines share whatever cores there are; requests move with their tokens."""
    engines = {"e0": (0,), "e1": (1, 2, 3, 4), "e7": (7,)}
    for key, devices in engines.items():
        emulated.executor.start_engine(spec(key, devices))
    for key in engines:
        emulated.wait("ready", key)
    asked = [replace(r, output_tokens=30) for r in requests(4)]
    emulated.executor.submit("e7", asked)
    emulated.until(lambda: sum(emulated.executor.progress("e7").values()) > 20)
    cut = {o.request: o for o in emulated.executor.stop_engine("e7")}
    assert any(o.num_tokens for o in cut.values())
    emulated.executor.submit("e0", [continued(r, cut[r.request]) for r in asked])
    outputs = emulated.gather(4)
    assert all(outputs[i].num_tokens + cut[i].num_tokens == 30 for i in range(4))


def test_time_scale(tmp_path: Path) -> None:
    """Half the time passes; clock, load time and iterations stay modelled seconds."""
    executor = EmulatedExecutor(EmulatedOptions(time_scale=0.5))
    executor.open(CLUSTER, tmp_path)
    bench = Bench(executor)
    try:
        bench.start(replace(spec("warm", (0,)), costs=costs(load_s=0.0)))
        begin_s = executor.now_s()
        bench.start(replace(spec("a", (0,)), costs=costs(load_s=8.0)))
        assert 7.9 < executor.now_s() - begin_s < 15.0  # 4 or 16, were one of the two not scaled
        executor.submit("a", [EngineRequest(0, None, 50, 1000, output_tokens=180)])
        bench.gather(1)
        steps, seconds = executor.take_steps("a") or (None, None)
        assert steps is not None
        assert seconds is not None
        assert len(seconds) == 180
        assert np.median(seconds / LATENCY.step_seconds(steps)) == pytest.approx(1.0, abs=0.05)
    finally:
        executor.close()


def test_other_latencies_are_refused(emulated: Bench) -> None:
    class Other:
        def step_seconds(self, steps: StepTable) -> np.ndarray:
            return np.ones(len(steps))

    strange = replace(spec("a", (0,)), costs=replace(costs(), latency=Other()))
    with pytest.raises(InputError, match="only piecewise-linear"):
        emulated.executor.start_engine(strange)


class TestContract(ExecutorContract):
    """The rules every executor keeps."""

    executor_class = EmulatedExecutor


def test_sleeping_and_waking_take_what_the_costs_say(emulated: Bench) -> None:
    """Who follows on its device waits until it sleeps, as does who wakes beside one."""
    executor = emulated.executor
    load = LoadTimes(0.5, 0.5, sleep_s=1.5, wake_s=0.7)

    def drowsy(key: str, *after: str) -> EngineSpec:
        return replace(spec(key, (0,)), costs=replace(costs(), load=load), after=after)

    emulated.start(drowsy("a"))
    began_s = executor.now_s()
    assert executor.sleep_engine("a")
    emulated.start(drowsy("b", "a"))
    assert executor.now_s() - began_s > 1.5  # some of its start was done by then
    began_s = executor.now_s()
    assert executor.sleep_engine("b")
    executor.wake_engine("a", drowsy("c", "b"))
    emulated.wait("ready", "c")
    assert executor.now_s() - began_s > 1.5 + 0.7
    executor.wake_engine("b", drowsy("d"))
    executor.stop_engine("c")
    emulated.wait("ready", "d")
    executor.submit("d", requests(3))
    emulated.gather(3)
    executor.stop_engine("d")
