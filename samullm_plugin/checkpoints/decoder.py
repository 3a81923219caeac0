"""What the builders of a model's parts share: the configuration, and which layer has what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from samullm_plugin.checkpoints.families import GEMMA_3N, GEMMA_4, RECURRENT
from samullm_plugin.checkpoints.hf_config import ConfigFile, HfConfig
from samullm_plugin.errors import InputError


class NotModelledError(InputError):
    """A model has a feature that its sizes depend on and that nobody here knows.

    Attributes:
        only_towers: the language model is known, and only what is beside it is not.
    """

    def __init__(self, file: ConfigFile, feature: str, *, only_towers: bool = False) -> None:
        """Name the file, the feature and the remedies."""
        super().__init__(
            f"{file.file}: {feature} is not modelled, so its sizes would be a guess; give them "
            "under `architecture` in app.yaml, or install transformers or vLLM in a version that "
            "knows the model"
        )
        self.only_towers = only_towers


@dataclass(frozen=True, slots=True)
class Decoder:
    """A language model whose layers are being read.

    Attributes:
        file: its ``config.json``.
        c: the language model's section.
        flags: of its family.
        kinds: what each layer has (``layer_kinds``).
        hidden: numbers of a token between layers.
        heads: query heads; 0 without attention.
        gated: MLPs have a gate.
        bias: all linear layers have biases.
    """

    file: ConfigFile
    c: HfConfig
    flags: frozenset[str]
    kinds: tuple[str, ...]
    hidden: int
    heads: int
    gated: bool
    bias: bool

    @property
    def count(self) -> int:
        """Return the number of layers."""
        return len(self.kinds)


def read_decoder(file: ConfigFile, flags: frozenset[str]) -> Decoder:
    """Return what a configuration says of all layers.

    Raises:
        InputError: naming a field that is missing or wrong.
    """
    c = file.text
    if c.kind in ("falcon", "mpt"):
        bias = c.flag("bias", not c.flag("no_bias", True))
    else:
        bias = "bias" in flags and c.flag("use_bias", True)
    return Decoder(
        file,
        c,
        flags,
        tuple(layer_kinds(file, flags)),
        c.number("hidden_size"),
        0 if c.kind in RECURRENT else c.number("num_attention_heads"),
        "plain" not in flags,
        bias,
    )


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


_MOST = 10_000


def layer_kinds(file: ConfigFile, flags: frozenset[str]) -> list[str]:
    """Return what each layer has: a kind of attention, ``state``, ``hybrid``, ``moe`` or ``mlp``.

    Args:
        file: the ``config.json``.
        flags: of its family.

    Raises:
        InputError: naming a kind of layer that is not modelled.
    """
    count = file.text.number("num_hidden_layers", 0)
    if count > _MOST:
        raise InputError(f"{file.text.where}: num_hidden_layers is {count}; at most {_MOST:,}")
    return _given(file) or _by_family(file.text, file.text.number("num_hidden_layers"), flags)


def _given(file: ConfigFile) -> list[str] | None:
    """Return what the configuration itself says of each layer, None if nothing."""
    c = file.text
    found = c.get("layer_types")
    if pattern := c.get("hybrid_override_pattern"):
        found = list(str(pattern))
    if isinstance(marks := c.given.get("hybrid_layer_pattern"), list):  # MiMo-V2
        found = ["sliding" if mark else "full" for mark in marks]
    if not isinstance(found, list) or not found:
        return None
    kinds = []
    for name in found:
        kind = _KINDS.get(str(name))
        if kind is None:
            raise NotModelledError(file, f"layers of type {name!r}")
        kinds.append(kind)
    if not c.get("hybrid_override_pattern") and c.has("num_hidden_layers"):
        kinds = kinds[: c.number("num_hidden_layers")]
    return kinds


def _by_family(c: HfConfig, n: int, flags: frozenset[str]) -> list[str]:
    """Return what the family says of each layer."""
    kind = c.kind
    window = c.get("sliding_window")
    every = range(n)
    if kind in RECURRENT:
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
    if kind in ("minimax", "minimax_text_01", "minimax_m1"):
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
    if kind in (*GEMMA_3N, *GEMMA_4):
        step = 5 if kind in GEMMA_3N else 6
        return ["full" if (i + 1) % step == 0 or i == n - 1 else "sliding_window" for i in every]
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
                "sliding_window" if m == "L" and i < n - 1 else "full" for i, m in enumerate(short)
            ]
        if not marks:
            return ["full"] * n
        return ["sliding_window" if (i + 1) % int(marks) and i < n - 1 else "full" for i in every]
    if c.get("use_sliding_window") is not None:
        if not c.flag("use_sliding_window"):
            return ["full"] * n
        first = c.number("max_window_layers", 0)
        return ["sliding_window" if i >= first else "full" for i in every]
    if "window" in flags:
        return ["sliding_window"] * n
    return ["full"] * n
