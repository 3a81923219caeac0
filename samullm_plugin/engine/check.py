"""Refuse workloads that no engine could be given."""

from __future__ import annotations

import numpy as np

from samullm_plugin.engine.workload import EngineRun, Workload
from samullm_plugin.errors import InputError
from samullm_plugin.model.engine_config import EngineConfig


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
    if workload.arrival_s is not None and not np.isfinite(workload.arrival_s).all():
        i = int(np.argmax(~np.isfinite(workload.arrival_s)))
        raise InputError(f"request {i}: arrival_s is {workload.arrival_s[i]}; it must be finite")
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
