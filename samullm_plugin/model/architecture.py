"""Figures of a transformer that costs follow from: FLOPs, weight bytes, KV-cache bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from samullm_plugin.errors import InputError
from samullm_plugin.model.kv_cache import KvCacheLayers

MLP_MATRICES = ("gate_proj", "up_proj", "down_proj")
"""Names of the MLP's matrices among :attr:`ModelArchitecture.matrix_sizes`."""


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """Sizes of a decoder-only transformer.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key-value heads (1: multi-query; equal to ``num_heads``: multi-head).
        head_dim: width of one head.
        intermediate_size: width of the MLP (of one expert, if there are experts).
        mlp: ``gated`` (three matrices) or ``plain`` (two).
        vocab_size: entries of the vocabulary.
        num_experts: experts per layer, 0 for a dense model.
        num_active_experts: experts that each token passes through, 0 for a dense model.
        dtype_bytes: bytes of one weight of the layers' matrices.
        parameters: of the whole checkpoint, as counted part by part; 0: by the sizes above, an
            embedding and a head of their own.
        active_parameters: matrix parameters of all layers that one token passes through; 0: by the
            sizes above.
        stored_bytes: bytes of all weights as an engine holds them; 0: by the sizes above.
        kv_cache: what the layers keep, by kind; empty: keys and values of every layer.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    mlp: Literal["gated", "plain"] = "gated"
    num_experts: int = 0
    num_active_experts: int = 0
    dtype_bytes: float = 2.0
    parameters: int = 0
    active_parameters: int = 0
    stored_bytes: float = 0.0
    kv_cache: tuple[KvCacheLayers, ...] = ()

    def __post_init__(self) -> None:
        """Refuse sizes no model has.

        Raises:
            InputError: naming the field.
        """
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim",
                     "intermediate_size", "vocab_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"architecture: {name} is {getattr(self, name)}; it must be >= 1")

    @property
    def attention_params_per_layer(self) -> int:
        """Return the parameters of the four attention projections of one layer."""
        heads = self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * heads + 2 * kv)

    @property
    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """Return what the matrices of a layer read and write, by their usual names.

        Those of the MLP are of one expert, if there are experts.
        """
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        gate = {"gate_proj": (hidden, inner)} if self.mlp == "gated" else {}
        return {
            "q_proj": (hidden, heads), "k_proj": (hidden, kv), "v_proj": (hidden, kv),
            "o_proj": (heads, hidden), **gate, "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }  # fmt: skip

    @property
    def expert_params(self) -> int:
        """Return the parameters of one MLP (of one expert)."""
        return (3 if self.mlp == "gated" else 2) * self.hidden_size * self.intermediate_size

    @property
    def matmul_params_per_layer(self) -> int:
        """Return the matrix parameters of one layer, all experts and the router included."""
        experts = max(self.num_experts, 1)
        router = self.hidden_size * self.num_experts
        return self.attention_params_per_layer + experts * self.expert_params + router

    @property
    def active_matmul_params_per_layer(self) -> int:
        """Return the matrix parameters of one layer that one token passes through, on average."""
        if self.active_parameters:
            return self.active_parameters // self.num_layers
        experts = self.num_active_experts if self.num_experts else 1
        router = self.hidden_size * self.num_experts
        return self.attention_params_per_layer + experts * self.expert_params + router

    @property
    def weight_bytes(self) -> float:
        """Return the bytes of all weights, embedding and output head included."""
        if self.stored_bytes:
            return self.stored_bytes
        layers = self.num_layers * self.matmul_params_per_layer
        return (layers + 2 * self.vocab_size * self.hidden_size) * self.dtype_bytes

    @property
    def kv_cache_layers(self) -> tuple[KvCacheLayers, ...]:
        """Return what the layers keep, by kind; where nothing is said, keys and values of each."""
        if self.kv_cache:
            return self.kv_cache
        # Quantised weights say nothing of the cache: it is of the model's type, at least 16 bits.
        head_bytes = 2 * self.head_dim * max(self.dtype_bytes, 2.0)
        return (KvCacheLayers("full", self.num_layers, self.num_kv_heads, head_bytes),)

    @property
    def kv_bytes_per_token(self) -> float:
        """Return the bytes of keys and values of one token over all layers, unsharded."""
        return sum(layers.bytes_per_token for layers in self.kv_cache_layers)

    def useful_flops(self, tokens: float, pairs: float, *, all_experts: bool = False) -> float:
        """Return the useful FLOPs of computing tokens (multiply and add counted as two).

        Args:
            tokens: tokens computed once each.
            pairs: sum over them of their position, the query-key pairs.
            all_experts: count every expert, as the paper's first implementation does, instead of
                the active ones.
        """
        params = (
            self.matmul_params_per_layer if all_experts else self.active_matmul_params_per_layer
        )
        attention = 4 * self.num_heads * self.head_dim
        return self.num_layers * (2 * params * tokens + attention * pairs)
