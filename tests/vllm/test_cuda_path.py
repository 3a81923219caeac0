"""The way engines take on CUDA, walked with vLLM's CPU build: all of it but the kernels.

Forking from a process that must not touch CUDA, devices by their names in the environment, vLLM's
arguments, and memory that has to be back are the same as on GPUs; engines compute on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from samullm_vllm.device_memory import DeviceMemory
from samullm_vllm.devices import Platform
from samullm_vllm.engine import CUDA_BEGUN, SHARE_OF_GPU
from samullm_vllm.launching import FreshLauncher, child_environment
from samullm_vllm.protocol import Start
from samullm_vllm.vllm_executor import VllmExecutor, VllmOptions

from samullm_plugin import EngineOptions, EngineSpec, ModelSpec, RunError
from tests.vllm.conftest import CLUSTER, Bench, request, spec


@pytest.fixture(scope="module", params=["fork", "fresh"])
def cuda(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """An executor that takes this machine for one with two GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
        options = VllmOptions(platform="cuda", start_method=request.param, heartbeat_s=0.02)
        executor = VllmExecutor(options)
        executor.open(CLUSTER, tmp_path_factory.mktemp(f"run-{request.param}"))
        try:
            yield Bench(executor)
        finally:
            executor.close()


@pytest.fixture
def tiny_cuda_start(tmp_path: Path) -> Start:
    """What an engine on CUDA is told of a model that plans give nearly the whole GPU."""
    engine = EngineOptions(gpu_memory_utilization=0.95)
    model = ModelSpec("tiny", 512, path=str(tmp_path), engine=engine)
    executor = VllmExecutor(VllmOptions(platform="cuda"))
    executor._platform = "cuda"
    executor._launcher = SimpleNamespace(rank_processes=False)  # type: ignore[assignment]  # all of it that is asked
    return executor._start_message(spec("a", tmp_path, model=model), "", ahead=False)


def log_of(bench: Bench, key: str) -> str:
    return Path(bench.executor._replicas[key].log).read_text()


def gpu_spec(key: str, folder: Path, devices: tuple[int, ...]) -> EngineSpec:
    """Return a replica whose weights need no files of their own."""
    base = spec(key, folder, devices)
    extra = (("enforce_eager", True), ("load_format", "dummy"))
    return replace(base, model=replace(base.model, engine=replace(base.model.engine, extra=extra)))


@pytest.mark.vllm
def test_engines_see_their_own_devices(cuda: Bench, tiny: Path) -> None:
    """Prepared for one device and started on another, an engine sees the second one only."""
    cuda.start(gpu_spec("first", tiny, (0,)))
    cuda.executor.prepare_engine(gpu_spec("ahead", tiny, (0,)))
    replica = cuda.executor._replicas["ahead"]
    cuda.until(lambda: replica.phase == "prepared")
    cuda.start(gpu_spec("ahead", tiny, (1,)))
    for key in ("first", "ahead"):
        cuda.executor.submit(key, [request(ord(key[0]), 5)])
    cuda.gather(2)
    assert "'CUDA_VISIBLE_DEVICES': '4'" in log_of(cuda, "first")
    assert "'CUDA_VISIBLE_DEVICES': '7'" in log_of(cuda, "ahead")
    parts = replica.start_parts
    assert next(iter(parts)) == "configuration"
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["model and weights"] > 0
    assert parts["first iterations"] > 0
    with pytest.raises(RunError, match="already"):
        cuda.executor.start_engine(gpu_spec("ahead", tiny, (1,)))
    for key in ("first", "ahead"):
        cuda.executor.stop_engine(key)


@pytest.mark.vllm
def test_prepared_and_not_wanted_after_all(cuda: Bench, tiny: Path) -> None:
    cuda.executor.prepare_engine(gpu_spec("unwanted", tiny, (0,)))
    cuda.until(lambda: bool(cuda.executor._replicas["unwanted"].launched.pids))
    launched = cuda.executor._replicas["unwanted"].launched
    assert cuda.executor.stop_engine("unwanted") == []
    assert all(p.find() is None for p in launched.processes)


def test_the_plans_share_of_a_gpu_is_not_vllms(tiny_cuda_start: Start) -> None:
    """vLLM would refuse to start where 0.95 of the card is not free, whatever the engine needs."""
    arguments = tiny_cuda_start.engine_args
    assert arguments["gpu_memory_utilization"] == SHARE_OF_GPU
    assert arguments["num_gpu_blocks_override"] == 8192 // 16 + 1
    assert arguments["async_scheduling"] is True


