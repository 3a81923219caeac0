"""State-space and linear-attention parts of layers: weights and state of a sequence.

Sizes of the states as vLLM keeps them (``vllm/model_executor/layers/mamba/mamba_utils.py``).
"""

from __future__ import annotations

from samullm_plugin.checkpoints.hf_config import HfConfig
from samullm_plugin.checkpoints.parts import StateSpace, linear

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
