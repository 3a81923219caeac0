"""What devices there are, without any."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from samullm_vllm import device_locks, general
from samullm_vllm.devices import (
    cpu_cores,
    cuda_cluster,
    cuda_devices,
    detect_platform,
    lock_names,
)
from samullm_vllm.engine import engine_args, usable_kv_tokens
from samullm_vllm.processes import RecordedProcess, kill
from samullm_vllm.vllm_executor import VllmExecutor, read_ahead

from samullm_plugin import Cluster, Gpu, InputError
from samullm_plugin.host.interfaces.executor import EngineSpec
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import EngineOptions, ModelSpec
from samullm_plugin.model.cluster import Network


def fake_nvml(pairs: set[frozenset[int]], count: int) -> SimpleNamespace:
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetName=lambda h: b"NVIDIA A100",
        nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(total=80 << 30),
        nvmlDeviceGetP2PStatus=lambda a, b, kind: 0 if frozenset((a, b)) in pairs else 5,
        NVML_P2P_CAPS_INDEX_NVLINK=2,
        NVML_P2P_STATUS_OK=0,
        NVMLError=RuntimeError,
    )


def test_nvlink_groups_are_those_joined_with_each_other() -> None:
    pairs = {frozenset(p) for p in ((0, 1), (2, 3), (1, 2))}
    cluster = cuda_cluster(nvml=fake_nvml(pairs, 5))
    assert cluster == Cluster((Gpu("NVIDIA A100", 80 << 30),) * 5, ((0, 1), (2, 3), (4,)))


def test_groups_follow_the_visible_devices() -> None:
    """Devices are numbered as the run has them, whatever their physical indices."""
    nvml = fake_nvml({frozenset((1, 3))}, 4)
    nvml.nvmlDeviceGetHandleByUUID = {"GPU-a": 1}.get
    cluster = cuda_cluster(["3", "0", "GPU-a"], nvml)
    assert cluster.nvlink_groups == ((0, 2), (1,))

    def unknown(*arguments: object) -> int:
        raise RuntimeError("not supported")

    nvml.nvmlDeviceGetP2PStatus = unknown
    assert cuda_cluster(["3", "0"], nvml).nvlink_groups == ((0,), (1,))


def test_a_card_has_one_lock_however_it_is_written() -> None:
    whole = ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-1c5d5a45-0000-0000-0000-000000000000"]
    nvml = fake_nvml(set(), 2)
    nvml.nvmlDeviceGetUUID = whole.__getitem__

    def by_uuid(name: str) -> int:
        if name not in whole:
            raise RuntimeError("Not Found")
        return whole.index(name)

    nvml.nvmlDeviceGetHandleByUUID = by_uuid
    names = ["0", "1", whole[0], "GPU-1c5d"]
    locks = lock_names("cuda", names, nvml)
    assert locks["0"] == locks[whole[0]] == f"cuda:{whole[0]}"
    assert locks["1"] == locks["GPU-1c5d"] == f"cuda:{whole[1]}"
    assert cuda_cluster(["GPU-1c5d"], nvml).num_gpus == 1
    with pytest.raises(InputError, match="Not Found"):
        lock_names("cuda", ["GPU-77"], nvml)
    assert lock_names("cpu", ["0", "3"]) == {"0": "cpu:0", "3": "cpu:3"}


def test_a_driver_that_does_not_answer_is_told() -> None:
    """A broken driver is wrong input with a remedy, not a traceback."""

    def refuse() -> None:
        raise RuntimeError("Driver Not Loaded")

    nvml = fake_nvml(set(), 1)
    nvml.nvmlInit = refuse
    with pytest.raises(InputError, match=r"Driver Not Loaded.*nvidia-smi"):
        cuda_cluster(nvml=nvml)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", []),
        ("3, 1", ["3", "1"]),
        ("1,7,2", ["1"]),  # there is no GPU 7
        ("1,-1,2", ["1"]),
        ("-1", []),
        ("NoDevFiles", []),
        ("2x,1", ["2", "1"]),
        ("0,1,0", []),  # a GPU named twice hides all
        ("0,,1", ["0"]),
        ("GPU-ab1,GPU-cd", ["GPU-ab1", "GPU-cd"]),  # beginnings are enough
        ("GPU-ab,GPU-cd", []),  # of two
        ("GPU-cd,GPU-ff,GPU-ab1", ["GPU-cd"]),
        ("GPU-cd,0", ["GPU-cd"]),
        ("0,GPU-cd", ["0"]),
        ("GPU-cd,GPU-cd3", []),  # the same card
        ("MIG-1,MIG-2", ["MIG-1"]),  # CUDA shows one instance
        ("MIG-9", []),
    ],
)
def test_visible_devices_are_those_that_cuda_shows(visible: str, expected: list[str]) -> None:
    nvml = fake_nvml(set(), 4)
    uuids = ["GPU-ab1", "GPU-ab2", "GPU-cd3", "GPU-ef4"]
    nvml.nvmlDeviceGetUUID = lambda h: uuids[h]

    def by_uuid(name: str) -> str:
        if name not in ("MIG-1", "MIG-2"):
            raise nvml.NVMLError("Not Found")
        return name

    nvml.nvmlDeviceGetHandleByUUID = by_uuid
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": visible}, nvml) == expected


def test_all_devices_are_visible_if_nothing_is_said() -> None:
    assert cuda_devices({}, fake_nvml(set(), 3)) == ["0", "1", "2"]


@pytest.mark.gpu
def test_this_machines_gpus() -> None:
    assert detect_platform() == "cuda"
    assert cuda_cluster().num_gpus >= 1


def test_cores_are_this_processs() -> None:
    assert cpu_cores() == sorted(cpu_cores())


def test_blocks_are_fixed_and_one_is_never_used() -> None:
    args = engine_args("m", {"block_size": 32, "dtype": "float32"}, kv_tokens=1000, platform="cpu")
    assert args["num_gpu_blocks_override"] == 1000 // 32 + 1
    assert args["kv_cache_memory_bytes"]
    assert args["enforce_eager"]
    on_cuda = engine_args("m", {"block_size": 16}, kv_tokens=1000, platform="cuda")
    assert not on_cuda["enforce_eager"]
    assert on_cuda["gpu_memory_utilization"] < 0.1  # a start beside another's memory is no error


def test_cores_keep_no_more_than_their_longest_sequences() -> None:
    """A cache of 8 GiB for a small model made its start 20 s longer."""
    plain = EngineOptions(max_num_seqs=8, block_size=16)
    model = ModelSpec("m", 1000, engine=plain)
    spec = EngineSpec("e", 0, model, (0,), 1, 1, 8_000_000)
    assert usable_kv_tokens(spec, 32) == 8 * (32 + 1) * 32
    assert usable_kv_tokens(replace(spec, kv_cache_tokens=500), 32) == 500
    cached = replace(model, engine=replace(plain, enable_prefix_caching=True))
    assert usable_kv_tokens(replace(spec, model=cached), 32) == 8_000_000  # it keeps what was read


def test_both_executors_are_found_without_importing_vllm() -> None:
    """Listing plugins costs nothing; engine processes must be free of the simulator's compiler."""
    code = (
        "import sys; from samullm_vllm import plugin; plugin.register_executors(print);"
        "assert not {'vllm', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    code = (
        "import sys, samullm_vllm.worker, samullm_vllm.fork_server, samullm_vllm.general;"
        "assert not {'numba', 'llvmlite', 'vllm', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    host = PluginHost()
    names = {p.name for p in host.provenance() if p.kind == "executor"}
    assert {"vllm", "emulated"} <= names


def test_general_plugin_is_harmless_twice() -> None:
    general.register()
    general.register()


def test_reading_ahead_ignores_what_is_not_there(tmp_path: Path) -> None:
    read_ahead(str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 5000)
    read_ahead(str(tmp_path))


def test_only_the_recorded_process_is_killed() -> None:
    """A process of the same id that was started at another time is somebody else's."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        recorded = RecordedProcess.of(process.pid)
        assert recorded is not None
        assert kill([RecordedProcess(process.pid, recorded.start_ticks - 1)])
        assert process.poll() is None
        assert kill([recorded])
        process.wait()


def test_children_are_killed_too() -> None:
    code = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = RecordedProcess.of(int(process.stdout.readline()))
        recorded = RecordedProcess.of(process.pid)
        assert child is not None
        assert recorded is not None
        assert kill([recorded])
        assert child.find() is None


def test_machines_other_than_this_one_are_left_to_ray() -> None:
    core = Gpu("core", 1 << 30)
    cluster = Cluster((core, core), (), ((0,), (1,)), network=Network(1e9, 1e-4))
    with pytest.raises(InputError, match=r"has 2 machines, .* its own only; .*--executor ray"):
        VllmExecutor().open(cluster, None)


@pytest.mark.timeout(60)
def test_a_held_device_is_refused_however_often_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel keeps questions for the holder, who never reads them, and then takes no more."""
    monkeypatch.setattr(device_locks.socket, "SOMAXCONN", 4)
    holder, other = device_locks.DeviceLocks(), device_locks.DeviceLocks()
    name = f"test-{os.getpid()}"
    assert holder.take({"0": name}, 1) == (["0"], [])
    told = [other.take({"0": name}, 1) for _ in range(8)]
    assert told[0] == ([], [f"0 (process {os.getpid()})"])
    assert told[-1] == ([], ["0"])
    holder.release()
    assert other.take({"0": name}, 1) == (["0"], [])
    other.release()
