"""Settings of one engine replica, by vLLM's own names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from samullm_plugin.errors import InputError

SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Scheduler settings of one simulated engine replica.

    Names and meanings are those of vLLM's engine arguments (``vllm/engine/arg_utils.py``).

    Attributes:
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: token budget of one iteration.
        max_model_len: longest prompt plus output, in tokens.
        block_size: tokens of one KV-cache block.
        num_blocks: KV-cache blocks of the replica, counting the one null block vLLM keeps.
        enable_prefix_caching: reuse full blocks of equal prefixes.
        async_scheduling: the next step is scheduled before the previous one's output is known.
        long_prefill_token_threshold: most prompt tokens of one request per step; 0 is no limit.
        scheduling_policy: ``fcfs`` or ``priority`` (lower number first, then arrival).
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 8192
    block_size: int = 16
    num_blocks: int = 10_000
    enable_prefix_caching: bool = False
    async_scheduling: bool = False
    long_prefill_token_threshold: int = 0
    scheduling_policy: SchedulingPolicy = "fcfs"

    def __post_init__(self) -> None:
        """Refuse settings no engine can run with.

        Raises:
            InputError: naming the field, its value and what it must be.
        """
        for field, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 1),
            ("block_size", 1),
            ("num_blocks", 2),
            ("long_prefill_token_threshold", 0),
        ):
            value = getattr(self, field)
            if value < least:
                raise InputError(f"engine: {field} is {value}; it must be at least {least}")
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise InputError(
                f"engine: scheduling_policy is {self.scheduling_policy!r}; write fcfs or priority"
            )
