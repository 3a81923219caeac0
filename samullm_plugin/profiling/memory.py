"""KV-cache capacity of an engine: vLLM's own formula on recorded, predicted or assumed peak memory.

vLLM runs one forward pass of the largest batch it may ever schedule, takes the peak memory, and
gives the KV cache what is left of ``gpu_memory_utilization`` times the device's memory
(``vllm/v1/worker/gpu_worker.py``, ``determine_available_memory``):
``blocks = floor((total * utilization - peak) / block_bytes)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.application import EngineOptions, ModelSpec
from samullm_plugin.model.architecture import MLP_MATRICES, ModelArchitecture
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.model.kv_cache import (
    KvCacheGroup,
    blocks_per_sequence,
    kv_cache_groups,
    pool_block_bytes,
)
from samullm_plugin.profiling.regression import nonnegative_least_squares

_DIVIDED_BY_INPUTS = ("o_proj", "down_proj")
"""Matrices of which each device of a replica has the rows of its part of the inputs."""
GRAPH_BYTES_PER_LAYER_AND_SIZE = 1.0e5
"""Such that an engine of 32 layers and 67 sizes keeps 0.2 GB (assumed)."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The largest batch of an engine.

    Attributes:
        max_num_batched_tokens: tokens of an iteration.
        max_num_seqs: sequences of an iteration.
    """

    max_num_batched_tokens: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class RecordedStart:
    """Memory of a real engine start.

    Attributes:
        architecture: sizes of the model.
        tensor_parallel_size: devices.
        peak_bytes: peak memory of a device in the start-up pass.
        block_bytes: bytes of a KV block of 16 tokens on a device.
        limits: largest batch.
    """

    architecture: ModelArchitecture
    tensor_parallel_size: int
    peak_bytes: float
    block_bytes: float
    limits: BatchLimits


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Predicts peak memory beyond the weights; coefficients of a linear form, all non-negative.

    Attributes:
        one_bytes, two_bytes, more_bytes: device context and communication buffers with 1, 2, and
            more devices.
        logit_factor: bytes per sequence and vocabulary entry (copies of the logits in sampling).
        hidden_factor: bytes per batched token and hidden unit.
        mlp_factor: bytes per batched token and MLP unit on a device (of all active experts).
    """

    one_bytes: float
    two_bytes: float
    more_bytes: float
    logit_factor: float
    hidden_factor: float
    mlp_factor: float

    def overhead_bytes(
        self, architecture: ModelArchitecture, parallel: int, limits: BatchLimits
    ) -> float:
        """Return the bytes of a device that neither weights nor KV cache take."""
        coefficients = np.array(
            [
                self.one_bytes,
                self.two_bytes,
                self.more_bytes,
                self.logit_factor,
                self.hidden_factor,
                self.mlp_factor,
            ]
        )
        return float(_terms(architecture, parallel, limits) @ coefficients)

    def peak_bytes(
        self, architecture: ModelArchitecture, parallel: int, limits: BatchLimits
    ) -> float:
        """Return the peak memory of a device in the start-up pass."""
        weights = architecture.weight_bytes / parallel
        return weights + self.overhead_bytes(architecture, parallel, limits)


def _terms(architecture: ModelArchitecture, parallel: int, limits: BatchLimits) -> np.ndarray:
    """Return the terms of :class:`MemoryModel`, in field order."""
    a, tokens = architecture, limits.max_num_batched_tokens
    active = max(a.num_active_experts, 1)
    return np.array(
        [
            float(parallel == 1),
            float(parallel == 2),
            float(parallel > 2),
            float(limits.max_num_seqs) * a.vocab_size,
            float(tokens) * a.hidden_size,
            float(tokens) * a.intermediate_size * active / parallel,
        ]
    )


def fit_memory(starts: Sequence[RecordedStart]) -> MemoryModel:
    """Return the model of recorded starts.

    Raises:
        InputError: if there are none.
    """
    if not starts:
        raise InputError("memory: no recorded engine starts to learn from")
    matrix = np.stack([_terms(s.architecture, s.tensor_parallel_size, s.limits) for s in starts])
    rest = np.array(
        [s.peak_bytes - s.architecture.weight_bytes / s.tensor_parallel_size for s in starts]
    )
    weight = np.ones(len(starts))
    for _ in range(20):
        x = nonnegative_least_squares(matrix * weight[:, None], rest * weight)
        weight = 1 / np.sqrt(np.maximum(np.abs(matrix @ x - rest), 2e7))
    x = nonnegative_least_squares(matrix * weight[:, None], rest * weight)
    one, two, more = x[:3]
    # Where a size was not recorded, the next larger overhead known is the careful guess.
    return MemoryModel(
        float(one),
        float(two or max(one, more)),
        float(more or max(one, two)),
        float(x[3]),
        float(x[4]),
        float(x[5]),
    )


def weight_bytes_on_device(
    architecture: ModelArchitecture, engine: EngineOptions, num_devices: int
) -> float:
    """Return the bytes of weights that each device of a replica holds, adapters included.

    What ``cpu_offload_gb`` moves to the host's memory is not among them.
    """
    offload = engine.given("cpu_offload_gb")
    moved = float(offload) * 2**30 if isinstance(offload, int | float) else 0.0
    own = max(architecture.weight_bytes / num_devices - moved, 0.0)
    return own + adapter_bytes(architecture, engine, num_devices)


