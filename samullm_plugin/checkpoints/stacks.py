"""From a configuration to the layers of the model, and what is around them: heads and towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from samullm_plugin.checkpoints.attentions import attention, state_space
from samullm_plugin.checkpoints.decoder import Decoder, NotModelledError, read_decoder
from samullm_plugin.checkpoints.families import (
    FAMILIES,
    GEMMA_3N,
    GEMMA_4,
    NOT_MODELLED,
    RECURRENT,
    TOWERS_NOT_MODELLED,
)
from samullm_plugin.checkpoints.hf_config import TEXT_SECTIONS, ConfigFile, HfConfig, has_defaults
from samullm_plugin.checkpoints.mlps import dense, mlp, routed_experts
from samullm_plugin.checkpoints.parts import Layer, Layers, Part, linear
from samullm_plugin.checkpoints.unusual_layers import (
    gemma_layer,
    gemma_outside,
    one_thing,
    searched_block,
    shared_block,
    shortcut,
)
from samullm_plugin.model.kv_cache import KvCacheKind


def read_layers(file: ConfigFile, *, guess: bool = False, towers: bool = True) -> Layers:
    """Return the layers of a model.

    Args:
        file: its ``config.json``.
        guess: read a family that is not known as a plain decoder; only for callers that check the
            result against the model itself.
        towers: vision and audio towers too; else the language model alone.

    Raises:
        NotModelledError: naming what is not modelled.
        InputError: naming a field that is missing or wrong.
    """
    text = file.text
    flags = FAMILIES.get(text.kind)
    reason = NOT_MODELLED.get(text.kind) or NOT_MODELLED.get(file.top.kind)
    if reason is not None:
        raise NotModelledError(file, reason)
    if flags is None:
        if not guess:
            raise NotModelledError(file, f"model_type {text.kind!r}")
        flags = frozenset({"moe"} if text.has("num_experts") else ())
    reason = TOWERS_NOT_MODELLED.get(file.top.kind) or _other_tower(file)
    if file.vision is not None and not (
        has_defaults(file.top.kind) or file.top.kind == "internvl_chat"
    ):
        reason = f"the vision tower of {file.top.kind}"  # of code that comes with the model
    if towers and reason is not None:
        raise NotModelledError(file, reason, only_towers=True)
    return _layers(read_decoder(file, flags), towers)


def _other_tower(file: ConfigFile) -> str | None:
    """Return what stands beside a language model and is no vision tower that is read here."""
    top = file.top
    if file.text is top or top.kind == "gemma3n":
        return None
    sections = {k for values in (top.given, top.defaults) for k in values if k.endswith("_config")}
    for name in sorted(sections - {*TEXT_SECTIONS, "vision_config", "quantization_config"}):
        if top.get(name) and isinstance(top.get(name), Mapping):
            return f"what {name} of {top.kind} describes"
    return None


def _layers(d: Decoder, towers: bool) -> Layers:
    """Return all layers and what is around them."""
    if "moe" not in d.flags and d.c.has("num_experts") and routed_experts(d) > 1:
        raise NotModelledError(d.file, f"a {d.c.kind} with experts")
    if d.c.flag("use_cla"):
        raise NotModelledError(d.file, "layers that read another's keys and values (use_cla)")
    norms = (4 if "norms4" in d.flags else 2) * d.hidden
    build = _UNUSUAL.get(d.c.kind, _layer)
    found = []
    for i, kind in enumerate(d.kinds):
        layer = build(d, i, kind)
        found.append(Layer(layer.attention, layer.state, layer.mlp, layer.others or norms))
    if d.c.kind == "longcat_flash":
        found += [Layer(attention(d, i, "full"), None, dense(d, i), norms) for i in range(d.count)]
    outside = _outside(d)
    if towers:
        outside += vision_parts(d.file)
    notes = []
    if d.c.get("num_nextn_predict_layers"):
        notes.append(
            "layers that predict further tokens are not loaded, as vLLM leaves them out unless "
            "they speculate"
        )
    return Layers(tuple(found), tuple(outside), tuple(notes))


def _layer(d: Decoder, i: int, kind: str) -> Layer:
    """Return a layer that has an MLP behind its attention or state."""
    state = state_space(d.c, i) if kind in ("state", "hybrid") else None
    if d.c.kind in RECURRENT:
        return Layer(state=state)
    ours = attention(d, i, _attention_kind(kind)) if kind != "state" else None
    return Layer(ours, state, mlp(d, i))


_UNUSUAL: Mapping[str, Callable[[Decoder, int, str], Layer]] = {
    "nemotron_h": one_thing,
    "nemotron-nas": searched_block,
    "longcat_flash": shortcut,
    "zamba2": shared_block,
    **dict.fromkeys((*GEMMA_3N, *GEMMA_4), gemma_layer),
}


def _attention_kind(kind: str) -> KvCacheKind:
    """Return the kind of a layer's attention."""
    if kind == "sliding_window":
        return "sliding_window"
    return "chunked_local" if kind == "chunked_local" else "full"


