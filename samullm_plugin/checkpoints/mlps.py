"""The MLP of a layer: dense, or a mixture of experts."""

from __future__ import annotations

from samullm_plugin.checkpoints.decoder import Decoder
from samullm_plugin.checkpoints.hf_config import HfConfig
from samullm_plugin.checkpoints.parts import Mlp, Part, linear, mlp_names, mlp_shapes


def mlp(d: Decoder, i: int) -> Mlp:
    """Return the MLP of one layer."""
    if "moe" in d.flags and routed_experts(d) > 1 and _sparse(d, i):
        return mixture(d, i)
    return dense(d, i)


def routed_experts(d: Decoder) -> int:
    """Return the routed experts of a layer."""
    return d.c.number("num_experts", 0)


def _dense_width(d: Decoder, i: int) -> int:
    """Return the width of a dense MLP."""
    c = d.c
    if c.kind == "llama4_text":
        return c.number("intermediate_size_mlp")
    if c.kind == "granitemoehybrid":
        return c.number("shared_intermediate_size")
    if c.kind == "longcat_flash":
        return c.number("ffn_hidden_size")
    if wide := c.get("dense_intermediate_size") or c.get("prefix_dense_intermediate_size"):
        return int(wide)
    if c.kind == "lfm2":
        return _adjusted(c)
    width = c.get("intermediate_size")
    if isinstance(width, list):
        return int(width[i])
    if width is None:
        if c.kind == "gemma3n_text":
            return 16384
        if c.kind == "mpt":
            return int(d.hidden * (c.get("expansion_ratio") or 4))
        if "plain" in d.flags:
            return 4 * d.hidden
    width = c.number("intermediate_size")
    return width // 2 if c.kind == "qwen" else width


def _adjusted(c: HfConfig) -> int:
    """Return the width that LFM2 makes of the one it is given."""
    width = int(c.get("block_ff_dim") or c.number("intermediate_size"))
    if not c.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    if (factor := c.get("block_ffn_dim_multiplier")) is not None:
        width = int(float(factor) * width)
    step = c.number("block_multiple_of", 256)
    return step * ((width + step - 1) // step)


def dense(d: Decoder, i: int) -> Mlp:
    """Return an MLP without experts."""
    width = _dense_width(d, i)
    shapes = mlp_shapes(d.hidden, width, gated=d.gated)
    bias = d.bias or d.c.flag("mlp_bias") or (d.c.kind in ("gptj", "codegen", "gpt_neo"))
    part = linear(
        f"model.layers.{i}.mlp.down_proj", *shapes, names=mlp_names(gated=d.gated), bias=bias
    )
    return Mlp((part,), width, active_matrices=part.matrices)


def _sparse(d: Decoder, i: int) -> bool:
    """Return whether a layer has experts."""
    c = d.c
    listed = c.get("mlp_layer_types")
    if isinstance(listed, list) and len(listed) > i:
        return str(listed[i]) in ("sparse", "moe")
    for name in ("is_moe_layer", "moe_layer_freq"):
        marks = c.get(name)
        if isinstance(marks, list):
            return bool(marks[i]) if len(marks) > i else True
    if c.kind == "llama4_text":
        layers = c.get("moe_layers")
        if isinstance(layers, list) and layers:
            return i in layers
        step = c.number("interleave_moe_layer_step", 1)
        return step > 0 and (i + 1) % step == 0
    if c.kind == "step3p5" and isinstance(layers := c.get("moe_layers_enum"), str):
        return i in {int(v) for v in layers.split(",")}
    if c.kind == "jamba":
        return i % c.number("expert_layer_period") == c.number("expert_layer_offset")
    if c.kind in ("ernie4_5_moe", "ernie4_5_vl_moe_text"):
        first = c.number("moe_layer_start_index", 0)
        last = c.get("moe_layer_end_index")
        last = d.count - 1 if last in (None, -1) else int(last)
        return first <= i <= last and (i + 1) % c.number("moe_layer_interval", 1) == 0
    dense_first = c.get("first_k_dense_replace")
    dense_first = c.get("num_dense_layers") if dense_first is None else dense_first
    if i < int(dense_first or 0):
        return False
    if i in (c.get("mlp_only_layers") or ()):
        return False
    if c.get("dense_list") and i in c.get("dense_list"):
        return False
    step = int(c.get("decoder_sparse_step") or c.get("moe_layer_freq") or 1)
    return (i + 1) % step == 0 if c.get("decoder_sparse_step") else i % step == 0


def mixture(d: Decoder, i: int) -> Mlp:
    """Return an MLP of experts."""
    c, hidden, experts = d.c, d.hidden, routed_experts(d)
    width = c.number("moe_intermediate_size", 0) or c.number("intermediate_size")
    latent = int(c.get("moe_latent_size") or 0) or hidden
    per_expert = mlp_shapes(latent, width, gated=d.gated)
    module = f"model.layers.{i}.mlp.experts.0.down_proj"
    routed = linear(
        module,
        *per_expert,
        names=mlp_names(gated=d.gated),
        bias="bias" in d.flags and c.kind == "gpt_oss",
        experts=experts,
    )
    total = experts + c.number("zero_expert_num", 0)
    parts = [routed, Part(f"model.layers.{i}.mlp.gate", others=hidden * total)]
    shared = _shared_width(d, width)
    active = c.number("num_experts_per_tok", 1)
    matrices = active * routed.matrices // experts
    if shared:
        gate = hidden if c.kind in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text") else 0
        called = "shared_expert" if c.kind.startswith(("qwen", "llama4")) else "shared_experts"
        part = linear(
            f"model.layers.{i}.mlp.{called}.down_proj",
            *mlp_shapes(hidden, shared, gated=d.gated),
            names=mlp_names(gated=d.gated),
            others=gate,
        )
        parts.append(part)
        matrices += part.matrices
    if latent != hidden:
        part = linear(f"model.layers.{i}.mlp.fc1_latent_proj", (hidden, latent), (latent, hidden))
        parts.append(part)
        matrices += part.matrices
    if c.kind == "arctic":
        part = linear(f"model.layers.{i}.residual_mlp.w1", *mlp_shapes(hidden, hidden, gated=True))
        parts.append(part)
        matrices += part.matrices
    return Mlp(tuple(parts), width, experts, active, matrices)


def _shared_width(d: Decoder, width: int) -> int:
    """Return the width of all shared experts together."""
    c = d.c
    for name in (
        "moe_shared_expert_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "share_expert_dim",
    ):
        if (given := c.get(name)) is not None:
            return int(given) * (c.number("n_shared_experts", 1) if name.startswith("moe_") else 1)
    if c.kind == "llama4_text":
        return width
    if c.kind == "hunyuan_v1_moe":
        shared = c.get("num_shared_expert", 1)
        return width * int(shared[0] if isinstance(shared, list) else shared or 1)
    return width * c.number("n_shared_experts", 0)
