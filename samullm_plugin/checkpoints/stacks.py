"""From a configuration to the layers of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from samullm_plugin.checkpoints.families import FAMILIES, NOT_MODELLED, VISION_NOT_MODELLED
from samullm_plugin.checkpoints.hf_config import ConfigFile, HfConfig
from samullm_plugin.checkpoints.mixers import state_space
from samullm_plugin.checkpoints.parts import (
    Attention,
    Layer,
    Layers,
    Mlp,
    Part,
    linear,
    mlp_shapes,
)
from samullm_plugin.checkpoints.vision import vision_parts
from samullm_plugin.errors import InputError
from samullm_plugin.model.kv_cache import KvCacheKind

_KINDS: Mapping[str, str] = {
    "full_attention": "full", "attention": "full", "full": "full", "global": "full", "*": "full",
    "sliding_attention": "sliding_window", "sliding": "sliding_window", "local": "sliding_window",
    "sliding_window": "sliding_window", "indexed_attention": "full",
    "chunked_attention": "chunked_local",
    "linear_attention": "state", "mamba": "state", "mamba2": "state", "conv": "state", "M": "state",
    "kda": "state", "gdn": "state", "recurrent": "state", "hybrid": "hybrid", "moe": "moe",
    "E": "moe", "mlp": "mlp", "-": "mlp",
}  # fmt: skip
"""What the entries of ``layer_types`` and of patterns mean."""


def read_layers(file: ConfigFile, *, guess: bool = False) -> Layers:
    """Return the layers of a model.

    Args:
        file: its ``config.json``.
        guess: read a family that is not known as a plain decoder; only for callers that check the
            result against the model itself.

    Raises:
        InputError: naming what is not modelled.
    """
    text = file.text
    flags = FAMILIES.get(text.kind)
    reason = NOT_MODELLED.get(text.kind) or NOT_MODELLED.get(file.top.kind)
    reason = reason or VISION_NOT_MODELLED.get(file.top.kind)
    if reason is not None:
        raise not_modelled(file, reason)
    if flags is None:
        if not guess:
            raise not_modelled(file, f"model_type {text.kind!r}")
        flags = frozenset({"moe"} if text.has("num_experts") else ())
    return _Stack(file, text, flags).layers()


def not_modelled(file: ConfigFile, feature: str) -> InputError:
    """Return the refusal of a model that has a feature which is not modelled."""
    return InputError(
        f"{file.file}: {feature} is not modelled, so its sizes would be a guess; give them under "
        "`architecture` in app.yaml, or install transformers in a version that knows the model"
    )


class _Stack:
    """Builds the layers of one configuration."""

    def __init__(self, file: ConfigFile, config: HfConfig, flags: frozenset[str]) -> None:
        self.file, self.c, self.flags = file, config, flags
        self.hidden = config.number("hidden_size")
        self.gated = "plain" not in flags
        if config.kind in ("falcon", "mpt"):
            self.bias = config.flag("bias", not config.flag("no_bias", True))
        else:
            self.bias = "bias" in flags and config.flag("use_bias", True)
        types = self._layer_types()
        self.count = len(types) if types is not None else config.number("num_hidden_layers")
        self.types = types or self._pattern()
        self.heads = (
            0
            if config.kind in ("mamba", "mamba2", "falcon_mamba")
            else (config.number("num_attention_heads"))
        )

    # Which layer has what

    def _layer_types(self) -> list[str] | None:
        """Return what the configuration itself says of each layer, None if nothing."""
        c = self.c
        found = c.get("layer_types")
        if pattern := c.get("hybrid_override_pattern"):
            found = list(str(pattern))
        if not isinstance(found, list) or not found:
            return None
        kinds = []
        for name in found:
            kind = _KINDS.get(str(name))
            if kind is None:
                raise not_modelled(self.file, f"layers of type {name!r}")
            kinds.append(kind)
        if not c.get("hybrid_override_pattern") and c.has("num_hidden_layers"):
            kinds = kinds[: c.number("num_hidden_layers")]
        return kinds

    def _pattern(self) -> list[str]:
        """Return what the family says of each layer."""
        c, n, kind = self.c, self.count, self.c.kind
        window = c.get("sliding_window")
        every = range(n)
        if kind in ("mamba", "mamba2", "falcon_mamba"):
            return ["state"] * n
        if kind == "falcon_h1":
            return ["hybrid"] * n
        if kind == "bamba":
            where = set(c.get("attn_layer_indices") or ())
            return ["full" if i in where else "state" for i in every]
        if kind == "jamba":
            period, offset = c.number("attn_layer_period"), c.number("attn_layer_offset")
            return ["full" if i % period == offset else "state" for i in every]
        if kind == "zamba2":
            ids = set(c.get("hybrid_layer_ids") or ())
            return ["hybrid" if i in ids else "state" for i in every]
        if kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"):
            step = c.number("full_attention_interval", 4)
            return ["state" if (i + 1) % step else "full" for i in every]
        if kind == "kimi_linear":
            linear_config = c.get("linear_attn_config") or {}
            full = set(linear_config.get("full_attn_layers") or ())  # counted from one
            return ["full" if i + 1 in full else "state" for i in every]
        if kind in ("lfm2", "lfm2_moe"):
            full = set(c.get("full_attn_idxs") or ())
            return ["full" if i in full else "state" for i in every]
        if kind == "minimax":
            listed = c.get("attn_type_list")
            if isinstance(listed, list):
                return ["full" if v else "state" for v in listed]
            return ["state" if i % 2 else "full" for i in every]
        if kind == "granitemoehybrid":
            return ["state"] * n
        if kind == "llama4_text":
            rope = c.get("no_rope_layers")
            step = c.number("no_rope_layer_interval", 4)
            local = rope if isinstance(rope, list) and rope else [(i + 1) % step for i in every]
            chunk = c.get("attention_chunk_size")
            return ["chunked_local" if v and chunk else "full" for v in local]
        if not window:
            return ["full"] * n
        if kind in ("gemma2", "gpt_oss", "vaultgemma"):
            return ["full" if i % 2 else "sliding_window" for i in every]
        if kind in ("gemma3", "gemma3_text", "shieldgemma2"):
            step = c.number("sliding_window_pattern", 6)
            return ["full" if (i + 1) % step == 0 else "sliding_window" for i in every]
        if kind in ("cohere2", "cohere2_moe", "olmo3", "exaone_moe", "afmoe"):
            step = c.get("sliding_window_pattern") or c.get("global_attn_every_n_layers") or 4
            return ["sliding_window" if (i + 1) % int(step) else "full" for i in every]
        if kind == "exaone4":
            marks = c.get("sliding_window_pattern")
            if isinstance(marks, str):
                short = [marks[i % len(marks)] for i in every]
                return [
                    "sliding_window" if m == "L" and i < n - 1 else "full"
                    for i, m in enumerate(short)
                ]
            if not marks:
                return ["full"] * n
            return [
                "sliding_window" if (i + 1) % int(marks) and i < n - 1 else "full" for i in every
            ]
        if c.get("use_sliding_window") is not None:
            if not c.flag("use_sliding_window"):
                return ["full"] * n
            first = c.number("max_window_layers", 0)
            return ["sliding_window" if i >= first else "full" for i in every]
        if "window" in self.flags:
            return ["sliding_window"] * n
        return ["full"] * n

    # Attention

    def attention(self, i: int, kind: KvCacheKind) -> Attention:
        """Return the attention of one layer."""
        c, hidden, heads = self.c, self.hidden, self.heads
        window = 0
        if kind == "sliding_window":
            window = int(c.get("sliding_window") or c.get("sliding_window_size") or 0)
        elif kind == "chunked_local":
            window = c.number("attention_chunk_size")
        if kind != "full" and not window:
            kind = "full"
        if "mla" in self.flags:
            return self._latent(i, kind, window)
        per_layer = c.get("num_attention_heads_per_layer")
        if isinstance(per_layer, list) and len(per_layer) > i:
            heads = int(per_layer[i])
        kv_heads = self._kv_heads(heads)
        size = self._head_dim()
        if kind == "sliding_window" and c.get("swa_num_key_value_heads"):
            heads = c.number("swa_num_attention_heads", heads)
            kv_heads = c.number("swa_num_key_value_heads")
        v_size = c.number("v_head_dim", size) if c.kind == "mimo_v2_flash" else size
        if "gate" in self.flags:
            gate = heads * v_size
        elif "headgate" in self.flags:
            gate = heads
        else:
            gate = heads * size if "double_q" in self.flags else 0
        part = linear(
            f"model.layers.{i}.self_attn.q_proj",
            (hidden, heads * size + gate),
            (hidden, kv_heads * size),
            (hidden, kv_heads * v_size),
            (heads * v_size, hidden),
            bias=(self.bias and c.kind not in ("gptj", "codegen")) or c.flag("attention_bias"),
        )
        return Attention(kind, heads, kv_heads, size + v_size, part, window)

    def _kv_heads(self, heads: int) -> int:
        """Return the key-value heads."""
        c = self.c
        if c.kind == "falcon":
            if c.flag("new_decoder_architecture"):
                return c.number("num_key_value_heads", heads)
            return 1 if c.flag("multi_query") else heads
        if c.kind == "gpt_bigcode":
            return 1 if c.flag("multi_query") else heads
        if c.kind == "chatglm" or c.flag("multi_query_attention"):
            return c.number("multi_query_group_num", heads)
        return c.number("num_key_value_heads", heads) or heads

    def _head_dim(self) -> int:
        """Return the width of a head."""
        own = self.c.get("head_dim")
        if not own and self.c.kind in ("chatglm", "qwen"):
            own = self.c.get("kv_channels")
        return int(own) if own else self.hidden // max(self.heads, 1)

    def _latent(self, i: int, kind: KvCacheKind, window: int) -> Attention:
        """Return attention through a latent that all heads share."""
        c, hidden, heads = self.c, self.hidden, self.heads
        rank, rope = c.number("kv_lora_rank"), c.number("qk_rope_head_dim")
        nope, value = c.number("qk_nope_head_dim"), c.number("v_head_dim")
        shapes = [
            (hidden, rank + rope),
            (rank, heads * (nope + value)),
            (heads * value, hidden),
        ]
        q_rank = c.get("q_lora_rank")
        if q_rank:
            shapes += [(hidden, int(q_rank)), (int(q_rank), heads * (nope + rope))]
        else:
            shapes.append((hidden, heads * (nope + rope)))
        side = 0
        if "indexer" in self.flags:
            n, d = c.number("index_n_heads"), c.number("index_head_dim")
            shapes += [(int(q_rank or hidden), n * d), (hidden, d), (hidden, n)]
            side = d + 4  # one byte a number and a scale
        module = f"model.layers.{i}.self_attn.kv_b_proj"
        if c.kind == "minicpm3":  # vLLM keeps whole keys and values of this one
            return Attention(kind, heads, heads, 2 * (nope + rope), linear(module, *shapes), window)
        return Attention(
            kind, heads, 1, rank + rope, linear(module, *shapes), window, side_bytes=side
        )

    # MLPs

    def mlp(self, i: int) -> Mlp:
        """Return the MLP of one layer."""
        if "moe" in self.flags and self.experts() > 1 and self._sparse(i):
            return self._mixture(i)
        return self._dense(i)

    def experts(self) -> int:
        """Return the routed experts of a layer."""
        return self.c.number("num_experts", 0)

    def _dense_width(self, i: int) -> int:
        """Return the width of a dense MLP."""
        c = self.c
        if c.kind == "llama4_text":
            return c.number("intermediate_size_mlp")
        if c.kind == "granitemoehybrid":
            return c.number("shared_intermediate_size")
        if c.kind == "longcat_flash":
            return c.number("ffn_hidden_size")
        if wide := c.get("dense_intermediate_size") or c.get("prefix_dense_intermediate_size"):
            return int(wide)
        if c.kind == "lfm2":
            return self._adjusted(c)
        width = c.get("intermediate_size")
        if isinstance(width, list):
            return int(width[i])
        if width is None:
            if c.kind == "mpt":
                return int(self.hidden * (c.get("expansion_ratio") or 4))
            if "plain" in self.flags:
                return 4 * self.hidden
        width = c.number("intermediate_size")
        return width // 2 if c.kind == "qwen" else width

    @staticmethod
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

    def _dense(self, i: int) -> Mlp:
        """Return an MLP without experts."""
        width = self._dense_width(i)
        shapes = mlp_shapes(self.hidden, width, gated=self.gated)
        bias = (
            self.bias or self.c.flag("mlp_bias") or (self.c.kind in ("gptj", "codegen", "gpt_neo"))
        )
        part = linear(f"model.layers.{i}.mlp.down_proj", *shapes, bias=bias)
        return Mlp((part,), width, active_matrices=part.matrices)

    def _sparse(self, i: int) -> bool:
        """Return whether a layer has experts."""
        c = self.c
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
            last = self.count - 1 if last in (None, -1) else int(last)
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

    def _mixture(self, i: int) -> Mlp:
        """Return an MLP of experts."""
        c, hidden, experts = self.c, self.hidden, self.experts()
        width = c.number("moe_intermediate_size", 0) or c.number("intermediate_size")
        latent = int(c.get("moe_latent_size") or 0) or hidden
        per_expert = mlp_shapes(latent, width, gated=self.gated)
        module = f"model.layers.{i}.mlp.experts.0.down_proj"
        routed = linear(
            module,
            *per_expert * experts,
            bias="bias" in self.flags and c.kind == "gpt_oss",
            experts=True,
        )
        total = experts + c.number("zero_expert_num", 0)
        parts = [routed, Part(f"model.layers.{i}.mlp.gate", others=hidden * total)]
        shared = self._shared_width(width)
        active = c.number("num_experts_per_tok", 1)
        matrices = active * routed.matrices // experts
        if shared:
            gate = hidden if c.kind in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text") else 0
            part = linear(
                f"model.layers.{i}.mlp.shared_expert.down_proj",
                *mlp_shapes(hidden, shared, gated=self.gated),
                others=gate,
            )
            parts.append(part)
            matrices += part.matrices
        if latent != hidden:
            part = linear(
                f"model.layers.{i}.mlp.fc1_latent_proj", (hidden, latent), (latent, hidden)
            )
            parts.append(part)
            matrices += part.matrices
        if c.kind == "arctic":
            parts.append(
                linear(f"model.layers.{i}.residual_mlp.w1", *mlp_shapes(hidden, hidden, gated=True))
            )
        return Mlp(tuple(parts), width, experts, active, matrices)

    def _shared_width(self, width: int) -> int:
        """Return the width of all shared experts together."""
        c = self.c
        for name in (
            "moe_shared_expert_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "share_expert_dim",
        ):
            if (given := c.get(name)) is not None:
                return int(given) * (
                    c.number("n_shared_experts", 1) if name.startswith("moe_") else 1
                )
        if c.kind == "llama4_text":
            return width
        if c.kind == "hunyuan_v1_moe":
            shared = c.get("num_shared_expert", 1)
            return width * int(shared[0] if isinstance(shared, list) else shared or 1)
        return width * c.number("n_shared_experts", 0)

    # The whole

    def layers(self) -> Layers:
        """Return all layers and what is around them."""
        if "moe" not in self.flags and self.c.has("num_experts") and self.experts() > 1:
            raise not_modelled(self.file, f"a {self.c.kind} with experts")
        norms = (4 if "norms4" in self.flags else 2) * self.hidden
        build: Callable[[int, str], Layer] = self._layer
        if self.c.kind == "nemotron_h":
            build = self._single
        elif self.c.kind == "longcat_flash":
            build = self._shortcut
        found = []
        for i, kind in enumerate(self.types):
            layer = build(i, kind)
            found.append(Layer(layer.attention, layer.state, layer.mlp, layer.others + norms))
        if self.c.kind == "longcat_flash":
            found += [
                Layer(self.attention(i, "full"), None, self._dense(i), norms)
                for i in range(self.count)
            ]
        outside, notes = self._outside()
        return Layers(tuple(found), tuple(outside), tuple(notes))

    def _layer(self, i: int, kind: str) -> Layer:
        """Return a layer that has an MLP behind its attention or state."""
        state = state_space(self.c, i) if kind in ("state", "hybrid") else None
        if self.c.kind in ("mamba", "mamba2", "falcon_mamba"):
            return Layer(state=state)
        if self.c.kind == "zamba2":
            return self._shared_block(i, kind)
        attention = None
        if kind != "state":
            attention = self.attention(i, _attention_kind(kind))
        return Layer(attention, state, self.mlp(i))

    def _single(self, i: int, kind: str) -> Layer:
        """Return a layer of Nemotron-H, which has one thing."""
        if kind == "state":
            return Layer(state=state_space(self.c, i))
        if kind == "full":
            return Layer(self.attention(i, "full"))
        return Layer(mlp=self._mixture(i) if kind == "moe" else self._dense(i))

    def _shortcut(self, i: int, kind: str) -> Layer:
        """Return half a layer of LongCat: attention, dense MLP and the experts beside them."""
        dense, mixture = self._dense(i), self._mixture(i)
        both = Mlp(
            (*dense.parts, *mixture.parts),
            mixture.width,
            mixture.experts,
            mixture.active,
            dense.active_matrices + mixture.active_matrices,
        )
        return Layer(self.attention(i, "full"), None, both)

    def _shared_block(self, i: int, kind: str) -> Layer:
        """Return a layer of Zamba2, whose attention blocks share weights."""
        c, hidden = self.c, self.hidden
        state = state_space(c, i)
        if kind != "hybrid":
            return Layer(state=state)
        size = int(c.get("attention_head_dim") or 2 * hidden // self.heads)
        kv_heads, width = self._kv_heads(self.heads), c.number("intermediate_size", 4 * hidden)
        ids = [k for k, t in enumerate(self.types) if t == "hybrid"]
        first = ids.index(i) < c.number("num_mem_blocks", 1)
        rank = c.number("adapter_rank", 128)
        own = [(hidden, hidden), (hidden, rank), (rank, 2 * width)]
        if c.flag("use_shared_attention_adapter"):
            own += [(2 * hidden, rank), (rank, self.heads * size)] * 3
        shapes = own
        if first:
            shapes = [
                *own,
                (2 * hidden, self.heads * size),
                (2 * hidden, kv_heads * size),
                (2 * hidden, kv_heads * size),
                (self.heads * size, hidden),
                (hidden, 2 * width),
                (width, hidden),
            ]
        part = linear(f"model.layers.{i}.shared_transformer", *shapes)
        return Layer(Attention("full", self.heads, kv_heads, 2 * size, part), state)

    def _outside(self) -> tuple[list[Part], list[str]]:
        """Return embedding, positions, head and vision tower, and notes."""
        c, notes = self.c, []
        vocab = c.number("vocab_size")
        width = c.number("word_embed_proj_dim", self.hidden)
        outside = [Part("model.embed_tokens", others=vocab * width + self.hidden)]
        if width != self.hidden:
            outside.append(linear("model.project_in", (width, self.hidden), (self.hidden, width)))
        if "positions" in self.flags:
            extra = 2 if c.kind in ("opt", "biogpt") else 0
            rows = c.number("max_position_embeddings", 0) + extra
            outside.append(Part("model.embed_positions", others=rows * self.hidden))
        if not tied(self.file):
            outside.append(Part("lm_head", others=vocab * width))
        outside += vision_parts(self.file)
        if c.get("num_nextn_predict_layers"):
            notes.append(
                "layers that predict further tokens are not loaded, as vLLM leaves them "
                "out unless they speculate"
            )
        return outside, notes


def _attention_kind(kind: str) -> KvCacheKind:
    """Return the kind of a layer's attention."""
    if kind == "sliding_window":
        return "sliding_window"
    return "chunked_local" if kind == "chunked_local" else "full"


def tied(file: ConfigFile) -> bool:
    """Return whether the head is the embedding: by the file, else by the class's default.

    The outermost class comes first, as in vLLM; but Mistral 3's says tied, and its checkpoints hold
    a head of their own.
    """
    given = file.text.given.get("tie_word_embeddings", file.raw.get("tie_word_embeddings"))
    if given is not None:
        return bool(given)
    sections = (file.text, file.top) if file.top.kind == "mistral3" else (file.top, file.text)
    for section in sections:
        if (found := section.get("tie_word_embeddings")) is not None:
            return bool(found)
    return False
