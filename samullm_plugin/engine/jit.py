"""Compilation of the simulation loop, and where its compiled form is kept.

numba keeps compiled functions beside their source and notices a change of that one file only. Here
the folder is named after the contents of all compiled modules, so that a changed helper is never
run in an old caller, and it falls back to a folder of the user where the installation is
read-only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import config as numba_config

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILED_MODULES = (
    "engine/records.py",
    "engine/queues.py",
    "engine/prefixes.py",
    "engine/kv_cache.py",
    "engine/running.py",
    "engine/schedule.py",
    "engine/outcome.py",
    "engine/loop.py",
    "engine/kv_groups.py",
    "engine/batch_queue.py",
    "model/latency.py",
)


def _writable(folder: Path) -> bool:
    """Return whether files can be made in ``folder``, creating it if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cache_folder() -> Path:
    """Return the folder of compiled code of exactly these sources.

    The first writable one of: ``NUMBA_CACHE_DIR`` (if set), ``__pycache__`` beside the sources,
    the user's cache folder, the system's temporary folder.
    """
    here = Path(__file__).parent
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for name in COMPILED_MODULES:
        digest.update((here.parent / name).read_bytes())
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parents = [
        here / "__pycache__",
        user_cache / "samullm-plugin",
        Path(tempfile.gettempdir()) / f"samullm-plugin-{os.getuid()}",
    ]
    if os.environ.get("NUMBA_CACHE_DIR"):
        parents.insert(0, Path(os.environ["NUMBA_CACHE_DIR"]))
    for parent in parents:
        folder = parent / f"engine-{digest.hexdigest()}"
        if _writable(folder):
            return folder
    raise OSError(f"no writable folder for compiled code among {[str(p) for p in parents]}")


_FOLDER = cache_folder()


def compiled(function: Function) -> Function:
    """Compile ``function`` at its first call, to run without the interpreter lock; kept on disk."""
    settings: Any = numba_config  # its names are set at run time: type checkers do not see them
    compile_: Any = numba.njit(cache=True, nogil=True, error_model="numpy")
    before = settings.CACHE_DIR
    settings.CACHE_DIR = str(_FOLDER)
    try:
        result: Function = compile_(function)
    finally:
        settings.CACHE_DIR = before
    return result


_first_use = threading.Lock()
_announced: set[str] = set()


@contextmanager
def announced_compilation(function: Any) -> Iterator[None]:
    """Log before and after if the first call of ``function`` has to compile it.

    One thread at a time: a second one waits instead of compiling the same again.
    """
    name = function.py_func.__name__
    if name in _announced:
        yield
        return
    with _first_use:
        cached = any(_FOLDER.rglob(f"*.{name}-*.nbi"))
        started = time.perf_counter()
        if not cached:
            logger.warning(
                "compiling the engine simulator (once per version, half a minute); kept in %s",
                _FOLDER,
            )
        yield
        if not cached:
            logger.warning("engine simulator compiled in %.1f s", time.perf_counter() - started)
        _announced.add(name)
