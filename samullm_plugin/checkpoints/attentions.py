"""Attention of a layer: its weights, and what it keeps of a token."""

from __future__ import annotations

from samullm_plugin.checkpoints.decoder import Decoder
from samullm_plugin.checkpoints.parts import Attention, linear
from samullm_plugin.model.kv_cache import KvCacheKind


def attention(d: Decoder, i: int, kind: KvCacheKind) -> Attention:
    """Return the attention of one layer."""
    c, hidden, heads = d.c, d.hidden, d.heads
    window = 0
    if kind == "sliding_window":
        window = int(c.get("sliding_window") or c.get("sliding_window_size") or 0)
    elif kind == "chunked_local":
        window = c.number("attention_chunk_size")
    if kind != "full" and not window:
        kind = "full"
    if "mla" in d.flags:
        return _latent(d, i, kind, window)
    per_layer = c.get("num_attention_heads_per_layer")
    if isinstance(per_layer, list) and len(per_layer) > i:
        heads = int(per_layer[i])
    kv_heads = shared_heads(d, heads)
    size = _head_dim(d)
    if kind == "sliding_window" and c.get("swa_num_key_value_heads"):
        heads = c.number("swa_num_attention_heads", heads)
        kv_heads = c.number("swa_num_key_value_heads")
    v_size = c.number("v_head_dim", size) if c.kind == "mimo_v2_flash" else size
    if "gate" in d.flags:
        gate = heads * v_size
    elif "headgate" in d.flags:
        gate = heads
    else:
        gate = heads * size if "double_q" in d.flags else 0
    part = linear(
        f"model.layers.{i}.self_attn.q_proj",
        (hidden, heads * size + gate),
        (hidden, kv_heads * size),
        (hidden, kv_heads * v_size),
        (heads * v_size, hidden),
        names=("q_proj", "k_proj", "v_proj", "o_proj"),
        bias=(d.bias and c.kind not in ("gptj", "codegen")) or c.flag("attention_bias"),
    )
    return Attention(kind, heads, kv_heads, size + v_size, part, window)


def shared_heads(d: Decoder, heads: int) -> int:
    """Return the key-value heads."""
    c = d.c
    if c.kind == "falcon":
        if c.flag("new_decoder_architecture"):
            return c.number("num_key_value_heads", heads)
        return 1 if c.flag("multi_query") else heads
    if c.kind == "gpt_bigcode":
        return 1 if c.flag("multi_query") else heads
    if c.kind == "chatglm" or c.flag("multi_query_attention"):
        return c.number("multi_query_group_num", heads)
    return c.number("num_key_value_heads", heads) or heads


def _head_dim(d: Decoder) -> int:
    """Return the width of a head."""
    own = d.c.get("head_dim")
    if not own and d.c.kind in ("chatglm", "qwen"):
        own = d.c.get("kv_channels")
    return int(own) if own else d.hidden // max(d.heads, 1)


def _latent(d: Decoder, i: int, kind: KvCacheKind, window: int) -> Attention:
    """Return attention through a latent that all heads share."""
    c, hidden, heads = d.c, d.hidden, d.heads
    rank, rope = c.number("kv_lora_rank"), c.number("qk_rope_head_dim")
    nope = c.number("qk_nope_head_dim")
    value = c.number("v_head_dim", hidden // heads if c.kind == "minicpm3" else None)
    shapes = [
        (hidden, rank + rope),
        (rank, heads * (nope + value)),
        (heads * value, hidden),
    ]
    names = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    q_rank = c.get("q_lora_rank")
    if q_rank:
        shapes += [(hidden, int(q_rank)), (int(q_rank), heads * (nope + rope))]
        names += ["q_a_proj", "q_b_proj"]
    else:
        shapes.append((hidden, heads * (nope + rope)))
        names.append("q_proj")
    side = 0
    if "indexer" in d.flags:
        n, wide = c.number("index_n_heads"), c.number("index_head_dim")
        shapes += [(int(q_rank or hidden), n * wide), (hidden, wide), (hidden, n)]
        names += ["indexer.wq_b", "indexer.wk", "indexer.weights_proj"]
        side = wide + 4  # one byte a number and a scale
    part = linear(f"model.layers.{i}.self_attn.kv_b_proj", *shapes, names=names)
    if c.kind == "minicpm3":  # vLLM keeps whole keys and values of this one
        return Attention(kind, heads, heads, 2 * (nope + rope), part, window)
    return Attention(kind, heads, 1, rank + rope, part, window, side_bytes=side)
