"""Attention or a state-space part of a layer: its weights, and what it keeps of tokens.

Sizes of states as vLLM keeps them (``vllm/model_executor/layers/mamba/mamba_utils.py``).
"""

from __future__ import annotations

from samullm_plugin.checkpoints.decoder import Decoder
from samullm_plugin.checkpoints.hf_config import HfConfig
from samullm_plugin.checkpoints.parts import Attention, StateSpace, linear
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


_GATED_DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")


def state_space(c: HfConfig, i: int) -> StateSpace:
    """Return the state-space part of layer ``i``."""
    if c.kind in ("jamba", "mamba", "falcon_mamba"):
        return _mamba1(c, i)
    if c.kind in _GATED_DELTA:
        return _gated_delta(c, i)
    if c.kind == "kimi_linear":
        return _kimi(c, i)
    if c.kind in ("lfm2", "lfm2_moe"):
        return _short_convolution(c, i)
    if c.kind in ("minimax", "minimax_text_01", "minimax_m1"):
        return _lightning(c, i)
    return _mamba2(c, i)


def _first(c: HfConfig, *names: str, otherwise: int | None = None) -> int:
    """Return the first of some fields that is given."""
    found = next((n for n in names if c.get(n) is not None), names[0])
    return c.number(found, otherwise)


def _mamba1(c: HfConfig, i: int) -> StateSpace:
    """Return a Mamba layer (Jamba, Falcon-Mamba)."""
    hidden = c.number("hidden_size")
    inner = _first(c, "mamba_expand", "expand", otherwise=2) * hidden
    if c.kind != "jamba":
        inner = c.number("intermediate_size", inner)
    state = _first(c, "mamba_d_state", "state_size", otherwise=16)
    kernel = _first(c, "mamba_d_conv", "conv_kernel", otherwise=4)
    rank = c.get("mamba_dt_rank") or c.get("time_step_rank")
    rank = -(-hidden // 16) if rank in (None, "auto") else int(rank)
    part = linear(
        f"model.layers.{i}.mamba.in_proj",
        (hidden, 2 * inner), (inner, rank + 2 * state), (rank, inner), (inner, hidden),
        names=("in_proj", "x_proj", "dt_proj", "out_proj"),
        others=inner * (kernel + state + 3),
    )  # fmt: skip
    return StateSpace(part, inner * (kernel - 1), inner * state)


def _mamba2(c: HfConfig, i: int) -> StateSpace:
    """Return a Mamba-2 layer (Bamba, Granite-4, Nemotron-H, Falcon-H1, Zamba2, Codestral)."""
    hidden = c.number("hidden_size")
    expand = int(c.get("mamba_expand") or c.get("expand") or 2)
    heads = _first(c, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads", otherwise=0)
    size = c.get("mamba_d_head") or c.get("mamba_head_dim") or c.get("mamba_headdim")
    if c.kind == "mamba2":
        size = c.get("head_dim")
    inner = expand * hidden
    if c.kind == "falcon_h1":
        inner = c.number("mamba_d_ssm", inner)
    elif c.kind == "nemotron_h":
        inner = heads * int(size or 64)
    size = inner // heads if size in (None, "auto") else int(str(size))
    groups = _first(c, "mamba_n_groups", "n_groups", "mamba_ngroups", otherwise=1)
    state = _first(c, "mamba_d_state", "ssm_state_size", "state_size", otherwise=128)
    kernel = _first(c, "mamba_d_conv", "conv_kernel", otherwise=4)
    mixed = inner + 2 * groups * state
    part = linear(
        f"model.layers.{i}.mamba.in_proj",
        (hidden, inner + mixed + heads), (inner, hidden), names=("in_proj", "out_proj"),
        others=mixed * (kernel + 1) + 3 * heads + inner,
    )  # fmt: skip
    dtype = str(c.get("mamba_ssm_cache_dtype") or "")
    return StateSpace(part, mixed * (kernel - 1), heads * size * state, dtype)


def _gated_delta(c: HfConfig, i: int) -> StateSpace:
    """Return a gated delta net (Qwen3-Next, Qwen3.5, OLMo-Hybrid)."""
    hidden = c.number("hidden_size")
    k_heads, v_heads = c.number("linear_num_key_heads"), c.number("linear_num_value_heads")
    k_size, v_size = c.number("linear_key_head_dim"), c.number("linear_value_head_dim")
    keys, values = k_heads * k_size, v_heads * v_size
    kernel = c.number("linear_conv_kernel_dim", 4)
    part = linear(
        f"model.layers.{i}.linear_attn.in_proj_qkvz",
        (hidden, 2 * keys + 2 * values), (hidden, 2 * v_heads), (values, hidden),
        names=("in_proj_qkvz", "in_proj_ba", "out_proj"),
        others=(2 * keys + values) * kernel + 2 * v_heads + v_size,
    )  # fmt: skip
    dtype = str(c.get("mamba_ssm_dtype") or "")
    return StateSpace(part, (2 * keys + values) * (kernel - 1), v_heads * v_size * k_size, dtype)


def _kimi(c: HfConfig, i: int) -> StateSpace:
    """Return Kimi delta attention."""
    own = c.get("linear_attn_config") or {}
    hidden = c.number("hidden_size")
    heads = int(own.get("num_heads") or c.number("linear_num_heads"))
    size = int(own.get("head_dim") or c.number("linear_head_dim"))
    kernel = int(own.get("short_conv_kernel_size") or c.number("linear_conv_kernel_dim", 4))
    width = heads * size
    part = linear(
        f"model.layers.{i}.self_attn.q_proj",
        (hidden, width), (hidden, width), (hidden, width), (width, hidden),
        (hidden, size), (size, width), (hidden, size), (size, width), (hidden, heads),
        names=("q_proj", "k_proj", "v_proj", "o_proj", "f_a_proj", "f_b_proj", "g_a_proj",
               "g_b_proj", "b_proj"),
        others=3 * width * kernel + width,
    )  # fmt: skip
    return StateSpace(part, 3 * width * (kernel - 1), heads * size * size, "float32")


def _short_convolution(c: HfConfig, i: int) -> StateSpace:
    """Return a gated short convolution (LFM2)."""
    hidden, kernel = c.number("hidden_size"), c.number("conv_L_cache", 3)
    part = linear(
        f"model.layers.{i}.conv.in_proj",
        (hidden, 3 * hidden),
        (hidden, hidden),
        names=("in_proj", "out_proj"),
        others=hidden * kernel,
    )
    return StateSpace(part, hidden * (kernel - 1), 0)


def _lightning(c: HfConfig, i: int) -> StateSpace:
    """Return lightning attention (MiniMax-01)."""
    hidden, heads = c.number("hidden_size"), c.number("num_attention_heads")
    size = int(c.get("head_dim") or hidden // heads)
    part = linear(
        f"model.layers.{i}.self_attn.qkv_proj",
        (hidden, 3 * heads * size),
        (heads * size, hidden),
        (hidden, heads * size),
        names=("qkv_proj", "out_proj", "output_gate"),
        others=heads * size,
    )
    return StateSpace(part, 0, heads * size * size, "float32")