@pytest.mark.vllm
@pytest.mark.parametrize("bad", [True, False])
def test_a_process_that_has_counted_devices_is_not_forked(bad: bool) -> None:
    """Nothing is initialised in it then, but torch refuses CUDA in processes forked from it."""
    code = (
        "import torch; from samullm_vllm.engine import cuda_in_use;"
        f"torch.cuda._is_in_bad_fork = lambda: {bad};"
        "assert not torch.cuda.is_initialized(); print(cuda_in_use())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{bad}\n"


@pytest.mark.parametrize("method", ["auto", "fork"])
def test_where_forking_would_break_cuda_engines_are_fresh(
    method: Literal["auto", "fork"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Unless forking was asked for; then the message names the way out."""

    class Refusing(FreshLauncher):
        def __init__(self, platform: Platform, environment: Mapping[str, str], log: object) -> None:
            super().__init__(platform, environment)

        def await_ready(self, timeout_s: float) -> str | None:
            return f"{CUDA_BEGUN}; give the executor the option start_method=fresh"

    monkeypatch.setattr("samullm_vllm.fork_launching.ForkLauncher", Refusing)
    monkeypatch.setattr("samullm_vllm.vllm_executor.check_installed", lambda executor: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    executor = VllmExecutor(VllmOptions(platform="cuda", start_method=method))
    try:
        if method == "fork":
            with pytest.raises(RunError, match="start_method=fresh"):
                executor.open(CLUSTER, tmp_path / "run")
        else:
            executor.open(CLUSTER, tmp_path / "run")
            assert type(executor._launcher) is FreshLauncher
            assert "imports vLLM for itself" in caplog.text
    finally:
        executor.close()


@pytest.mark.vllm
def test_made_up_weights_do_not_sleep(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM cannot load weights again that no file holds."""
    executor = VllmExecutor(VllmOptions(platform="cuda", sleep_mode=True))
    replica = SimpleNamespace(spec=gpu_spec("a", tiny, (0,)), phase="ready", unfinished={})
    executor._replicas["a"] = replica  # type: ignore[assignment]  # as much of one as is looked at
    executor._platform = "cuda"
    assert executor.can_sleep
    assert not executor.sleep_engine("a")
    assert "engine a is stopped and does not sleep: weights of load_format dummy" in caplog.text
    assert not VllmExecutor(VllmOptions(platform="cuda")).can_sleep


def test_what_compilers_keep_outlives_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches do not lie in the run's temporary folder; what the user has set stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_USE_FLASHINFER_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    found = child_environment("cuda", {"TMPDIR": "/tmp/samullm-x"})
    assert found["TRITON_CACHE_DIR"] == "/cache/samullm/triton"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/cache/samullm/inductor"
    assert found["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    monkeypatch.setattr("samullm_vllm.launching.find_spec", lambda name: None)
    assert child_environment("cuda", {})["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setattr("samullm_vllm.launching.find_spec", lambda name: object())
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in child_environment("cuda", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert child_environment("cuda", {})["TRITON_CACHE_DIR"] == "/mine"
    assert 0 < SHARE_OF_GPU < 0.1


class FakeNvml:
    """Two GPUs whose used memory is a list to be read off."""

    NVMLError = RuntimeError

    def __init__(self, used: list[int]) -> None:
        self.used = used

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        if name != "GPU-b":
            raise RuntimeError("Not Found")
        return 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return ("GPU-a", "GPU-b")[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        used = self.used.pop(0) if len(self.used) > 1 else self.used[0]
        return SimpleNamespace(used=used, total=80 << 30)


def test_memory_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """An engine counts as gone when as much is free as before it came."""
    gib = 1 << 30
    nvml = FakeNvml([2 * gib, 40 * gib, 40 * gib, 2 * gib])
    memory = DeviceMemory(["0", "GPU-b"], nvml=nvml)
    memory.note_before([1])
    assert memory.await_back([1])
    assert nvml.used == [2 * gib]  # it was asked until it was back
    memory.note_before([0])
    nvml.used = [9 * gib]
    assert not memory.await_back([0], 0.1)
    assert "7168 MiB more are used" in caplog.text
    assert memory.await_back([0], 0.0)  # said once


def test_memory_of_a_shared_gpu_is_back_when_the_parts_of_the_others_are_all_that_is_used() -> None:
    """Engines on three of four parts of a GPU of 80 GiB, of which somebody else uses 2 GiB."""
    gib = 1 << 30
    nvml = FakeNvml([2 * gib])
    memory = DeviceMemory(["GPU-b"], [0, 0, 0, 0], nvml)
    memory.note_before([0])
    nvml.used = [20 * gib]
    memory.note_before([1])
    memory.note_before([2])
    nvml.used = [60 * gib, 43 * gib, 42 * gib]
    assert memory.await_back([0])
    assert nvml.used == [42 * gib]
    nvml.used = [23 * gib]
    assert not memory.await_back([2], 0.1)  # 20 GiB are the other engine's at most
    nvml.used = [22 * gib]
    memory.note_before([2])
    assert memory.await_back([2])
    nvml.used = [3 * gib]
    assert not memory.await_back([1], 0.1)  # now nobody's
    assert memory.await_back([1], 0.0)  # said once


def test_where_nvml_cannot_tell_nothing_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    memory = DeviceMemory(["GPU-unknown"], nvml=FakeNvml([0]))
    memory.note_before([0])
    assert memory.await_back([0])
    assert "NVML cannot tell" in caplog.text
