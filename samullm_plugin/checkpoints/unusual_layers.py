"""Layers that are not attention or a state, and an MLP behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samullm_plugin.checkpoints.attentions import attention, shared_heads
from samullm_plugin.checkpoints.decoder import Decoder
from samullm_plugin.checkpoints.mixers import state_space
from samullm_plugin.checkpoints.mlps import dense, mixture
from samullm_plugin.checkpoints.parts import Attention, Layer, Mlp, linear, mlp_names, mlp_shapes
from samullm_plugin.checkpoints.refusals import NotModelledError


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