def adapter_bytes(
    architecture: ModelArchitecture, engine: EngineOptions, num_devices: int
) -> float:
    """Return the bytes that an engine keeps for adapters: ``max_loras`` of the largest rank.

    As vLLM does, for every matrix of every layer (``vllm/lora/layers``): each device has what it
    reads of its inputs and writes of its outputs. Where the matrix is divided by outputs, that is
    the first factor whole and the second one divided; where by inputs, the other way round.
    """
    if engine.given("enable_lora") is not True:
        return 0.0
    count, rank = engine.given("max_loras"), engine.given("max_lora_rank")
    count = count if isinstance(count, int) else 1
    rank = rank if isinstance(rank, int) else 16
    numbers = 0.0
    for name, (reads, writes) in architecture.matrix_sizes.items():
        if name in _DIVIDED_BY_INPUTS:
            per_rank = reads / num_devices + writes
        else:
            per_rank = reads + writes / num_devices
        copies = max(architecture.num_experts, 1) if name in MLP_MATRICES else 1
        numbers += copies * per_rank
    numbers *= architecture.num_layers * rank * count
    return numbers * (4 if engine.dtype in ("float32", "float") else 2)


def graph_bytes(architecture: ModelArchitecture, engine: EngineOptions) -> float:
    """Return the bytes that CUDA graphs keep (assumed, of the size vLLM reports for 8B models).

    They grow with the batch sizes that graphs are made of, up to twice ``max_num_seqs`` and 512;
    ``enforce_eager`` does without them.
    """
    if engine.given("enforce_eager") is True:
        return 0.0
    sizes = 3 + min(2 * engine.max_num_seqs, 512) // 8
    return GRAPH_BYTES_PER_LAYER_AND_SIZE * architecture.num_layers * sizes


def replica_groups(
    architecture: ModelArchitecture,
    engine: EngineOptions,
    tensor_parallel_size: int,
    pipeline_parallel_size: int = 1,
) -> tuple[KvCacheGroup, ...]:
    """Return the groups in which an engine manages a model's KV cache."""
    return kv_cache_groups(
        architecture.kv_cache_layers,
        block_size=engine.block_size,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
    )


def kv_cache_pool_tokens(
    groups: Sequence[KvCacheGroup],
    model: ModelSpec,
    *,
    total_bytes: float,
    used_bytes: float,
    per_block_bytes: float | None = None,
) -> int:
    """Return the KV-cache capacity of a replica: blocks of its pool times tokens of a block.

    Args:
        groups: of the replica.
        model: its limits count: 0 is returned if one longest sequence does not fit.
        total_bytes: memory of a device.
        used_bytes: of weights and everything else on a device.
        per_block_bytes: bytes of a block as recorded; None: by the groups.
    """
    per_block = per_block_bytes or pool_block_bytes(groups)
    if not per_block:
        return 0
    engine = model.engine
    blocks = kv_cache_blocks(total_bytes, engine.gpu_memory_utilization, used_bytes, per_block)
    least = blocks_per_sequence(
        groups,
        model.max_model_len,
        engine.in_flight_tokens,
        prefix_caching=engine.enable_prefix_caching,
    )
    return blocks * engine.block_size if blocks >= least else 0


def kv_cache_blocks(
    total_bytes: float, utilization: float, peak_bytes: float, bytes_per_block: float
) -> int:
    """Return the KV blocks of an engine, at least 0, by vLLM's formula."""
    return max(int((total_bytes * utilization - peak_bytes) // bytes_per_block), 0)


_ASSUMED_CONTEXT_BYTES = 0.5e9
"""Device context, workspaces and what the allocator cannot use."""
_ASSUMED_LINK_BYTES = 0.6e9
"""Buffers of communication between devices."""


def assumed_overhead_bytes(
    architecture: ModelArchitecture, model: ModelSpec, tensor_parallel_size: int
) -> float:
    """Return the bytes of a device that neither weights nor KV cache take.

    With an 8B model, 2,048 batched tokens and CUDA graphs 1.22 GB; a recorded engine (vLLM 0.19,
    RTX 4090, casys-kaist/LLMServingSim @ 5daddb21) kept 1.23 GB.
    """
    a, engine, tp = architecture, model.engine, tensor_parallel_size
    active = max(a.num_active_experts, 1)
    activations = engine.max_num_batched_tokens * 2 * (
        4 * a.hidden_size + 3 * a.intermediate_size * active / tp
    )  # fmt: skip
    logits = 2 * 4 * engine.max_num_seqs * a.vocab_size
    links = _ASSUMED_LINK_BYTES if tp > 1 else 0.0
    return _ASSUMED_CONTEXT_BYTES + links + activations + logits + graph_bytes(a, engine)


def assumed_pool_tokens(
    model: ModelSpec,
    architecture: ModelArchitecture,
    gpu: Gpu,
    tensor_parallel_size: int,
    pipeline_parallel_size: int = 1,
) -> int:
    """Return the KV-cache capacity in tokens of the pool; 0 if the model does not fit."""
    tp, pp = tensor_parallel_size, pipeline_parallel_size
    if architecture.num_heads % tp:
        return 0
    used = weight_bytes_on_device(architecture, model.engine, tp * pp)
    used += assumed_overhead_bytes(architecture, model, tp)
    return kv_cache_pool_tokens(
        replica_groups(architecture, model.engine, tp, pp),
        model,
        total_bytes=gpu.memory_bytes,
        used_bytes=used,
    )


def tokens_held(groups: tuple[KvCacheGroup, ...], model: ModelSpec, pool_tokens: int) -> int:
    """Return how many tokens of longest sequences a pool holds, as vLLM reports it.

    Args:
        groups: of a replica.
        model: its longest sequence counts.
        pool_tokens: blocks of the pool times tokens of a block.
    """
    engine = model.engine
    per_sequence = blocks_per_sequence(
        groups,
        model.max_model_len,
        engine.in_flight_tokens,
        prefix_caching=engine.enable_prefix_caching,
    )
    blocks = pool_tokens // engine.block_size
    return blocks * model.max_model_len // max(per_sequence, 1)
