"""Tensor parallelism without worker processes: every rank is an engine that takes the same steps.

vLLM's ``external_launcher`` back end expects that each rank is started by someone else and that all
are given the same requests in the same order. Here the first rank, which talks to the coordinator,
passes everything on to the others before each step. There is no extra engine process that would
contend with the ranks for cores.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


class RankExecutor(ExecutorWithExternalLauncher):  # type: ignore[misc]  # vLLM is not typed here
    """One rank's executor; ranks meet by a file, so that no port can be taken."""

    rendezvous: str

    @classmethod
    def meeting_at(cls, rendezvous: str) -> type[RankExecutor]:
        """Return the class for ranks that meet by this file."""
        return type("RankExecutor", (cls,), {"rendezvous": rendezvous})

    def _distributed_args(self) -> tuple[str, int, int]:
        _, rank, local_rank = super()._distributed_args()
        return f"file://{self.rendezvous}", rank, local_rank


def warm_up(engine: Any) -> None:
    """Run what vLLM's CPU worker leaves out and its pipeline parallelism needs."""
    runner = engine.model_executor.driver_worker.worker.model_runner
    if engine.vllm_config.parallel_config.pipeline_parallel_size > 1:
        import torch

        with torch.no_grad():
            runner._dummy_run(runner.max_num_tokens)
