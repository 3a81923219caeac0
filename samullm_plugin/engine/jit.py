"""Compilation of functions that are called very often, and where their compiled form is kept.

numba keeps compiled functions beside their source and notices a change of that one file only. Here
the folder is named after the contents of all modules that are compiled together, so that a changed
helper is never run in an old caller, and it falls back to a folder of the user where the
installation is read-only.

So only the functions that Python calls are :class:`Compiled`; what they call is :func:`inner`.
numba itself takes half a second to import, so that is done when one of them is called.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_building = threading.Lock()
_inner: list[Callable[..., Any]] = []
"""Inner functions that numba does not know of yet."""


def inner(function: Callable[..., Any]) -> Any:
    """Let compiled functions call ``function``, compiled; Python runs it as it is."""
    _inner.append(function)
    return function


def _writable(folder: Path) -> bool:
    """Return whether files can be made in ``folder``, creating it if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


class Compiled:
    """A decorator: functions that Python calls compiled, without the interpreter lock.

    Args:
        name: of the modules that are compiled together.
        modules: all of them.
    """

    def __init__(self, name: str, modules: Iterable[Path]) -> None:
        self._name, self._modules = name, tuple(modules)

    @cached_property
    def folder(self) -> Path:
        """Return the folder of compiled code."""
        return self.find_folder()

    def find_folder(self) -> Path:
        """Return the folder of compiled code of exactly these sources.

        The first writable one of: ``NUMBA_CACHE_DIR`` (if set), ``__pycache__`` beside the first
        source, the user's cache folder, the system's temporary folder.
        """
        digest = hashlib.blake2b(metadata.version("numba").encode(), digest_size=8)
        for module in (*self._modules, _HERE / "jit.py", _HERE / "numba_passes.py"):
            digest.update(module.read_bytes())
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        parents = [
            self._modules[0].parent / "__pycache__",
            user_cache / "samullm-plugin",
            Path(tempfile.gettempdir()) / f"samullm-plugin-{os.getuid()}",
        ]
        if os.environ.get("NUMBA_CACHE_DIR"):
            parents.insert(0, Path(os.environ["NUMBA_CACHE_DIR"]))
        for parent in parents:
            folder = parent / f"{self._name}-{digest.hexdigest()}"
            if _writable(folder):
                return folder
        raise OSError(f"no writable folder for compiled code among {[str(p) for p in parents]}")

    def __call__(self, function: Callable[..., Any]) -> CompiledFunction:
        """Compile ``function`` at its first call; kept on disk."""
        return CompiledFunction(function, self)

    def has(self, function: CompiledFunction) -> bool:
        """Return whether a compiled form of ``function`` is kept."""
        return any(self.folder.rglob(f"*.{function.py_func.__name__}-*.nbi"))


class CompiledFunction:
    """A function that Python calls compiled.

    Attributes:
        py_func: the function as it is written.
    """

    def __init__(self, function: Callable[..., Any], compiled: Compiled) -> None:
        self.py_func, self._compiled = function, compiled
        self._dispatcher: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """Call the compiled form."""
        return (self._dispatcher or self._built())(*arguments)

    @property
    def signatures(self) -> Sequence[object]:
        """Return the types of arguments for which it is compiled in this process."""
        return [] if self._dispatcher is None else self._dispatcher.signatures

    def _built(self) -> Any:
        from samullm_plugin.engine.numba_passes import make_compiled, make_inner

        with _building:
            while _inner:
                make_inner(_inner.pop())
            if self._dispatcher is None:
                self._dispatcher = make_compiled(self.py_func, str(self._compiled.folder))
            return self._dispatcher


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
    "engine/queue_schedule.py",
    "engine/batch_queue.py",
    "model/latency.py",
)

compiled = Compiled("engine", (_HERE.parent / name for name in COMPILED_MODULES))


_first_use = threading.Lock()
_announced: set[str] = set()


@contextmanager
def announced_compilation(function: CompiledFunction) -> Iterator[None]:
    """Log before and after if the first call of ``function`` has to compile it.

    One thread at a time: a second one waits instead of compiling the same again.
    """
    name = function.py_func.__name__
    if name in _announced:
        yield
        return
    with _first_use:
        cached = compiled.has(function)
        started = time.perf_counter()
        if not cached:
            logger.warning(
                "compiling the engine simulator (once per version, half a minute); kept in %s",
                compiled.folder,
            )
        yield
        if not cached:
            logger.warning("engine simulator compiled in %.1f s", time.perf_counter() - started)
        _announced.add(name)
