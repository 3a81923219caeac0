"""vLLM's own V1 scheduler, run without model, worker or engine.

Each of its outputs is answered at once with a made-up token for every sequence that would have
sampled one. Asynchronous scheduling keeps one batch in flight, as ``EngineCore`` does with its
batch queue of two.

Requests that wait for others are added as a coordinator adds them: what becomes ready at one moment
in the order of the table.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from samullm_plugin.engine import EngineConfig, Workload
from samullm_plugin.model.kv_cache import KvCacheGroup

GENERATED_TOKEN = 7
_STUCK_AFTER = 4  # schedules in a row with nothing to do and nothing to come

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass
class Row:
    """One step that scheduled tokens; requests by index."""

    step: int
    scheduled: dict[int, int]
    preempted: list[int]
    free_blocks: int
    finished: list[int] = field(default_factory=list)


@dataclass
class Outcome:
    """All rows, and whether the scheduler was left with a request it can never schedule."""

    rows: list[Row]
    stuck: bool


@cache
def _base_config() -> Any:
    """Build vLLM's configuration once; it takes a third of a second."""
    from vllm.engine.arg_utils import EngineArgs

    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1 << 20,
        "torch_dtype": "bfloat16",
    }
    with tempfile.TemporaryDirectory(prefix="conformance-model-") as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        arguments = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=1 << 20,
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            block_size=16,
        )
        return arguments.create_engine_config()


@cache
def _hash_function(name: str) -> Any:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import init_none_hash

    function = get_hash_fn_by_name(name)
    init_none_hash(function)
    return function


def make_scheduler(config: EngineConfig) -> tuple[Any, Any]:
    """Return vLLM's scheduler for these settings, and its block hasher or None."""
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    vllm_config = copy.deepcopy(_base_config())
    vllm_config.model_config.max_model_len = config.max_model_len
    scheduling = vllm_config.scheduler_config
    scheduling.max_model_len = config.max_model_len
    scheduling.max_num_seqs = config.max_num_seqs
    scheduling.max_num_batched_tokens = config.max_num_batched_tokens
    scheduling.max_num_scheduled_tokens = None
    scheduling.long_prefill_token_threshold = config.long_prefill_token_threshold
    scheduling.policy = config.scheduling_policy
    scheduling.async_scheduling = config.async_scheduling
    scheduling.enable_chunked_prefill = config.enable_chunked_prefill
    caching = vllm_config.cache_config
    caching.block_size = config.block_size
    caching.enable_prefix_caching = config.enable_prefix_caching
    caching.num_gpu_blocks = config.num_blocks
    vllm_config.parallel_config.pipeline_parallel_size = config.pipeline_parallel_size
    sizes = [_spec(g, config).block_size for g in config.groups]
    if config.pipeline_parallel_size > 1 and config.async_scheduling:
        # vLLM schedules this asynchronously with its second model runner only.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    else:
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    assert vllm_config.max_concurrent_batches == config.max_concurrent_batches
    scheduler = (AsyncScheduler if config.async_scheduling else Scheduler)(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=config.num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec([f"layer.{i}"], _spec(group, config))
                for i, group in enumerate(config.groups)
            ],
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=math.lcm(*sizes),
        hash_block_size=math.gcd(*sizes),
        log_stats=False,
    )
    hasher = None
    if config.enable_prefix_caching:
        hasher = get_request_block_hasher(
            math.gcd(*sizes), _hash_function(caching.prefix_caching_hash_algo)
        )
    return scheduler, hasher


def _spec(group: KvCacheGroup, config: EngineConfig) -> Any:
    """Return vLLM's description of a KV cache group; a state takes one block a sequence."""
    import torch
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    if group.kind == "mamba":
        return MambaSpec(
            block_size=config.max_model_len,
            shapes=((4, 4),),
            dtypes=(torch.float32,),
            mamba_cache_mode="none",
        )
    size = {
        "block_size": group.block_size,
        "num_kv_heads": 1,
        "head_size": 16,
        "dtype": torch.bfloat16,
    }
    if group.kind == "sliding_window":
        return SlidingWindowSpec(sliding_window=group.window_tokens, **size)
    if group.kind == "chunked_local":
        return ChunkedLocalAttentionSpec(attention_chunk_size=group.window_tokens, **size)
    return FullAttentionSpec(**size)


def make_requests(workload: Workload, hasher: Any, *, pooling: bool = False) -> list[Any]:
    """Return vLLM requests; their ids are their indices."""
    from vllm import PoolingParams, SamplingParams
    from vllm.v1.request import Request

    requests = []
    for i in range(len(workload)):
        if workload.prompt_token_ids is not None:
            token_ids = [int(t) for t in workload.prompt_token_ids[i]]
        else:
            token_ids = _invented_prompt(workload, i)
        requests.append(
            Request(
                request_id=str(i),
                prompt_token_ids=token_ids,
                sampling_params=None
                if pooling
                else SamplingParams(
                    max_tokens=int(workload.output_tokens[i]), ignore_eos=True, detokenize=False
                ),
                pooling_params=PoolingParams(task="embed") if pooling else None,
                arrival_time=float(i),
                block_hasher=hasher,
                priority=0 if workload.priority is None else int(workload.priority[i]),
            )
        )
    return requests


def _invented_prompt(workload: Workload, i: int) -> list[int]:
    """Return token ids that agree between requests exactly where their prefixes are shared."""
    length = int(workload.prompt_tokens[i])
    own = [1000 + 50 * i + (t % 50) for t in range(length)]
    if workload.prefix_id is None or workload.prefix_id[i] < 0:
        return own
    assert workload.prefix_tokens is not None
    shared = min(int(workload.prefix_tokens[i]), length)
    prefix = [500 + 10 * int(workload.prefix_id[i]) + (t % 10) for t in range(shared)]
    return prefix + own[shared:]


