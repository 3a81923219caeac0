"""How numba compiles what only compiled functions call.

Left to itself, numba optimises each function, makes machine code and a wrapper for Python of it,
and then does all of it again in every caller, from the bottom to the top: of some seventy functions
that takes twice as long as of the few that Python calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numba
from numba.core import config as numba_config
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering
from numba.extending import register_jitable

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


def make_inner(function: Callable[..., Any]) -> None:
    """Let compiled functions call ``function``, compiled; Python runs it as it is."""
    register_jitable(**_inner_options())(function)


def make_compiled(function: Callable[..., Any], folder: str) -> Any:
    """Return ``function``, compiled at its first call, without the interpreter lock.

    Args:
        function: any.
        folder: where its compiled form is kept.
    """
    settings: Any = numba_config  # its names are set at run time: unknown to type checkers
    compile_: Any = numba.njit(cache=True, **_OPTIONS)
    before = settings.CACHE_DIR
    settings.CACHE_DIR = folder
    try:
        return compile_(function)
    finally:
        settings.CACHE_DIR = before
