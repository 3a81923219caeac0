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
    cleared up; an engine that starts before finds too little. Where engines share a GPU, those that
    stay may use their parts of it.
    """

    def __init__(
        self, names: Sequence[str], cards: Sequence[int] | None = None, nvml: Any = None
    ) -> None:
        """Find the GPUs; where NVML cannot tell of them, nothing is waited for.

        Args:
            names: as CUDA knows them: indices or UUIDs.
            cards: by device, the index of its GPU among them; None: every device is one.
            nvml: the module ``pynvml`` or what stands for it.
        """
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._cards = range(len(names)) if cards is None else tuple(cards)
        self._before: dict[int, int] = {}
        self._held: set[int] = set()
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
        """Note what is used before an engine comes to some devices, by nobody who is there."""
        for device in devices:
            memory = self._memory(device)
            if memory is None:
                continue
            if not self._beside(device):
                self._before[self._cards[device]] = int(memory.used)
            self._held.add(device)

    def await_back(self, devices: Sequence[int], timeout_s: float = _BACK_S) -> bool:
        """Wait until no more is used than before; return whether that is so in time."""
        deadline_s = time.monotonic() + timeout_s
        for device in devices if self._nvml is not None else ():
            self._held.discard(device)
            card, beside = self._cards[device], self._beside(device)
            before = self._before.get(card) if beside else self._before.pop(card, None)
            while before is not None and (memory := self._memory(device)) is not None:
                theirs = len(beside) * int(memory.total) // self._cards.count(card)
                used = int(memory.used) - theirs
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

    def _beside(self, device: int) -> list[int]:
        """Return the other parts of a device's GPU that engines hold."""
        card = self._cards[device]
        return [d for d in self._held if d != device and self._cards[d] == card]

    def _memory(self, device: int) -> Any:
        """Return NVML's figures of a device's GPU; None if it has none."""
        if self._nvml is None:
            return None
        try:
            return self._nvml.nvmlDeviceGetMemoryInfo(self._handles[self._cards[device]])
        except self._nvml.NVMLError:
            return None
