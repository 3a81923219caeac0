"""Locks on the devices that runs on this machine hold, so that no two use the same one unawares.

A lock is a listening socket in Linux's abstract name space: there is no file to be left behind,
and the end of the process ends it, however that comes about.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from contextlib import suppress

_CREDENTIALS = struct.Struct("iII")

SOMEBODY = 0
"""Holds a device, and has been asked so often who it is that the kernel queues no more questions:
nobody answers them."""


class DeviceLocks:
    """The devices one executor holds."""

    def __init__(self) -> None:
        """Hold none."""
        self._held: list[socket.socket] = []

    def acquire(self, device: str) -> int | None:
        """Lock a device; return the id of the process that holds it already, or ``SOMEBODY``.

        Args:
            device: its name on this machine, such as ``cpu:0``.
        """
        name = f"\0samullm-device-{device}"
        while True:
            mine = socket.socket(socket.AF_UNIX)
            try:
                mine.bind(name)
            except OSError:
                mine.close()
                if (holder := _holder(name)) is not None:
                    return holder
                continue  # it has just been let go
            mine.listen(socket.SOMAXCONN)
            self._held.append(mine)
            return None

    def take(self, locks: Mapping[str, str], count: int) -> tuple[list[str], list[str]]:
        """Lock the first ``count`` devices that nobody holds, or none if there are fewer.

        Args:
            locks: what devices are locked as, by their names.
            count: how many are wanted.

        Returns:
            The names of those that are locked now, and of those that are held, and by whom.
        """
        mine: list[str] = []
        taken: list[str] = []
        for name, lock in locks.items():
            if len(mine) == count:
                break
            holder = self.acquire(lock)
            if holder is None:
                mine.append(name)
            else:
                taken.append(name if holder == SOMEBODY else f"{name} (process {holder})")
        if len(mine) < count:
            self.release()
            mine.clear()
        return mine, taken

    def release(self) -> None:
        """Let go of all devices; safe to call twice."""
        for held in self._held:
            held.close()
        self._held.clear()


def _holder(name: str) -> int | None:
    """Return the id of the process that listens at a name; None if none does any more."""
    with socket.socket(socket.AF_UNIX) as asking, suppress(OSError):
        asking.setblocking(False)
        try:
            asking.connect(name)
        except BlockingIOError:
            return SOMEBODY
        told = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(told)[0])
    return None
