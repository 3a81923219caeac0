"""The shipped executors keep their contract; the real engines are in tests/vllm."""

from __future__ import annotations

from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.testing.executor_contract import ExecutorContract


class TestSimulated(ExecutorContract):
    executor_class = SimulatedExecutor
