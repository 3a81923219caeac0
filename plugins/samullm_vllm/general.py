"""What runs in every vLLM process of this environment, by the group ``vllm.general_plugins``.

vLLM calls :func:`register` in each process it starts, including those of people who never heard of
this project: it must be quick, harmless and safe to call twice.
"""

from __future__ import annotations

import ctypes
import platform

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XTILEDATA = 18


def register() -> None:
    """Ask the kernel for the use of AMX tiles.

    vLLM's CPU kernels may use the tiles before anything has asked for them, and then die of an
    illegal instruction when an engine's first batch is very small. On processors without AMX, and
    where the permission is there already, asking changes nothing.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return
    ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA)
