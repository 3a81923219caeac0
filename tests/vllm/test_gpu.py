"""Engines on CUDA GPUs: real ones, or those of ``make emulated-gpu``.

Thirteen engines start and one fails to, all of them tiny and eager; two more processes import vLLM
(the one that forks, and that of doctor's run).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samullm_vllm.devices import cuda_cluster, cuda_devices, open_nvml
from samullm_vllm.doctor import examine
from samullm_vllm.vllm_executor import VllmExecutor, VllmOptions

from samullm_plugin import Cluster, EngineOptions, EngineSpec, InputError
from samullm_plugin.host.interfaces.moving import continued
from samullm_plugin.model.shared_gpus import Sharing, share_gpus
from tests.models import make_tiny_llama
from tests.vllm.conftest import Bench, request, spec

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the head sizes GPU kernels take."""
    folder = tmp_path_factory.mktemp("models") / "gpu"
    return make_tiny_llama(folder, hidden_size=128, intermediate_size=256, num_attention_heads=2)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Bench]:
    """An executor whose engines can sleep."""
    executor = VllmExecutor(VllmOptions(platform="cuda", sleep_mode=True))
    executor.open(Cluster(cuda_cluster(["0"]).gpus), tmp_path / "run")
    try:
        yield Bench(executor)
    finally:
        executor.close()


@pytest.fixture
def nvml() -> Iterator[Any]:
    """NVML, open."""
    with open_nvml() as found:
        yield found


def used_bytes(nvml: Any, device: int = 0) -> int:
    return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(device)).used)


def settled_bytes(nvml: Any) -> int:
    """Return what is used once engines of a test before, killed when it closed, have gone."""
    used, after = -1, used_bytes(nvml)
    while used != after:
        time.sleep(0.5)
        used, after = after, used_bytes(nvml)
    return used


def holders(nvml: Any, device: int) -> set[int]:
    handle = nvml.nvmlDeviceGetHandleByIndex(device)
    return {p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}


def gpu_spec(key: str, folder: Path, device: int = 0) -> EngineSpec:
    base = spec(key, folder, (device,))
    options = EngineOptions(
        max_num_seqs=16,
        max_num_batched_tokens=512,
        dtype="float32",
        extra=(("enforce_eager", True),),
    )
    return replace(base, model=replace(base.model, engine=options))


def test_doctor_finds_this_machine_ready() -> None:
    """A tiny model is planned, started, asked and stopped, and its memory is back."""
    checks = {c.name: c for c in examine(smoke=True)}
    assert not [c for c in checks.values() if c.verdict == "failed"]
    assert "CUDA" in checks["NVIDIA driver"].found
    assert checks["memory of device 0"].verdict == "ok"
    assert "8 requests of 16 tokens" in checks["run of a tiny model"].found
    assert "model and weights" in checks["run of a tiny model"].found


def test_moved_is_as_undisturbed_and_sleeping_frees_memory(
    sleeper: Bench, model: Path, nvml: Any
) -> None:
    """An engine computes, sleeps, wakes and computes the same; requests move between engines.

    While it sleeps, another one has the GPU.
    """
    requests = [request(i, 200) for i in range(4)]
    sleeper.start(gpu_spec("a", model))
    sleeper.executor.submit("a", requests)
    expected = {i: o.token_ids for i, o in sleeper.gather(4).items()}
    used = used_bytes(nvml)
    for old, new in (("a", "again"), ("again", "last")):
        assert sleeper.executor.sleep_engine(old)
        sleeper.events.clear()
        sleeper.outputs.clear()
        if old == "a":  # at once: it waits for the memory
            sleeper.start(replace(gpu_spec("beside", model), after=("a",)))
            sleeper.executor.submit("beside", requests)
            assert {i: o.token_ids for i, o in sleeper.gather(4).items()} == expected
            sleeper.executor.stop_engine("beside")
            sleeper.events.clear()
            sleeper.outputs.clear()
            assert used_bytes(nvml) < used
        sleeper.executor.wake_engine(old, gpu_spec(new, model))
        sleeper.wait("ready", new)
    sleeper.executor.submit("last", requests)
    sleeper.until(lambda: sum(sleeper.executor.progress("last").values()) > 40)
    cut = {o.request: o for o in sleeper.executor.stop_engine("last")}
    sleeper.start(gpu_spec("b", model))
    sleeper.executor.submit("b", [continued(requests[i], o) for i, o in cut.items()])
    outputs = sleeper.gather(4)
    for i, tokens in expected.items():
        before = cut[i].token_ids or () if i in cut else ()
        assert (*before, *(outputs[i].token_ids or ())) == tokens


