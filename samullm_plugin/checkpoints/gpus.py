"""Kinds of GPU known by name."""

from __future__ import annotations

from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.cluster import Gpu

# Bytes as the driver reports them to CUDA programs; the A100's as recorded with its measurements
# (puddingfjz/vllm @ de1677dc), the others from the makers' data sheets less what ECC and the driver
# keep, rounded down to 0.1 GiB.
_GIB = 2**30
_MEMORY_BYTES = {
    "A100-80GB": 84_986_691_584,
    "A100-40GB": int(39.4 * _GIB),
    "H100-80GB": int(79.1 * _GIB),
    "H200-141GB": int(139.8 * _GIB),
    "L40S-48GB": int(44.4 * _GIB),
    "RTX4090-24GB": int(23.5 * _GIB),
    "RTXPRO6000-96GB": int(94.9 * _GIB),
}


def known_gpus() -> tuple[str, ...]:
    """Return the names of the kinds whose memory is known."""
    return tuple(_MEMORY_BYTES)


def bundled_gpu(name: str) -> Gpu:
    """Return a kind of GPU by name.

    Raises:
        InputError: naming close matches and the kinds there are.
    """
    if name not in _MEMORY_BYTES:
        known = ", ".join(_MEMORY_BYTES)
        raise InputError(
            f"gpu {name!r}: its memory is not known{suggest(name, _MEMORY_BYTES)}; known: {known}; "
            "for another kind give gpu_memory_gib as well"
        )
    return Gpu(name, _MEMORY_BYTES[name])
