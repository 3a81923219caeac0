"""Vision and audio towers: their parameters, which an engine loads even if no images come."""

from __future__ import annotations

from samullm_plugin.checkpoints.decoder import NotModelledError
from samullm_plugin.checkpoints.hf_config import ConfigFile, HfConfig
from samullm_plugin.checkpoints.parts import Part, linear

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