def test_memory_is_back_after_a_stop_and_after_a_kill(
    sleeper: Bench, model: Path, nvml: Any
) -> None:
    """What an engine held is free again when ``stop_engine`` returns, however the engine ended."""
    before = settled_bytes(nvml)
    for key in ("stopped", "killed"):
        sleeper.start(gpu_spec(key, model))
        assert used_bytes(nvml) > before + (256 << 20)
        if key == "killed":
            os.kill(sleeper.pids(key)[0], signal.SIGKILL)
            sleeper.failure(key)
        sleeper.executor.stop_engine(key)
        assert used_bytes(nvml) <= before + (256 << 20)


def test_an_engine_that_wants_more_than_there_is_says_so(
    sleeper: Bench, model: Path, nvml: Any
) -> None:
    """The reason is the device's memory, and all of it is free afterwards."""
    before = settled_bytes(nvml)
    total = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).total
    # Keys and values of 2 layers, 2 heads of 64, float32: 2 KiB a token.
    greedy = replace(gpu_spec("greedy", model), kv_cache_tokens=int(total // 2048))
    sleeper.executor.start_engine(greedy)
    assert "memory" in sleeper.failure("greedy", 120.0).reason
    sleeper.executor.stop_engine("greedy")
    assert used_bytes(nvml) <= before + (256 << 20)


def test_prepared_engines_are_ready_sooner_and_hold_no_memory(
    sleeper: Bench, model: Path, nvml: Any
) -> None:
    """Forked from a process that has imported vLLM, an engine waits without touching the GPU."""
    began_s = sleeper.executor.now_s()
    sleeper.start(gpu_spec("whole", model))
    whole_s = sleeper.executor.now_s() - began_s
    sleeper.executor.stop_engine("whole")
    before = used_bytes(nvml)
    assert sleeper.executor.prepare_engine(gpu_spec("ahead", model))
    replica = sleeper.executor._replicas["ahead"]
    sleeper.until(lambda: replica.phase == "prepared")
    assert used_bytes(nvml) <= before + (64 << 20)
    began_s = sleeper.executor.now_s()
    sleeper.start(gpu_spec("ahead", model))
    assert sleeper.executor.now_s() - began_s < whole_s
    sleeper.executor.submit("ahead", [request(0, 20)])
    assert sleeper.gather(1)[0].num_tokens == 20


def test_engines_share_a_gpu(model: Path, nvml: Any, tmp_path: Path) -> None:
    """Each with its part of the memory; what one held is back while the other computes."""
    before = settled_bytes(nvml)
    cluster = share_gpus(Cluster(cuda_cluster(["0"]).gpus), [Sharing(2, 1.5)])
    executor = VllmExecutor(VllmOptions(platform="cuda"))
    executor.open(cluster, tmp_path / "run")
    bench = Bench(executor)
    try:
        requests = [request(i, 60) for i in range(4)]
        bench.start(gpu_spec("a", model, 0))
        alone = used_bytes(nvml)
        bench.executor.submit("a", requests)
        expected = [bench.gather(4)[i].token_ids for i in range(4)]
        bench.outputs.clear()
        bench.start(gpu_spec("b", model, 1))
        both = used_bytes(nvml)
        assert both > alone + (256 << 20)
        assert {*bench.pids("a"), *bench.pids("b")} <= holders(nvml, 0)
        bench.executor.submit("a", requests)
        bench.executor.submit("b", [replace(r, request=r.request + 4) for r in requests])
        outputs = bench.gather(8)
        assert [outputs[i].token_ids for i in range(8)] == expected * 2
        bench.executor.stop_engine("a")
        assert used_bytes(nvml) <= before + cluster.gpus[0].memory_bytes + (256 << 20)
        bench.start(gpu_spec("c", model, 0))
        bench.executor.stop_engine("b")
        bench.executor.stop_engine("c")
        assert used_bytes(nvml) <= before + (256 << 20)
    finally:
        executor.close()


def test_engines_are_on_their_own_gpus_which_nobody_else_takes(
    model: Path, nvml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the order of CUDA_VISIBLE_DEVICES, whatever its entries look like."""
    if nvml.nvmlDeviceGetCount() < 2:
        pytest.skip("needs two GPUs")
    uuid = nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{uuid[:12]},{uuid[:12]}")
    assert cuda_devices(os.environ) == []  # CUDA shows none if one is named twice
    second = nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{uuid},{second}")
    executor, other = (VllmExecutor(VllmOptions(platform="cuda")) for _ in range(2))
    bench = Bench(executor)
    try:
        executor.open(cuda_cluster([uuid, second]), tmp_path / "run")
        for key, device in (("a", 0), ("b", 1)):
            bench.executor.start_engine(gpu_spec(key, model, device))
        for key in ("a", "b"):
            bench.wait("ready", key)
        assert set(bench.pids("a")) <= holders(nvml, 1)
        assert set(bench.pids("b")) <= holders(nvml, 0)
        assert not holders(nvml, 0) & holders(nvml, 1)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with pytest.raises(InputError, match=rf"hold GPU 1 \(process {os.getpid()}\)"):
            other.open(cuda_cluster(["1"]), tmp_path / "other")
    finally:
        executor.close()
        other.close()
