"""Weights on disk."""

from __future__ import annotations

import os
from pathlib import Path

_SUFFIXES = (".safetensors", ".bin", ".pt")


def read_ahead(model: str) -> None:
    """Ask the kernel to have a model folder's weights in the page cache; nothing if there is none.

    The kernel reads in the background and drops pages again if memory is short.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    for path in sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES):
        try:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError:
            continue  # the engine that loads it will say what is wrong
