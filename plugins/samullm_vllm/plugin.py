"""Registers the executors whose engines are processes, and ``samullm doctor``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from samullm_plugin import Executor, hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def register_executors(register: Callable[[type[Executor]], None]) -> None:
    """Offer the executors ``vllm`` and ``emulated``; neither imports vLLM in this process."""
    from samullm_vllm.emulated_executor import EmulatedExecutor
    from samullm_vllm.vllm_executor import VllmExecutor

    register(VllmExecutor)
    register(EmulatedExecutor)


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """Add ``samullm doctor``."""
    from samullm_vllm.doctor import doctor

    app.command("doctor")(doctor)
