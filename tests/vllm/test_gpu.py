"""Engines on CUDA GPUs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from samullm_vllm.devices import cuda_cluster
from samullm_vllm.vllm_executor import VllmExecutor, VllmOptions

from samullm_plugin import Cluster, EngineOptions, EngineSpec
from samullm_plugin.host.interfaces.moving import continued
from tests.models import make_tiny_llama
from tests.vllm.conftest import Bench, request, spec

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the head sizes GPU kernels take."""
    folder = tmp_path_factory.mktemp("models") / "gpu"
    return make_tiny_llama(folder, hidden_size=128, intermediate_size=256, num_attention_heads=2)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Bench]:
    """An executor whose engines can sleep."""
    executor = VllmExecutor(VllmOptions(platform="cuda", sleep_mode=True))
    executor.open(Cluster((cuda_cluster(["0"]).gpus[0],)), tmp_path / "run")
    try:
        yield Bench(executor)
    finally:
        executor.close()


def gpu_spec(key: str, folder: Path, device: int = 0) -> EngineSpec:
    base = spec(key, folder, (device,))
    options = EngineOptions(
        max_num_seqs=16,
        max_num_batched_tokens=512,
        dtype="float32",
        extra=(("enforce_eager", True),),
    )
    return replace(base, model=replace(base.model, engine=options))


def test_moved_is_as_undisturbed_and_sleeping_frees_memory(sleeper: Bench, model: Path) -> None:
    """An engine computes, sleeps, wakes and computes the same; requests move between engines."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    requests = [request(i, 200) for i in range(4)]
    sleeper.start(gpu_spec("a", model))
    sleeper.executor.submit("a", requests)
    expected = {i: o.token_ids for i, o in sleeper.gather(4).items()}
    used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    for level in (1, 2):
        sleeper.executor.sleep_engine("a", level)  # type: ignore[arg-type]  # 1 and 2
        assert pynvml.nvmlDeviceGetMemoryInfo(handle).used < used
        sleeper.events.clear()
        sleeper.outputs.clear()
        sleeper.executor.wake_engine("a")
        sleeper.wait("ready", "a")
    sleeper.executor.submit("a", requests)
    sleeper.until(lambda: sum(sleeper.executor.progress("a").values()) > 40)
    cut = {o.request: o for o in sleeper.executor.stop_engine("a")}
    sleeper.start(gpu_spec("b", model))
    sleeper.executor.submit("b", [continued(requests[i], o) for i, o in cut.items()])
    outputs = sleeper.gather(4)
    for i, tokens in expected.items():
        before = cut[i].token_ids or () if i in cut else ()
        assert (*before, *(outputs[i].token_ids or ())) == tokens


def test_memory_is_back_after_a_stop_and_after_a_kill(sleeper: Bench, model: Path) -> None:
    """What an engine held is free again when ``stop_engine`` returns, however the engine ended."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    for key in ("stopped", "killed"):
        sleeper.start(gpu_spec(key, model))
        assert pynvml.nvmlDeviceGetMemoryInfo(handle).used > before + (256 << 20)
        if key == "killed":
            os.kill(sleeper.pids(key)[0], signal.SIGKILL)
            sleeper.failure(key)
        sleeper.executor.stop_engine(key)
        assert pynvml.nvmlDeviceGetMemoryInfo(handle).used <= before + (256 << 20)


def test_prepared_engines_are_ready_sooner_and_hold_no_memory(sleeper: Bench, model: Path) -> None:
    """Forked from a process that has imported vLLM, an engine waits without touching the GPU."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    began_s = sleeper.executor.now_s()
    sleeper.start(gpu_spec("whole", model))
    whole_s = sleeper.executor.now_s() - began_s
    sleeper.executor.stop_engine("whole")
    before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    assert sleeper.executor.prepare_engine(gpu_spec("ahead", model))
    replica = sleeper.executor._replicas["ahead"]
    sleeper.until(lambda: replica.phase == "prepared")
    assert pynvml.nvmlDeviceGetMemoryInfo(handle).used <= before + (64 << 20)
    began_s = sleeper.executor.now_s()
    sleeper.start(gpu_spec("ahead", model))
    assert sleeper.executor.now_s() - began_s < whole_s
    sleeper.executor.submit("ahead", [request(0, 20)])
    assert sleeper.gather(1)[0].num_tokens == 20
