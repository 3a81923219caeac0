"""Engines on several machines: on each of them vLLM starts the processes of the ranks there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

from samullm_vllm.processes import end_with_parent

_worker_main = WorkerProc.worker_main


def prepare_workers(cores: Sequence[int]) -> None:
    """Have vLLM start the processes of this machine's ranks as a replica needs them.

    They are forked where that is safe: on CPUs vLLM starts fresh interpreters, each of which
    imports it for itself. That choice is made with the configuration, so this comes after it.

    Args:
        cores: CPU core of each rank; empty: not bound.
    """
    if current_platform.is_cpu() and len(os.listdir("/proc/self/task")) == 1:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    run = partial(_run_worker, os.getpid(), tuple(cores))
    WorkerProc.worker_main = staticmethod(run)


def _run_worker(parent: int, cores: Sequence[int], /, *args: Any, **kwargs: Any) -> None:
    """Be a rank's process, which ends with its parent and keeps to its core.

    vLLM's own looks between batches whether its parent is gone, and one that waits within a batch
    for a rank of another machine would hold its device for ever. It binds ranks by variables that
    OpenMP reads once, which in a forked process it has done.
    """
    end_with_parent(parent)
    if cores:
        os.sched_setaffinity(0, {cores[kwargs["local_rank"]]})
    _worker_main(*args, **kwargs)


def run_ranks(config: Any) -> None:
    """Run the ranks of a machine that does not lead, until one of them ends."""
    executor = MultiprocExecutor(config, monitor_workers=False)
    executor.start_worker_monitor(inline=True)


def warm_up(engine: Any) -> None:
    """Do as :func:`samullm_vllm.rank_executor.warm_up` in the processes of all ranks."""
    if current_platform.is_cpu():
        engine.collective_rpc(_dummy_run)


def _dummy_run(worker: Any) -> None:
    import torch

    runner = worker.model_runner
    with torch.no_grad():
        runner._dummy_run(runner.max_num_tokens)
