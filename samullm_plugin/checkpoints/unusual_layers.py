"""Layers that are not attention or a state, and an MLP behind it.

Of Gemma 3n and Gemma 4: per-layer embeddings, and keys and values that layers share. Sizes as in
transformers' ``modeling_gemma3n.py`` and ``modeling_gemma4.py``; what is kept as vLLM keeps it:
layers that read the keys and values of an earlier one keep none, and a layer whose values are its
keys keeps both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samullm_plugin.checkpoints.attentions import attention, shared_heads, state_space
from samullm_plugin.checkpoints.decoder import Decoder, NotModelledError
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


def one_thing(d: Decoder, i: int, kind: str) -> Layer:
    """Return a layer of Nemotron-H, which has one thing."""
    if kind == "state":
        return Layer(state=state_space(d.c, i))
    if kind == "full":
        return Layer(attention(d, i, "full"))
    return Layer(mlp=mixture(d, i) if kind == "moe" else dense(d, i))


def shortcut(d: Decoder, i: int, kind: str) -> Layer:
    """Return half a layer of LongCat: attention, dense MLP and the experts beside them."""
    plain, experts = dense(d, i), mixture(d, i)
    both = Mlp(
        (*plain.parts, *experts.parts),
        experts.width,
        experts.experts,
        experts.active,
        plain.active_matrices + experts.active_matrices,
    )
    return Layer(attention(d, i, "full"), None, both)


def shared_block(d: Decoder, i: int, kind: str) -> Layer:
    """Return a layer of Zamba2, whose attention blocks share weights."""
    c, hidden = d.c, d.hidden
    state = state_space(c, i)
    if kind != "hybrid":
        return Layer(state=state)
    size = int(c.get("attention_head_dim") or 2 * hidden // d.heads)
    kv_heads, width = shared_heads(d, d.heads), c.number("intermediate_size", 4 * hidden)
    ids = [k for k, t in enumerate(d.kinds) if t == "hybrid"]
    first = ids.index(i) < c.number("num_mem_blocks", 1)
    rank = c.number("adapter_rank", 128)
    own = [(hidden, hidden), (hidden, rank), (rank, 2 * width)]
    if c.flag("use_shared_attention_adapter"):
        own += [(2 * hidden, rank), (rank, d.heads * size)] * 3
    shapes = own
    if first:
        shapes = [
            *own,
            (2 * hidden, d.heads * size),
            (2 * hidden, kv_heads * size),
            (2 * hidden, kv_heads * size),
            (d.heads * size, hidden),
            (hidden, 2 * width),
            (width, hidden),
        ]
    part = linear(f"model.layers.{i}.shared_transformer", *shapes)
    return Layer(Attention("full", d.heads, kv_heads, 2 * size, part), state)


def searched_block(d: Decoder, i: int, kind: str) -> Layer:
    """Return a layer of a model that a search made (Nemotron NAS): sizes of its own, or nothing.

    Raises:
        InputError: naming what a block has that is not modelled.
    """
    blocks = d.c.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) <= i:
        raise NotModelledError(d.file, f"layer {i} without an entry of block_configs")
    ours, mlp = _block(d, blocks[i], "attention"), _block(d, blocks[i], "ffn")
    found = None
    if not ours.get("no_op"):
        kv_heads = d.heads // int(ours.get("n_heads_in_group") or 1)
        size = int(d.c.get("head_dim") or d.hidden // d.heads)
        wide = d.heads * size
        part = linear(
            f"model.layers.{i}.self_attn.q_proj",
            (d.hidden, wide), *[(d.hidden, kv_heads * size)] * 2, (wide, d.hidden),
            names=("q_proj", "k_proj", "v_proj", "o_proj"),
            bias=d.c.flag("attention_bias"),
        )  # fmt: skip
        found = Attention("full", d.heads, kv_heads, 2 * size, part)
    if mlp.get("no_op"):
        return Layer(found)
    width = int(mlp.get("intermediate_size") or 0)
    if not width:
        width = int(2 * float(mlp.get("ffn_mult") or 0) * d.hidden / 3)
        width = -(-width // 256) * 256
    part = linear(
        f"model.layers.{i}.mlp.down_proj", *mlp_shapes(d.hidden, width, gated=True),
        names=mlp_names(gated=True),
    )  # fmt: skip
    return Layer(found, None, Mlp((part,), width, active_matrices=part.matrices))


def _block(d: Decoder, block: object, name: str) -> Mapping[str, Any]:
    """Return one half of an entry of ``block_configs``."""
    half = block.get(name) if isinstance(block, Mapping) else None
    if not isinstance(half, Mapping):
        raise NotModelledError(d.file, f"an entry of block_configs without {name}")
    for feature in ("replace_with_linear", "moe", "mamba"):
        if half.get(feature):
            raise NotModelledError(d.file, f"{name} with {feature} in block_configs")
    return half


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
