"""Schedulers that note what each iteration held and how long it took.

A row is taken where the scheduler itself decides (``vllm/v1/core/sched/scheduler.py``), because
vLLM's own statistics lack the context read and are mistimed when the engine runs in its caller's
process. The rows stay in this process until the engine's loop takes them.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

Row = tuple[float, ...]

_rows: deque[Row] = deque(maxlen=200_000)
_busy_since_s: float | None = None
_interrupted = False


def take_rows() -> list[Row]:
    """Return the iterations since the last call, in the order of ``protocol.STEP_COLUMNS``."""
    rows = list(_rows)
    _rows.clear()
    return rows


def interrupted() -> None:
    """Note that the engine's loop did something else: the next iteration begins when scheduled.

    One that is scheduled already (asynchronous scheduling is one ahead) has not waited for it.
    """
    global _interrupted  # noqa: PLW0603  # one engine per process, one loop
    _interrupted = True


class _Recording:
    """Mixed in before one of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_flight: deque[tuple[list[float], bool]] = deque()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule, and note what was scheduled."""
        global _interrupted  # noqa: PLW0603  # one engine per process, one loop
        began_s = time.monotonic()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]  # vLLM's scheduler
        if output.total_num_scheduled_tokens:
            self._in_flight.append((self._composition(output, began_s), _interrupted))
            _interrupted = False
        return output

    def _composition(self, output: Any, began_s: float) -> list[float]:
        """Return a row that lacks its seconds, its start in their place.

        The requests' computed tokens already include those just scheduled.
        """
        requests: Any = self.requests  # type: ignore[attr-defined]  # vLLM's scheduler
        prefill_seqs = prefill_tokens = decode_seqs = context = longest = 0
        pairs = 0.0
        for name, new in output.num_scheduled_tokens.items():
            request = requests[name]
            length = request.num_computed_tokens
            before = length - new
            if new == 1 and before >= request.num_prompt_tokens:
                decode_seqs += 1
                context += length
                longest = max(longest, length)
            else:
                prefill_seqs += 1
                prefill_tokens += new
                pairs += new * before + new * (new + 1) / 2
        pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]  # vLLM's scheduler
        return [
            prefill_seqs + decode_seqs,
            prefill_tokens + decode_seqs,
            prefill_seqs,
            prefill_tokens,
            pairs,
            context,
            longest,
            began_s,
            time.monotonic() - began_s,
            len(self.running),  # type: ignore[attr-defined]  # vLLM's scheduler
            len(self.waiting),  # type: ignore[attr-defined]  # vLLM's scheduler
            pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            len(output.preempted_req_ids or ()),
        ]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Complete the row: an iteration lasts from the end of the last one, if that led to it."""
        global _busy_since_s  # noqa: PLW0603  # one engine per process, one loop
        result = super().update_from_output(  # type: ignore[misc]  # vLLM's scheduler
            scheduler_output, model_runner_output
        )
        if scheduler_output.total_num_scheduled_tokens and self._in_flight:
            (row, interrupted_before), now_s = self._in_flight.popleft(), time.monotonic()
            began_s = row[7]
            if _busy_since_s is not None:
                began_s = max(began_s, _busy_since_s) if interrupted_before else _busy_since_s
            row[7] = now_s - began_s
            _rows.append(tuple(row))
            _busy_since_s = now_s
        if not self.has_unfinished_requests():  # type: ignore[attr-defined]  # vLLM's scheduler
            _busy_since_s = None
        return result


class RecordingScheduler(_Recording, Scheduler):  # type: ignore[misc]  # vLLM is not typed here
    """vLLM's scheduler, recording."""


class RecordingAsyncScheduler(_Recording, AsyncScheduler):  # type: ignore[misc]  # as above
    """vLLM's asynchronous scheduler, recording."""
