"""Registers the executors whose engines are processes."""

from __future__ import annotations

from collections.abc import Callable

from samullm_plugin import Executor, hookimpl


@hookimpl
def register_executors(register: Callable[[type[Executor]], None]) -> None:
    """Offer the executors ``vllm`` and ``emulated``; neither imports vLLM in this process."""
    from samullm_vllm.emulated_executor import EmulatedExecutor
    from samullm_vllm.vllm_executor import VllmExecutor

    register(VllmExecutor)
    register(EmulatedExecutor)
