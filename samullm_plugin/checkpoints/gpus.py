"""Kinds of GPU known by name: what their data sheets say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.cluster import Gpu

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class DataSheet:
    """Published figures of a kind of GPU.

    Attributes:
        memory_bytes: as the driver reports them to programs: those of the A100 80 GB and RTX 4090
            as recorded with measurements, the others the maker's less what ECC and the driver
            keep, rounded down to 0.1 GiB.
        multiprocessors: streaming multiprocessors (compute units).
        peak_flops: dense FLOP/s in half precision with 32-bit sums, without sparsity.
        bandwidth: bytes/s of device memory.
        link_bandwidth: bytes/s between devices, one way: NVLink or Infinity Fabric where there is
            one, else PCIe.
    """

    memory_bytes: int
    multiprocessors: int
    peak_flops: float
    bandwidth: float
    link_bandwidth: float


def _sheet(gib: float, processors: int, tera: float, memory: float, link: float) -> DataSheet:
    """Return a sheet from GiB, teraflops, terabytes/s and gigabytes/s."""
    return DataSheet(int(gib * _GIB), processors, tera * 1e12, memory * 1e12, link * 1e9)


DATA_SHEETS: Mapping[str, DataSheet] = {
    "A100-80GB": DataSheet(84_986_691_584, 108, 312e12, 2.039e12, 300e9),
    "A100-40GB": _sheet(39.4, 108, 312, 1.555, 300),
    "H100-80GB": _sheet(79.1, 132, 989, 3.35, 450),
    "H100-PCIE-80GB": _sheet(79.1, 114, 756, 2.0, 300),
    "H100-NVL-94GB": _sheet(93.1, 132, 835, 3.938, 300),
    "H200-141GB": _sheet(139.8, 132, 989, 4.8, 450),
    "B200-180GB": _sheet(178.3, 148, 2250, 8.0, 900),
    "L4-24GB": _sheet(22.0, 58, 121, 0.3, 32),
    "L40S-48GB": _sheet(44.4, 142, 362, 0.864, 32),
    "A10-24GB": _sheet(22.1, 72, 125, 0.6, 32),
    "A6000-48GB": _sheet(47.4, 84, 154.8, 0.768, 56),
    "RTX4090-24GB": DataSheet(25_250_627_584, 128, 165.2e12, 1.008e12, 32e9),
    "RTX5090-32GB": _sheet(31.3, 170, 209.5, 1.792, 64),
    "RTXPRO6000-96GB": _sheet(94.9, 188, 503.8, 1.792, 64),
    "MI300X-192GB": _sheet(191.5, 304, 1307, 5.3, 448),
}
"""By name; half precision of consumer cards at the rate with 32-bit sums."""

_OTHER_NAMES: Mapping[str, str] = {
    "a100": "A100-80GB", "a10080pcie": "A100-80GB", "a10040pcie": "A100-40GB",
    "h100": "H100-80GB", "h100hbm3": "H100-80GB",
    "h100nvl": "H100-NVL-94GB", "h100pcie": "H100-PCIE-80GB", "h200": "H200-141GB",
    "b200": "B200-180GB", "b200192": "B200-180GB", "l4": "L4-24GB", "l40s": "L40S-48GB",
    "a10": "A10-24GB", "a10g": "A10-24GB", "a6000": "A6000-48GB", "rtxa6000": "A6000-48GB",
    "rtx4090": "RTX4090-24GB", "4090": "RTX4090-24GB", "rtx5090": "RTX5090-32GB",
    "5090": "RTX5090-32GB", "rtxpro6000": "RTXPRO6000-96GB", "pro6000": "RTXPRO6000-96GB",
    "rtxpro6000blackwellserveredition": "RTXPRO6000-96GB",
    "rtxpro6000blackwellworkstationedition": "RTXPRO6000-96GB", "mi300x": "MI300X-192GB",
}  # fmt: skip


def _plain(name: str) -> str:
    """Return a device name without maker, form factor, unit and punctuation."""
    text = re.sub(r"nvidia|geforce|amd|instinct|tesla|generation|sxm\d?|oam", "", name.lower())
    return re.sub(r"[^a-z0-9]|gi?b\b", "", text)


def known_name(name: str) -> str | None:
    """Return the name under which a kind of GPU is known, or None.

    Drivers' names are understood as well, such as ``NVIDIA H100 80GB HBM3``.
    """
    if name in DATA_SHEETS:
        return name
    plain = _plain(name)
    for known in DATA_SHEETS:
        if _plain(known) == plain or _plain(known) == plain.removesuffix("hbm3"):
            return known
    found = _OTHER_NAMES.get(plain) or _OTHER_NAMES.get(plain.removesuffix("hbm3"))
    if found is not None or not plain:
        return found
    # The driver writes memory behind the kind: "A100-SXM4-40GB".
    stem = re.sub(r"(\d+)(hbm\d\w*)?$", "", plain)
    return next((k for k in DATA_SHEETS if _plain(k) == plain or _plain(k) == stem), None)


def known_gpus() -> tuple[str, ...]:
    """Return the names of the kinds whose data sheets are known."""
    return tuple(DATA_SHEETS)


def bundled_gpu(name: str) -> Gpu:
    """Return a kind of GPU by name.

    Raises:
        InputError: naming close matches and the kinds there are.
    """
    known = known_name(name)
    if known is None:
        kinds = ", ".join(DATA_SHEETS)
        raise InputError(
            f"gpu {name!r}: its memory is not known{suggest(name, DATA_SHEETS)}; known: {kinds}; "
            "for another kind give gpu_memory_gib as well"
        )
    return Gpu(name if name in DATA_SHEETS else known, DATA_SHEETS[known].memory_bytes)


def described_device(name: str) -> DataSheet | None:
    """Return what the driver says of a device of this machine, None if it has none of that name.

    Bandwidth follows from the memory's clock and bus, FLOP/s from cores and clock at four times
    the rate of 32-bit numbers, as matrix units of half precision have at least.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            said = pynvml.nvmlDeviceGetName(handle)
            said = said.decode() if isinstance(said, bytes) else str(said)
            if _plain(said) != _plain(name):
                continue
            memory_hz = 1e6 * pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
            core_hz = 1e6 * pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
            bus_bytes = pynvml.nvmlDeviceGetMemoryBusWidth(handle) / 8
            cores = pynvml.nvmlDeviceGetNumGpuCores(handle)
            return DataSheet(
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                max(cores // 128, 1),
                4 * 2 * cores * core_hz,
                2 * memory_hz * bus_bytes,
                32e9,
            )
    except pynvml.NVMLError:
        return None
    return None
