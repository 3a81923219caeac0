"""Waits for processes that must end with another one, on however busy a machine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress

import psutil

GONE_CPU_S, GONE_S = 3.0, 120.0
"""A process must be gone before it has worked so long after the other's end, or if it hangs; beside
other work it may wait long for a core."""


def wait_gone(processes: Iterable[psutil.Process], cpu_s: float = GONE_CPU_S) -> float:
    """Wait until processes are gone, and return the seconds that took.

    Args:
        processes: those that must end.
        cpu_s: processor time that each may take until then.
    """
    began, before_s = time.monotonic(), {p: cpu_time_s(p) for p in processes}
    while alive := [p for p in before_s if runs(p)]:
        spent_s = max(cpu_time_s(p) - before_s[p] for p in alive)
        late = spent_s > cpu_s or time.monotonic() > began + GONE_S
        assert not late, f"still there after {spent_s:.1f} s of work: {_told(alive)}"
        time.sleep(0.01)
    return time.monotonic() - began


def runs(process: psutil.Process) -> bool:
    """Return whether a process runs; one that is dead and not yet asked for its end does not.

    While vLLM is imported, it asks a process of its own what a model class is. That one holds no
    device and ends by itself when it has answered, so nobody waits for it.
    """
    try:
        if "vllm.model_executor.models.registry" in process.cmdline():
            return False
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def cpu_time_s(process: psutil.Process) -> float:
    """Return the processor time of a process; one that is gone needs no more."""
    try:
        return float(sum(process.cpu_times()[:2]))
    except psutil.NoSuchProcess:
        return 0.0


def _told(processes: list[psutil.Process]) -> list[str]:
    """Return what processes are, for messages."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())}")
    return found
