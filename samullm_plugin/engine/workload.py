"""What an engine replica is given to do, and what came of it: columns, one row per request.

Workloads that no engine could be given are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepTable
from samullm_plugin.model.types import Floats, Ints, SmallInts

FURTHEST_S = 1e12
"""No moment is further: beyond, seconds of iterations are lost in the sums of compiled code."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one engine replica with known output lengths, in order of submission.

    Attributes:
        prompt_tokens: shape ``(n,)``, at least 1 each.
        output_tokens: shape ``(n,)``, tokens each request generates, at least 1.
        arrival_s: shape ``(n,)``, seconds after the engine is ready, or None: all at 0.
        arrival_step: shape ``(n,)``, arrival by scheduler step instead of by time, or None.
        priority: shape ``(n,)``, lower is served first under policy ``priority``, or None.
        prefix_id: shape ``(n,)``: requests of equal id (not -1) share their first
            ``prefix_tokens`` prompt tokens, or None.
        prefix_tokens: shape ``(n,)``, length of the shared prefix, or None.
        prompt_token_ids: per request its prompt token ids (then prefix caching compares these), or
            None.
        release_index: successors within this replica: the requests that wait for request ``i`` are
            ``release_index[release_indptr[i]:release_indptr[i + 1]]``. A request with such
            predecessors joins the waiting queue once all of them finished and its own arrival is
            past. None: no request waits for another here.
        release_indptr: shape ``(n + 1,)``, see ``release_index``.
    """

    prompt_tokens: Ints
    output_tokens: Ints
    arrival_s: Floats | None = None
    arrival_step: Ints | None = None
    priority: Ints | None = None
    prefix_id: Ints | None = None
    prefix_tokens: Ints | None = None
    prompt_token_ids: tuple[Ints, ...] | None = None
    release_index: Ints | None = None
    release_indptr: Ints | None = None

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class StepTrace:
    """Every step that schedules tokens, kept only when asked for.

    Attributes:
        table: composition of the steps, ``m`` rows.
        step: scheduler step number of each row, shape ``(m,)``.
        start_s: seconds after the engine is ready at which the step began, shape ``(m,)``.
        seq_indptr: shape ``(m + 1,)``: row ``i`` scheduled requests
            ``seq_request[seq_indptr[i]:seq_indptr[i + 1]]`` with ``seq_tokens`` tokens each.
        seq_request: request indices in scheduling order.
        seq_tokens: tokens scheduled.
        preempted_indptr: shape ``(m + 1,)``, into ``preempted_request``.
        preempted_request: requests preempted in the step.
        finished_indptr: shape ``(m + 1,)``, into ``finished_request``.
        finished_request: requests that finish with the step's output.
        free_blocks: free KV blocks after scheduling the step, shape ``(m,)``.
    """

    table: StepTable
    step: Ints
    start_s: Floats
    seq_indptr: Ints
    seq_request: SmallInts
    seq_tokens: SmallInts
    preempted_indptr: Ints
    preempted_request: SmallInts
    finished_indptr: Ints
    finished_request: SmallInts
    free_blocks: Ints


@dataclass(frozen=True, slots=True)
class ProgressCurve:
    """Work done over time, for reading off what a replica had done at any moment.

    Linear between points. Tokens computed again after a preemption are not counted again.

    Attributes:
        time_s: increasing, shape ``(k,)``, the first is 0.
        tokens: prompt and output tokens computed until then, shape ``(k,)``.
        pairs: sum over those tokens of their position (query-key pairs), shape ``(k,)``.
    """

    time_s: Floats
    tokens: Floats
    pairs: Floats


@dataclass(frozen=True, slots=True)
class EngineRun:
    """What an engine replica did with a workload, until it was done or was stopped.

    Times are seconds after the engine was ready.

    Attributes:
        finish_s: shape ``(n,)``, when each request's last token was there; inf if not finished.
        first_token_s: shape ``(n,)``, when its first token was there; inf if none was.
        generated_tokens: shape ``(n,)``, output tokens generated until the end or the stop.
        makespan_s: when the last finished request finished (0 without one).
        busy_s: summed seconds of all iterations.
        num_steps: iterations that scheduled tokens.
        num_preemptions: recompute preemptions.
        peak_blocks: most KV blocks in use at once.
        computed_tokens: tokens computed, recomputation included, cached ones not.
        cached_tokens: prompt tokens found in the prefix cache.
        curve: work done over time, if asked for.
        steps: every step, if asked for.
    """

    finish_s: Floats
    first_token_s: Floats
    generated_tokens: Ints
    makespan_s: float
    busy_s: float
    num_steps: int
    num_preemptions: int
    peak_blocks: int
    computed_tokens: int
    cached_tokens: int = 0
    curve: ProgressCurve | None = None
    steps: StepTrace | None = field(default=None)


class NeverFitsError(InputError):
    """A request needs more KV-cache blocks than the engine has; vLLM would wait for ever.

    Attributes:
        request: its index.
        needed_blocks: blocks its tokens need.
        usable_blocks: blocks there are, the null block not counted.
        run: what was simulated until nothing could be scheduled any more.
    """

    def __init__(
        self, request: int, needed_blocks: int, usable_blocks: int, run: EngineRun
    ) -> None:
        """Describe the request; see the attributes."""
        super().__init__(
            f"request {request} needs {needed_blocks} KV-cache blocks and the engine has "
            f"{usable_blocks} (num_blocks less the null block): it would wait for ever; "
            "raise num_blocks or shorten the request"
        )
        self.request = request
        self.needed_blocks = needed_blocks
        self.usable_blocks = usable_blocks
        self.run = run


def check_workload(config: EngineConfig, workload: Workload) -> None:
    """Check lengths and columns.

    Raises:
        InputError: naming the request and what is wrong with it.
    """
    n = len(workload)
    prompt, output = workload.prompt_tokens, workload.output_tokens
    for name, column in (
        ("output_tokens", output),
        ("arrival_s", workload.arrival_s),
        ("arrival_step", workload.arrival_step),
        ("priority", workload.priority),
        ("prefix_id", workload.prefix_id),
        ("prefix_tokens", workload.prefix_tokens),
        ("prompt_token_ids", workload.prompt_token_ids),
    ):
        if column is not None and len(column) != n:
            raise InputError(f"workload: {name} has {len(column)} rows, prompt_tokens {n}")
    if n == 0:
        return
    for name, lengths in (("prompt_tokens", prompt), ("output_tokens", output)):
        if lengths.min() < 1:
            i = int(np.argmax(lengths < 1))
            raise InputError(f"request {i}: {name} is {lengths[i]}; it must be at least 1")
    if prompt.max() >= config.max_model_len:
        i = int(np.argmax(prompt >= config.max_model_len))
        raise InputError(
            f"request {i}: its prompt of {prompt[i]} tokens leaves no room for output within "
            f"max_model_len {config.max_model_len}"
        )
    if workload.arrival_s is not None and workload.arrival_step is not None:
        raise InputError("workload: give arrival_s or arrival_step, not both")
    if workload.arrival_s is not None:
        late = ~(np.abs(workload.arrival_s) <= FURTHEST_S)
        if late.any():
            i = int(np.argmax(late))
            raise InputError(
                f"request {i}: arrival_s is {workload.arrival_s[i]:g}; it must be a number up to "
                f"{FURTHEST_S:g}"
            )
    if workload.prompt_token_ids is not None:
        for i, ids in enumerate(workload.prompt_token_ids):
            if len(ids) != prompt[i]:
                raise InputError(
                    f"request {i}: {len(ids)} prompt_token_ids but prompt_tokens {prompt[i]}"
                )
    if (workload.release_index is None) != (workload.release_indptr is None):
        raise InputError("workload: release_index and release_indptr go together")
    if workload.release_indptr is not None and len(workload.release_indptr) != n + 1:
        raise InputError(
            f"workload: release_indptr has {len(workload.release_indptr)} entries, not {n + 1}"
        )
