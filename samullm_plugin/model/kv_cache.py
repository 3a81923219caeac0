"""What a model keeps per token and per sequence, and how an engine groups it in blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from samullm_plugin.errors import InputError

KvCacheKind = Literal["full", "sliding_window", "chunked_local", "mamba"]
"""How long an entry is needed: to the end, within a window, within a chunk; ``mamba``: the layers
keep a state of fixed size per sequence instead of entries per token (vLLM's ``MambaSpec``)."""


@dataclass(frozen=True, slots=True)
class KvCacheLayers:
    """Layers of a model that cache alike, before they are spread over devices.

    Attributes:
        kind: how long an entry is needed.
        num_layers: layers of this kind.
        num_kv_heads: heads that devices can share out; below one device each, they are repeated.
            1 for the latent of MLA, which every device holds whole.
        head_bytes: bytes of one token, layer and head, keys and values together; 0 for ``mamba``.
        state_bytes: bytes of one sequence and layer, for ``mamba``.
        window_tokens: of a sliding window, or of a chunk; 0 otherwise.
    """

    kind: KvCacheKind
    num_layers: int
    num_kv_heads: int = 1
    head_bytes: float = 0.0
    state_bytes: float = 0.0
    window_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse what no model has.

        Raises:
            InputError: naming the field.
        """
        if self.num_layers < 1 or self.num_kv_heads < 1:
            raise InputError(f"kv cache: {self.kind} layers need at least one layer and head")
        if (self.kind == "mamba") != (self.state_bytes > 0):
            raise InputError("kv cache: state_bytes belong to mamba layers, and to these alone")
        if (self.kind in ("sliding_window", "chunked_local")) != (self.window_tokens > 0):
            raise InputError(f"kv cache: window_tokens is {self.window_tokens} for {self.kind}")

    @property
    def bytes_per_token(self) -> float:
        """Return the bytes of one token over all these layers, on all devices together."""
        return self.num_layers * self.num_kv_heads * self.head_bytes


@dataclass(frozen=True, slots=True)
class KvCacheGroup:
    """Layers of an engine that share a block table (vLLM's ``KVCacheGroupSpec``).

    Attributes:
        kind: how long an entry is needed.
        num_layers: layers in it, those added as padding not counted.
        block_size: tokens of one block.
        page_bytes: bytes of one block of one layer on one device.
        window_tokens: of a sliding window, or of a chunk; 0 otherwise.
    """

    kind: KvCacheKind
    num_layers: int = 1
    block_size: int = 16
    page_bytes: int = 0
    window_tokens: int = 0

    def blocks_of_longest(
        self, max_model_len: int, in_flight_tokens: int, *, prefix_caching: bool = False
    ) -> int:
        """Return the blocks that one sequence holds at most (vLLM's admission cap).

        Args:
            max_model_len: longest prompt plus output, in tokens.
            in_flight_tokens: most tokens scheduled and not yet settled: those of one iteration, or
                of two with asynchronous scheduling.
            prefix_caching: states are kept at the ends of blocks: the last one and the present one.
        """
        if self.kind == "mamba":
            return 2 if prefix_caching else 1
        tokens, more = max_model_len, 0
        if self.kind == "sliding_window":
            tokens, more = min(self.window_tokens - 1 + in_flight_tokens, max_model_len), 1
        elif self.kind == "chunked_local":
            tokens = min(self.window_tokens + in_flight_tokens, max_model_len)
        return -(-tokens // self.block_size) + more


def blocks_per_sequence(
    groups: Sequence[KvCacheGroup],
    max_model_len: int,
    in_flight_tokens: int,
    *,
    prefix_caching: bool = False,
) -> int:
    """Return the blocks of the common pool that one longest sequence holds over all groups."""
    return sum(
        g.blocks_of_longest(max_model_len, in_flight_tokens, prefix_caching=prefix_caching)
        for g in groups
    )


def kv_cache_groups(
    layers: Sequence[KvCacheLayers],
    *,
    block_size: int = 16,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> tuple[KvCacheGroup, ...]:
    """Return the groups in which an engine manages what the layers keep.

    As vLLM makes them (``vllm/v1/core/kv_cache_utils.py``, ``get_kv_cache_groups``): every block of
    every group has the same bytes, so that all draw from one pool. Layers of one kind make one
    group. Of several kinds, smaller pages get more tokens a block, or are padded, and the layers
    are split into groups of equal size. With state-space layers, attention's blocks hold as many
    tokens as make a page at least the size of a state.

    Args:
        layers: what the layers keep, by kind.
        block_size: tokens of a block, before it is raised.
        tensor_parallel_size: devices that share the heads.
        pipeline_parallel_size: devices that share the layers; the fullest counts.
    """
    tp = tensor_parallel_size
    pages: list[tuple[KvCacheLayers, int, int]] = []  # kind, tokens of a block, bytes of a page
    states = [math.ceil(x.state_bytes / tp) for x in layers if x.kind == "mamba"]
    tokens = [math.ceil(-(-x.num_kv_heads // tp) * x.head_bytes) for x in layers
              if x.kind != "mamba"]  # fmt: skip
    if states and tokens:
        block_size *= -(-max(states) // (block_size * max(tokens)))
    for kind in layers:
        if kind.kind == "mamba":
            pages.append((kind, block_size, math.ceil(kind.state_bytes / tp)))
        else:
            per_token = math.ceil(-(-kind.num_kv_heads // tp) * kind.head_bytes)
            pages.append((kind, block_size, block_size * per_token))
    counts = [-(-x.num_layers // pipeline_parallel_size) for x in layers]
    if len({(x.kind, x.window_tokens) for x in layers}) <= 1:
        if not pages:
            return ()
        # One group; layers of other head sizes lie beside each other in its blocks.
        total = sum(n * page for n, (_, _, page) in zip(counts, pages, strict=True))
        first = layers[0]
        count = sum(counts)
        return (KvCacheGroup(first.kind, count, block_size, -(-total // count),
                             first.window_tokens),)  # fmt: skip
    largest = max(page for _, _, page in pages)
    size = min(counts)
    if max(counts) < 1.5 * size:
        size = max(counts)
    groups = []
    for count, (kind, usual, page) in zip(counts, pages, strict=True):
        block = usual
        if kind.kind != "mamba" and largest % page == 0:
            block *= largest // page
        parts = -(-count // size)
        groups += [
            KvCacheGroup(kind.kind, len(range(i, count, parts)), block, largest, kind.window_tokens)
            for i in range(parts)
        ]
    return tuple(groups)


def pool_block_bytes(groups: Sequence[KvCacheGroup]) -> int:
    """Return the bytes of one block of the pool on one device."""
    return max((g.num_layers for g in groups), default=0) * max(
        (g.page_bytes for g in groups), default=0
    )