def run_vllm(config: EngineConfig, workload: Workload, *, pooling: bool = False) -> Outcome:
    """Run the workload to its end, or until nothing can be scheduled any more."""
    scheduler, hasher = make_scheduler(config)
    loop = _Loop if config.is_plain else _BatchQueue
    return loop(scheduler, config, workload, make_requests(workload, hasher, pooling=pooling)).run()


class _Loop:
    def __init__(
        self, scheduler: Any, config: EngineConfig, workload: Workload, requests: list[Any]
    ) -> None:
        self.scheduler = scheduler
        self.in_flight_limit = 1 if config.async_scheduling else 0
        self.batches = config.max_concurrent_batches
        self.requests = requests
        self.successors, self.predecessors = _chains(workload)
        self.arrival = [0] * len(workload)
        if workload.arrival_step is not None:
            self.arrival = [int(s) for s in workload.arrival_step]
        first = (i for i in range(len(workload)) if not self.predecessors[i])
        self.to_come = sorted((self.arrival[i], i) for i in first)  # step, request
        self.in_flight: list[tuple[Any, dict[str, bool], Row | None]] = []
        self.rows: list[Row] = []
        self.step = self.num_added = 0

    def run(self) -> Outcome:
        idle = 0
        while self.to_come or self.in_flight or self.scheduler.has_unfinished_requests():
            self._admit()
            output = self.scheduler.schedule()
            tokens = output.total_num_scheduled_tokens
            idle = 0 if tokens or self.in_flight or output.preempted_req_ids else idle + 1
            if idle >= _STUCK_AFTER and not self.to_come:
                return Outcome(self.rows, stuck=True)
            if tokens or not self.in_flight:
                self.step += 1
            if tokens:
                self.in_flight.append(self._send(output))
                if len(self.in_flight) <= self.in_flight_limit:
                    continue
            elif not self.in_flight:
                self._answer(output, {}, None)
            if self.in_flight:
                self._answer(*self.in_flight.pop(0))
        return Outcome(self.rows, stuck=False)

    def _admit(self) -> None:
        while self.to_come and self.to_come[0][0] <= self.step:
            self._add(self.to_come.pop(0)[1])

    def _add(self, i: int) -> None:
        """Let a request arrive; of equal priorities the order is of arrival."""
        self.requests[i].arrival_time = float(self.num_added)
        self.num_added += 1
        self.scheduler.add_request(self.requests[i])

    def _send(self, output: Any) -> tuple[Any, dict[str, bool], Row]:
        samples = {
            r: not self.scheduler.requests[r].is_prefill_chunk for r in output.num_scheduled_tokens
        }
        row = Row(
            step=self.step - 1,
            scheduled={int(r): n for r, n in output.num_scheduled_tokens.items()},
            preempted=sorted(int(r) for r in output.preempted_req_ids or ()),
            free_blocks=self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        )
        self.rows.append(row)
        return output, samples, row

    def _answer(self, output: Any, samples: dict[str, bool], row: Row | None) -> None:
        import torch
        from vllm.v1.outputs import ModelRunnerOutput

        pools = any(r.pooling_params is not None for r in self.requests)
        ids = list(output.num_scheduled_tokens)
        before = {r for r in ids if r in self.scheduler.requests}
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={r: i for i, r in enumerate(ids)},
                sampled_token_ids=[
                    [GENERATED_TOKEN] if r in before and samples[r] and not pools else []
                    for r in ids
                ],
                pooler_output=[torch.zeros(1) if r in before and samples[r] else None for r in ids]
                if pools
                else None,
            ),
        )
        gone = [int(r) for r in ids if r in before and r not in self.scheduler.requests]
        if row is not None:
            row.finished = sorted(gone)
        for i in gone:
            self._release(i)

    def _release(self, finished: int) -> None:
        for i in self.successors[finished]:
            self.predecessors[i] -= 1
            if self.predecessors[i]:
                continue
            insort(self.to_come, (max(self.arrival[i], self.step), i))


class _BatchQueue(_Loop):
    """``step_with_batch_queue`` of vllm/v1/engine/core.py; with a queue of one ``step``."""

    def run(self) -> Outcome:
        limit, idle = self.batches, 0
        while self.to_come or self.in_flight or self.scheduler.has_unfinished_requests():
            self._admit()
            if self.scheduler.has_requests():
                output = self.scheduler.schedule()
                self.step += 1
                tokens = output.total_num_scheduled_tokens
                working = tokens or any(row for *_, row in self.in_flight)
                idle = 0 if working or output.preempted_req_ids else idle + 1
                if idle >= _STUCK_AFTER * limit and not self.to_come:
                    return Outcome(self.rows, stuck=True)
                self.in_flight.append(self._send(output) if tokens else (output, {}, None))
                if len(self.in_flight) < limit and (tokens or self.scheduler.has_requests()):
                    continue
            elif not self.in_flight:
                self.step += 1
                continue
            self._answer(*self.in_flight.pop(0))
        return Outcome(self.rows, stuck=False)


def _chains(workload: Workload) -> tuple[list[list[int]], list[int]]:
    n = len(workload)
    successors: list[list[int]] = [[] for _ in range(n)]
    predecessors = [0] * n
    for before, after in _edges(workload):
        successors[before].append(after)
        predecessors[after] += 1
    return successors, predecessors


def _edges(workload: Workload) -> Iterator[tuple[int, int]]:
    if workload.release_index is None or workload.release_indptr is None:
        return
    for i in range(len(workload)):
        for j in workload.release_index[
            workload.release_indptr[i] : workload.release_indptr[i + 1]
        ]:
            yield i, int(j)
