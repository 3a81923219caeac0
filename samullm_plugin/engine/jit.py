"""Compilation of functions that are called very often, and where their compiled form is kept.

numba keeps compiled functions beside their source and notices a change of that one file only. Here
the folder is named after the contents of all modules that are compiled together, so that a changed
helper is never run in an old caller, and it falls back to a folder of the user where the
installation is read-only.

Left to itself, numba optimises each function, makes machine code and a wrapper for Python of it,
and then does all of it again in every caller, from the bottom to the top: of some seventy functions
that takes twice as long as of the few that Python calls. So only these are :class:`Compiled`;
what they call is :func:`inner`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from numba.core import config as numba_config
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering
from numba.extending import register_jitable

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


class _Unemitted(JITCodeLibrary):  # type: ignore[misc]  # numba has no types
    """The code of an inner function: callers link it in as it is and optimise the whole."""

    def _optimize_final_module(self) -> None:
        """Do nothing."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _InnerLowering(NativeLowering):  # type: ignore[misc]  # as above
    """Lowering without machine code."""

    _name = "inner_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _Unemitted(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        # Callers find it by what Python would call: of the type that numba expects, never called.
        result = state["cr"]._replace(cfunc=[].append)
        state.targetctx.insert_user_function(result.cfunc, result.fndesc, [state.library])
        state["cr"] = result
        return True


class _InnerCompiler(CompilerBase):  # type: ignore[misc]  # as above
    """numba's compiler, but for the lowering."""

    def define_pipelines(self) -> list[Any]:
        """Return numba's pipeline with ``_InnerLowering``."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_InnerLowering, NativeLowering)
        passes.passes = [p for p in passes.passes if p[0] is not NativeLowering]
        passes.finalize()
        return [passes]


CHECKED_NUMBA_VERSIONS = range(60, 66)
"""Of ``0.x``: the compiler of the others may work differently, so that theirs is left as it is."""


def _inner_options() -> dict[str, Any]:
    version = re.match(r"0\.(\d+)\.", numba.__version__)
    checked = version is not None and int(version[1]) in CHECKED_NUMBA_VERSIONS
    more = {"pipeline_class": _InnerCompiler} if checked else {}
    return {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, **more}


def inner(function: Callable[..., Any]) -> Any:
    """Let compiled functions call ``function``, compiled; Python runs it as it is."""
    return register_jitable(**_inner_options())(function)


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
        self.folder = self.find_folder()

    def find_folder(self) -> Path:
        """Return the folder of compiled code of exactly these sources.

        The first writable one of: ``NUMBA_CACHE_DIR`` (if set), ``__pycache__`` beside the first
        source, the user's cache folder, the system's temporary folder.
        """
        digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
        for module in (*self._modules, _HERE / "jit.py"):
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

    def __call__(self, function: Callable[..., Any]) -> Any:
        """Compile ``function`` at its first call; kept on disk."""
        settings: Any = numba_config  # its names are set at run time: unknown to type checkers
        compile_: Any = numba.njit(cache=True, **_OPTIONS)
        before = settings.CACHE_DIR
        settings.CACHE_DIR = str(self.folder)
        try:
            return compile_(function)
        finally:
            settings.CACHE_DIR = before

    def has(self, function: Any) -> bool:
        """Return whether a compiled form of ``function`` is kept."""
        return any(self.folder.rglob(f"*.{function.py_func.__name__}-*.nbi"))


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

compiled = Compiled("engine", (_HERE.parent / name for name in COMPILED_MODULES))


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
