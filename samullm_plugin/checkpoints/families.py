"""What is particular to each family of models, by ``model_type``.

Flags of a family (none: Llama's layer, two norms, gated MLP, no biases):

=============  =================================================================================
``plain``      MLP of two matrices
``bias``       all linear layers have biases, unless the configuration says otherwise
``positions``  learned positions
``moe``        experts in all layers but those that the configuration names
``mla``        attention through a latent (DeepSeek)
``indexer``    with an index that chooses tokens (DeepSeek-V3.2)
``gate``       a gate as wide as the attention's output
``headgate``   a gate of one number a head
``double_q``   the gate comes with the queries
``norms4``     four norms a layer
``window``     a ``sliding_window`` applies to all layers
``encoder``    tokens see those behind them: prompts are computed at once, nothing is kept
=============  =================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

_DENSE = """
apertus: plain|arcee: plain|bitnet|baichuan|biogpt: plain bias positions|bloom: plain bias|chatglm
codegen: plain|cohere|cohere2|command-r|cwm|deepseek_llm|ernie4_5|exaone|exaone4|falcon: plain
gemma: |gemma2: norms4|gemma3: norms4|gemma3_text: norms4|shieldgemma2: norms4|glm|glm4: norms4
glm4v_text: norms4|glm_ocr_text: norms4|gpt2: plain bias positions|gpt-sw3: plain bias positions
gpt_bigcode: plain bias positions|gpt_neo: plain bias positions|gpt_neox: plain bias|gptj: plain
gpt_neox_japanese: plain|granite|granite_swa|helium|hunyuan_v1_dense|hunyuan|hyperclovax: norms4
internlm|internlm2|internlm3|jais2: plain bias|llama|minicpm|ministral|ministral3
mistral: window|mpt: plain|nanochat: plain|nemotron: plain|olmo|olmo2|olmo3
opt: plain bias positions
orion|persimmon: plain bias|phi: plain bias|phi3: window|phi4_multimodal|qwen|qwen2|qwen3
qwen2_vl_text|qwen2_5_vl_text|qwen3_vl_text|qwen2_5_omni_text|seed_oss|smollm3|solar|stablelm
starcoder2: plain bias window|vaultgemma|xglm: plain bias|xverse|aquila|yi|telechat2|mimo|teleflm
muse_glimmer_text: gate norms4|emu3_text_model|telechat|diffllama|fuyu|cosmos3_edge_text: plain
"""
_EXPERTS = """
afmoe: moe gate norms4|aria_text: moe|arctic: moe|axk1: moe mla|bailing_moe: moe|cohere2_moe: moe
dbrx: moe|deepseek: moe|deepseek_v2: moe mla|deepseek_v3: moe mla|kimi_k2: moe mla
deepseek_v32: moe mla indexer|glm_moe_dsa: moe mla indexer|dots1: moe|ernie4_5_moe: moe
exaone_moe: moe|flex_olmo: moe|glm4_moe: moe|glm4_moe_lite: moe mla|glm4v_moe_text: moe
gpt_oss: moe bias|granitemoe: moe|granitemoeshared: moe|granitemoe_swa: moe|grok-1: moe
hunyuan_v1_moe: moe|hy_v3: moe|laguna: moe headgate|llama4_text: moe|mellum: moe
mimo_v2_flash: moe|minicpm3: mla|minimax_m2: moe|mistral4: moe mla|mixtral: moe window
olmoe: moe|phimoe: moe bias|qwen2_moe: moe|qwen3_moe: moe|qwen3_vl_moe_text: moe|solar_open: moe
qwen3_omni_moe_text: moe|step3p5: moe headgate|youtu: mla|minimax_m3_vl_text: moe
longcat_flash: moe mla|gemma3n_text|gemma4_text: moe|gemma4_unified_text: moe|nemotron-nas
lfm2_moe: moe
"""
_STATEFUL = """
bamba|falcon_h1|falcon_mamba|granitemoehybrid: moe|jamba: moe|kimi_linear: moe mla|lfm2
mamba|mamba2|minimax: moe|nemotron_h: moe plain|olmo_hybrid|qwen3_next: moe double_q
qwen3_5_text: double_q|qwen3_5_moe_text: moe double_q|zamba2
minimax_text_01: moe|minimax_m1: moe
"""

_ENCODERS = """
bert: plain bias positions encoder|roberta: plain bias positions encoder
xlm-roberta: plain bias positions encoder
"""

FAMILIES: Mapping[str, frozenset[str]] = {
    name.strip(): frozenset(flags.split())
    for block in (_DENSE, _EXPERTS, _STATEFUL, _ENCODERS)
    for line in block.strip().splitlines()
    for entry in line.split("|")
    for name, _, flags in [entry.partition(":")]
}

RECURRENT = ("mamba", "mamba2", "falcon_mamba")
"""Families without any attention."""
GEMMA_3N = ("gemma3n_text",)
GEMMA_4 = ("gemma4_text", "gemma4_unified_text")

NOT_MODELLED: Mapping[str, str] = {
    "deepseek_v4": "compressed key-value entries and hyper-connections (DeepSeek-V4)",
    "hy_v4": "hyper-connections (HY-V4)",
    "inkling_text": "relative logits and short convolutions (Inkling)",
    "zaya": "convolutional compressed attention (Zaya)",
    "mllama_text_model": "cross-attention to images (Llama 3.2 Vision)",
    "mllama": "cross-attention to images (Llama 3.2 Vision)",
    "recurrent_gemma": "recurrent linear units (RecurrentGemma)",
    "rwkv": "RWKV's time mixing",
    "xlstm": "xLSTM's memory cells",
    "zamba": "shared attention over Mamba heads (Zamba 1)",
    "doge": "retrieval over product keys (Doge)",
    "jetmoe": "mixture of attention heads (JetMoE)",
    "blt": "byte patches (BLT)",
    "hrm_text": "hierarchical recurrence (HRM)",
    "plamo2": "Plamo 2's state-space layers",
    "phi4flash": "cross-decoder attention (Phi-4-mini-flash)",
    "diffusion_gemma": "diffusion decoding",
    "phi4mm": "the adapters and towers of Phi-4-multimodal",
    "ernie4_5_vl_moe_text": "experts of two widths (Ernie 4.5 VL)",
}
"""Families known to have parts that are not modelled, and which."""

TOWERS_NOT_MODELLED: Mapping[str, str] = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), "the Q-Former of BLIP"),
    "idefics2": "the perceiver of Idefics2",
    "fuyu": "the image patches of Fuyu",
    "janus": "the image generator of Janus",
    "video_llava": "the second vision tower of Video-LLaVA",
    "phi4_multimodal": "the adapters and towers of Phi-4-multimodal",
    **dict.fromkeys(("gemma4", "gemma4_unified"), "the vision and audio towers of Gemma 4"),
    "qwen2_5_omni_thinker": "the audio tower of Qwen2.5-Omni",
    "qwen3_omni_moe_thinker": "the audio tower of Qwen3-Omni",
    "got_ocr2": "the vision tower of GOT-OCR",
    "pp_chart2table": "the vision tower of PP-Chart2Table",
    "deepseek_vl_hybrid": "the second vision tower of DeepSeek-VL",
    "nemotron_h_omni": "the vision and audio towers of Nemotron-H Omni",
    "cosmos3_edge": "the vision tower of Cosmos 3 Edge",
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), "the vision tower of GLM-4V"),
    "deepseek_vl": "the vision tower of DeepSeek-VL",
    "hyperclovax_vision_v2": "the vision tower of HyperCLOVA X",
    "exaone4_5": "the vision tower of EXAONE 4.5",
}
"""Models whose language model is known, and what beside it is not modelled."""
