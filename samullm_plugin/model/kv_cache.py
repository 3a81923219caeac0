"""What a model keeps per token and per sequence, and how an engine groups it in blocks."""

from __future__ import annotations

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
