"""Layers of Gemma 3n and Gemma 4: per-layer embeddings, and keys and values that layers share.

Sizes as in transformers' ``modeling_gemma3n.py`` and ``modeling_gemma4.py``; what is kept as vLLM
keeps it: layers that read the keys and values of an earlier one keep none, and a layer whose values
are its keys keeps both.
"""

from __future__ import annotations

from samullm_plugin.checkpoints.decoder import Decoder
from samullm_plugin.checkpoints.families import GEMMA_3N, GEMMA_4
from samullm_plugin.checkpoints.mlps import dense, mixture
from samullm_plugin.checkpoints.parts import (
    Attention,
    Layer,
    Mlp,
    Part,
    linear,
    mlp_names,
    mlp_shapes,
)


def gemma_layer(d: Decoder, i: int, kind: str) -> Layer:
    """Return a layer of Gemma 3n or Gemma 4."""
    c, hidden = d.c, d.hidden
    borrows = _borrows(d, i)
    per_layer = c.number("hidden_size_per_layer_input", 0)
    others = 4 * hidden
    side = []
    if per_layer:
        side += [(hidden, per_layer), (per_layer, hidden)]
        others += hidden
    if c.kind in GEMMA_3N:
        inputs, rank = c.number("altup_num_inputs"), c.number("laurel_rank")
        side += [(hidden, rank), (rank, hidden)]
        others += inputs**2 + inputs**3 + hidden * inputs + 3 * hidden
        mlp = dense(d, i)
    else:
        mlp, more = _gemma_4_mlp(d, i, borrows)
        others += more
    extra = linear(f"model.layers.{i}.per_layer_projection", *side)
    mlp = Mlp(
        (*mlp.parts, extra), mlp.width, mlp.experts, mlp.active,
        mlp.active_matrices + extra.matrices,
    )  # fmt: skip
    return Layer(_attention(d, i, kind, borrows), None, mlp, others)


def gemma_outside(d: Decoder) -> list[Part]:
    """Return what Gemma 3n and 4 have beside embedding and layers."""
    c, hidden = d.c, d.hidden
    parts = []
    if per_layer := c.number("hidden_size_per_layer_input", 0):
        wide = d.count * per_layer
        rows = c.number("vocab_size_per_layer_input")
        parts += [
            Part("model.embed_tokens_per_layer", others=rows * wide + per_layer),
            linear("model.per_layer_model_projection", (hidden, wide)),
        ]
    if c.kind in GEMMA_3N:
        pairs = 2 * (c.number("altup_num_inputs") - 1)
        parts.append(linear("model.altup_projections", *[(hidden, hidden)] * pairs))
    return parts


def _borrows(d: Decoder, i: int) -> bool:
    """Return whether a layer reads the keys and values of an earlier one."""
    first = d.count - d.c.number("num_kv_shared_layers", 0)
    return i >= first > 0


def _attention(d: Decoder, i: int, kind: str, borrows: bool) -> Attention:
    c, hidden, heads = d.c, d.hidden, d.heads
    kv_heads, size, same = c.number("num_key_value_heads"), c.number("head_dim"), False
    if c.kind in GEMMA_4 and kind == "full":
        same = c.flag("attention_k_eq_v")
        size = c.number("global_head_dim", 512)
        if same:
            kv_heads = c.number("num_global_key_value_heads", kv_heads)
    own = {int(k): v for k, v in (c.get("per_layer_config") or {}).items()}.get(i) or {}
    size = int(own.get("head_dim") or size)
    kv_heads = int(own.get("num_key_value_heads") or kv_heads)
    shapes, names = [(hidden, heads * size), (heads * size, hidden)], ["q_proj", "o_proj"]
    if not borrows:
        names += ["k_proj"] if same else ["k_proj", "v_proj"]
        shapes += [(hidden, kv_heads * size)] * (1 if same else 2)
    part = linear(
        f"model.layers.{i}.self_attn.q_proj", *shapes, names=names,
        bias=c.flag("attention_bias"), others=size * (1 if borrows else 2),
    )  # fmt: skip
    window = c.number("sliding_window") if kind == "sliding_window" else 0
    return Attention(
        "sliding_window" if window else "full", heads, kv_heads, 2 * size, part, window,
        keeps=not borrows,
    )  # fmt: skip


def _gemma_4_mlp(d: Decoder, i: int, borrows: bool) -> tuple[Mlp, int]:
    """Return the MLP of a layer, experts beside it, and the parameters of their norms."""
    c, hidden = d.c, d.hidden
    width = c.number("intermediate_size") * (2 if c.flag("use_double_wide_mlp") and borrows else 1)
    part = linear(
        f"model.layers.{i}.mlp.down_proj", *mlp_shapes(hidden, width, gated=True),
        names=mlp_names(gated=True),
    )  # fmt: skip
    if not c.get("num_experts"):
        return Mlp((part,), width, active_matrices=part.matrices), 0
    found = mixture(d, i)
    both = Mlp(
        (part, *found.parts), found.width, found.experts, found.active,
        found.active_matrices + part.matrices,
    )  # fmt: skip
    return both, 4 * hidden + found.experts
