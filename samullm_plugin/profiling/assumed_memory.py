"""Memory of an engine that nobody has started yet: the model's bytes and an assumed overhead."""

from __future__ import annotations

from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.model.kv_cache import KvCacheGroup, blocks_per_sequence
from samullm_plugin.profiling.memory import (
    graph_bytes,
    kv_cache_pool_tokens,
    replica_groups,
    weight_bytes_on_device,
)

_CONTEXT_BYTES = 0.5e9
"""Device context, workspaces and what the allocator cannot use."""
_LINK_BYTES = 0.6e9
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
    links = _LINK_BYTES if tp > 1 else 0.0
    return _CONTEXT_BYTES + links + activations + logits + graph_bytes(a, engine)


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
