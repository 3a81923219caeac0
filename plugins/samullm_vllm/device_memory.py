"""Memory of GPUs that engines leave behind them, as NVML tells."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from samullm_vllm.devices import gpu_handle

logger = logging.getLogger(__name__)

_BACK_S = 10.0
_AGAIN_S = 0.02
_SLACK_BYTES = 256 << 20


class DeviceMemory:
    """How much of each GPU was used before engines came, so that it is known when they are gone.

    Devices give memory back only when the last thread of a process has ended and the driver has
    cleared up; an engine that starts before finds too little.
    """

    def __init__(self, names: Sequence[str], nvml: Any = None) -> None:
        """Find the GPUs; where NVML cannot tell of them, nothing is waited for.

        Args:
            names: as CUDA knows them: indices or UUIDs.
            nvml: the module ``pynvml`` or what stands for it.
        """
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._before: dict[int, int] = {}
        if not names:
            return
        try:
            nvml = nvml or import_module("pynvml")
        except ModuleNotFoundError:
            return
        try:
            nvml.nvmlInit()  # for as long as this process lives
            self._handles = [gpu_handle(nvml, name) for name in names]
            self._nvml = nvml
        except nvml.NVMLError as error:
            logger.warning("NVML cannot tell how much memory of the GPUs is used: %s", error)

    def note_before(self, devices: Sequence[int]) -> None:
        """Note what is used before an engine comes to some devices."""
        for device in devices:
            used = self._used(device)
            if used is not None:
                self._before[device] = used

    def await_back(self, devices: Sequence[int], timeout_s: float = _BACK_S) -> bool:
        """Wait until no more is used than before; return whether that is so in time."""
        deadline_s = time.monotonic() + timeout_s
        for device in devices:
            before = self._before.pop(device, None)
            while before is not None and (used := self._used(device)) is not None:
                if used <= before + _SLACK_BYTES:
                    break
                if time.monotonic() > deadline_s:
                    logger.warning(
                        "device %d: %d MiB more are used than before an engine that has ended",
                        device, (used - before) >> 20,
                    )  # fmt: skip
                    return False
                time.sleep(_AGAIN_S)
        return True

    def _used(self, device: int) -> int | None:
        if self._nvml is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handles[device]).used)
        except self._nvml.NVMLError:
            return None