def _outside(d: Decoder) -> list[Part]:
    """Return embedding, positions and head."""
    c = d.c
    vocab = c.number("vocab_size")
    width = c.number("word_embed_proj_dim", d.hidden)
    outside = [Part("model.embed_tokens", others=vocab * width + d.hidden)]
    if width != d.hidden:
        outside.append(linear("model.project_in", (width, d.hidden), (d.hidden, width)))
    if "positions" in d.flags:
        extra = 2 if c.kind in ("opt", "biogpt") else 0
        rows = c.number("max_position_embeddings", 0) + extra
        outside.append(Part("model.embed_positions", others=rows * d.hidden))
    if not tied(d.file):
        outside.append(Part("lm_head", others=vocab * width))
    if c.kind in (*GEMMA_3N, *GEMMA_4):
        outside += gemma_outside(d)
    return outside


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


_MOBILENET = "mobilenetv5_300m_enc"
"""Gemma 3n's vision tower; 294 million parameters by timm's table of models. Its audio tower's
number is that of transformers' class."""
_GATED = frozenset({"pixtral", "qwen2_5_vl", "qwen2_5_vl_vision"})


def vision_parts(file: ConfigFile) -> list[Part]:
    """Return the vision tower and its projector; nothing for a model without one."""
    if file.top.kind == "gemma3n":
        return _gemma_3n(file)
    v = file.vision
    if v is None:
        return []
    text_hidden = file.text.number("hidden_size")
    hidden = int(v.get("embed_dim") or v.get("hidden_size") or 1024)
    depth = int(v.get("depth") or v.get("num_hidden_layers") or 24)
    width = v.get("intermediate_size")
    if width is None:
        width = int(hidden * float(v.get("mlp_ratio") or 4))
    gated = v.kind in _GATED or str(v.get("hidden_act")) == "silu"
    patch = v.get("patch_size") or 14
    patch = int(patch[0] if isinstance(patch, list) else patch)
    channels = int(v.get("num_channels") or v.get("in_channels") or 3)
    frames = int(v.get("temporal_patch_size") or 1)
    size = v.get("image_size") or 0
    size = int(size[0] if isinstance(size, list) else size)
    positions = 0 if v.kind.startswith(("pixtral", "qwen2")) else (size // patch) ** 2
    block = linear(
        "vision_tower.encoder",
        *[(hidden, hidden)] * 4,
        *[(hidden, int(width))] * (2 if gated else 1), (int(width), hidden),
    )  # fmt: skip
    tower = Part(
        "vision_tower",
        others=depth * (block.matrices + block.outputs + 4 * hidden)
        + channels * frames * patch * patch * hidden + positions * hidden,
    )  # fmt: skip
    return [
        tower,
        Part("multi_modal_projector", others=_projector(file.top, v, hidden, text_hidden)),
    ]


def _gemma_3n(file: ConfigFile) -> list[Part]:
    """Return the towers of Gemma 3n, which are the same in all of its checkpoints.

    Raises:
        NotModelledError: if they are others.
    """
    v, audio = file.top.section("vision_config"), file.top.section("audio_config")
    if (v and v.get("architecture", _MOBILENET) != _MOBILENET) or (
        audio and (audio.number("hidden_size", 1536), audio.number("conf_num_hidden_layers", 12))
        != (1536, 12)
    ):  # fmt: skip
        raise NotModelledError(file, "another vision or audio tower of Gemma 3n", only_towers=True)
    text = file.text.number("hidden_size")
    embedders = sum(128 * width + width + width * text for width in (2048, 1536))
    return [Part("vision_and_audio_towers", others=294_000_000 + 681_348_640 + embedders)]


def _projector(top: HfConfig, v: HfConfig, hidden: int, text: int) -> int:
    """Return the parameters of what joins both."""
    if top.kind in ("gemma3", "shieldgemma2", "paligemma"):
        return hidden * text
    if top.kind in ("aya_vision", "cohere2_vision"):  # patches are merged, then a gated MLP
        wide = int(top.get("alignment_intermediate_size") or 2 * text)
        return hidden * int(top.get("downsample_factor") or 2) ** 2 * wide + wide // 2 * text
    if top.kind in ("idefics3", "smolvlm"):
        return hidden * int(top.get("scale_factor") or 2) ** 2 * text
    if top.kind in ("internvl", "internvl_chat"):
        merged = int(hidden / float(top.get("downsample_ratio") or 0.5) ** 2)
        return merged * text + text * text
    if top.kind == "lfm2_vl":
        wide = int(top.get("projector_hidden_size") or 2560)
        return hidden * int(top.get("downsample_factor") or 2) ** 2 * wide + wide * text
    merge = int(v.get("spatial_merge_size") or top.get("spatial_merge_size") or 0)
    if top.kind in ("mistral3", "lighton_ocr"):
        return 4 * hidden * hidden + hidden * text + text * text
    if merge:  # patches are merged before they are projected (Qwen-VL)
        wide = hidden * merge * merge
        out = int(v.get("out_hidden_size") or text)
        extra = len(v.get("deepstack_visual_indexes") or ()) if v.kind.startswith("qwen3") else 0
        return (1 + extra) * (wide * wide + wide * out)
    return hidden * text + text * text
