"""The folder in which a run's engines keep what lasts only as long as they do."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

PREFIX = "samullm-"


def make_scratch() -> Path:
    """Make such a folder."""
    return Path(tempfile.mkdtemp(prefix=PREFIX))


def remove_scratch(folder: str | Path) -> None:
    """Remove it, and the shared memory that ranks who met in it have named after it."""
    path = Path(folder)
    if not path.name.startswith(PREFIX):
        return
    for left in Path("/dev/shm").glob(f"{path.name}-*"):
        left.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
