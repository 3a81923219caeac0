"""KV-cache capacity of an engine: vLLM's own formula on recorded or predicted peak memory.

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
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.profiling.regression import nonnegative_least_squares

BLOCK_TOKENS = 16


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


def block_bytes(architecture: ModelArchitecture, parallel: int) -> float:
    """Return the bytes of a KV block of 16 tokens on a device (heads are not split below one)."""
    heads = max(architecture.num_kv_heads / parallel, 1.0)
    per_token = 2 * architecture.num_layers * heads * architecture.head_dim
    return BLOCK_TOKENS * per_token * 2


def kv_cache_blocks(
    total_bytes: float, utilization: float, peak_bytes: float, bytes_per_block: float
) -> int:
    """Return the KV blocks of an engine, at least 0, by vLLM's formula."""
    return max(int((total_bytes * utilization - peak_bytes) // bytes_per_block), 0)
