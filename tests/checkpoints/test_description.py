"""What is read of configurations and weights, against what is known of published checkpoints."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.checkpoints.description import ModelDescription, describe
from samullm_plugin.checkpoints.gpus import bundled_gpu, known_name
from samullm_plugin.checkpoints.models import bundled_model, read_checkpoint
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.kv_cache import KvCacheLayers, kv_cache_groups, pool_block_bytes
from tests.checkpoints.published import AWQ, FP8, LLAMA, MLA, PUBLISHED, WITH_TOWERS


def read(folder: Path, config: dict[str, Any]) -> ModelDescription:
    (folder / "config.json").write_text(json.dumps(config))
    return describe(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_kv_cache_of_published_checkpoints(tmp_path: Path, name: str) -> None:
    config, billions, kv_bytes = PUBLISHED[name]
    found = read(tmp_path, config)
    assert found.parameters == pytest.approx(1e9 * billions, rel=0.01)
    assert found.architecture().kv_bytes_per_token == pytest.approx(kv_bytes, rel=0.01)
    assert found.weight_bytes() == pytest.approx(2e9 * billions, rel=0.01)


@pytest.mark.parametrize("name", WITH_TOWERS)
def test_towers_are_counted_by_transformers_or_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    config, billions, kv_bytes, feature = WITH_TOWERS[name]
    found = read(tmp_path, config)
    assert found.source == "transformers"
    assert found.parameters == pytest.approx(1e9 * billions, rel=0.01)
    assert found.weight_bytes() == pytest.approx(2e9 * billions, rel=0.01)
    assert found.architecture().kv_bytes_per_token == kv_bytes
    for asked in ("count_parameters", "ask_vllm"):  # where neither is installed
        monkeypatch.setattr(f"samullm_plugin.checkpoints.description.{asked}", lambda *_: None)
    with pytest.raises(InputError, match=feature):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("kind", "section"),
    [("ultravox", "audio_config"), ("granite_speech", "encoder_config"), ("ovis2_5", "vit_config"),
     ("vibevoice", "semantic_model_config"), ("voxtral", "audio_config")],
)  # fmt: skip
def test_a_tower_that_is_not_read_is_never_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, section: str
) -> None:
    for name in ("count_parameters", "ask_vllm"):
        monkeypatch.setattr(f"samullm_plugin.checkpoints.description.{name}", lambda *_: None)
    with pytest.raises(InputError, match=rf"{section} of {kind} describes is not modelled"):
        read(tmp_path, {"model_type": kind, "text_config": LLAMA, section: {"hidden_size": 1280}})


def test_keys_and_values_shared_between_layers_are_not_modelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("count_parameters", "ask_vllm"):
        monkeypatch.setattr(f"samullm_plugin.checkpoints.description.{name}", lambda *_: None)
    with pytest.raises(InputError, match=r"use_cla.*not modelled"):
        read(tmp_path, LLAMA | {"model_type": "hunyuan_v1_dense", "use_cla": True})


def searched(*blocks: dict[str, Any]) -> dict[str, Any]:
    """Return Llama-3.1-8B with blocks as a search for a smaller model leaves them."""
    return LLAMA | {"model_type": "nemotron-nas", "num_key_value_heads": None,
                    "num_hidden_layers": len(blocks), "block_configs": list(blocks)}  # fmt: skip


def test_blocks_of_a_searched_model_have_sizes_of_their_own(tmp_path: Path) -> None:
    usual = {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 5.25}}  # 14336 wide
    no_attention = {"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.625}}
    no_mlp = {"attention": {"n_heads_in_group": 8}, "ffn": {"no_op": True}}
    whole = read(tmp_path, searched(*[usual] * 32))
    assert whole.parameters == pytest.approx(8.03e9, rel=0.001)
    assert whole.architecture().kv_bytes_per_token == 131072
    cut = read(tmp_path, searched(usual, no_attention, no_mlp))
    assert cut.architecture().kv_bytes_per_token == 4096 + 0 + 2048
    # Embedding and head; then what each block has: 4 key-value heads of 128 fewer in the last.
    matrices = 2 * 128256 * 4096 + 3 * 4096 * 14336 * 1.5 + 4096 * 128 * (64 + 16 + 64 + 8)
    assert cut.parameters == pytest.approx(matrices, rel=1e-4)
    linear = {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 5.25}}
    with pytest.raises(InputError, match="replace_with_linear in block_configs is not modelled"):
        read(tmp_path, searched(linear))


BUNDLED = "Llama-3.1-8B"

QWEN = LLAMA | {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584,
                "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
                "vocab_size": 152064}  # fmt: skip
OSS = {"model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "head_dim": 64,
       "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 2880,
       "vocab_size": 201088, "num_local_experts": 32, "num_experts_per_tok": 4,
       "sliding_window": 128, "tie_word_embeddings": False,
       "quantization_config": {"quant_method": "mxfp4"}}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "stored_gb"),
    [
        (QWEN | {"quantization_config": AWQ}, 5.57),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
         5.74),
        (LLAMA | {"quantization_config": FP8}, 9.08),
        (OSS, 13.76),
        (LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True,
                                          "bnb_4bit_use_double_quant": True}}, 5.71),
    ],
    ids=["awq", "gptq", "compressed-tensors", "mxfp4", "bitsandbytes"],
)  # fmt: skip
def test_bytes_of_quantised_checkpoints_are_those_of_their_files(
    tmp_path: Path, config: dict[str, Any], stored_gb: float
) -> None:
    assert read(tmp_path, config).weight_bytes() == pytest.approx(1e9 * stored_gb, rel=0.01)


def test_experts_alone_are_packed_where_the_rest_is_left_out(tmp_path: Path) -> None:
    """As Kimi-K2-Thinking is published: 594 GB, 4-bit experts, and 16 bits for all else."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
               "symmetric": True}  # fmt: skip
    kept = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]  # fmt: skip
    config = {"model_type": "kimi_k2", "first_k_dense_replace": 1, "hidden_size": 7168,
              "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 384,
              "n_shared_experts": 1, "num_attention_heads": 64, "num_experts_per_tok": 8,
              "num_hidden_layers": 61, "num_key_value_heads": 64, "q_lora_rank": 1536,
              "vocab_size": 163840, "tie_word_embeddings": False,
              "quantization_config": {
                  "quant_method": "compressed-tensors", "format": "pack-quantized",
                  "ignore": kept, "config_groups": {"group_0": {"weights": weights}}},
              } | MLA  # fmt: skip
    found = read(tmp_path, config)
    assert found.parameters == pytest.approx(1026.4e9, rel=0.001)
    assert found.weight_bytes() == pytest.approx(594e9, rel=0.01)


def test_modelopt_says_how_in_a_file_of_its_own(tmp_path: Path) -> None:
    plain = read(tmp_path, LLAMA)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(
        {"producer": {"name": "modelopt"},
         "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
                          "exclude_modules": ["lm_head"]}}))  # fmt: skip
    found = describe(tmp_path)
    assert found.weight_bytes() == pytest.approx(9.08e9, rel=0.01)
    assert found.architecture().kv_bytes_per_token == plain.architecture().kv_bytes_per_token / 2


def test_modules_that_quantisation_leaves_out_keep_their_type(tmp_path: Path) -> None:
    whole = read(tmp_path, QWEN | {"quantization_config": AWQ}).weight_bytes()
    kept = AWQ | {"modules_to_not_convert": ["self_attn"]}
    attention = 28 * 3584 * 128 * (2 * 28 + 2 * 4)
    without = read(tmp_path, QWEN | {"quantization_config": kept}).weight_bytes()
    assert without - whole == pytest.approx(attention * (2 - 0.52), rel=0.02)


@pytest.mark.parametrize(
    ("engine", "weights", "cache"),
    [
        ({"dtype": "float32"}, 2.0, 2.0),
        ({"kv_cache_dtype": "fp8"}, 1.0, 0.5),
        ({"quantization": "fp8"}, 9.08 / 16.06, 1.0),
        ({"dtype": "half"}, 1.0, 1.0),
    ],
)
def test_engine_settings_change_bytes(
    tmp_path: Path, engine: dict[str, str], weights: float, cache: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    plain, _ = read_checkpoint(tmp_path)
    dtype = engine.pop("dtype", "auto")
    other, _ = read_checkpoint(tmp_path, EngineOptions(dtype=dtype, extra=tuple(engine.items())))
    assert other.weight_bytes / plain.weight_bytes == pytest.approx(weights, rel=0.01)
    assert other.kv_bytes_per_token / plain.kv_bytes_per_token == cache


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 131072),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 262144),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 524288),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0,
                           "original_max_position_embeddings": 32768}}, 131072),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_scaling": None}, 131072),
        ({"model_max_length": 4096}, 4096),
    ],
)  # fmt: skip
def test_longest_sequence_as_vllm_derives_it(
    tmp_path: Path, change: dict[str, Any], length: int
) -> None:
    assert read(tmp_path, LLAMA | change).max_model_len == length


def test_the_tokenizer_may_limit_the_longest_sequence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 8192}')
    assert read(tmp_path, LLAMA).max_model_len == 8192
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert read(tmp_path, LLAMA).max_model_len == 131072


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 4096}, "names no model_type"),
        ({**LLAMA, "model_type": "custom"}, "'custom' is not modelled"),
        ({**LLAMA, "model_type": "custom", "auto_map": {"AutoConfig": "x.Y"}}, "not modelled"),
        ({"model_type": "bart"}, "'bart' is not modelled"),
        ({"model_type": "rwkv"}, "RWKV"),
        ({"model_type": "whisper"}, "'whisper' is not modelled"),
        ({**LLAMA, "hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({**LLAMA, "num_experts": 8}, "a llama with experts"),
        ({**LLAMA, "head_dim": [None]}, "head_dim is '\\[None\\]'"),
        ({**LLAMA, "intermediate_size": []}, "intermediate_size is"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most"),
        ({**LLAMA, "hidden_size": 0}, "without parameters"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": "x"}}, "its length"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "dynamic": 5}}, "quantization"),
        ({**LLAMA, "layer_types": ["full_attention", "ring"]}, "layers of type 'ring'"),
        ({**LLAMA, "quantization_config": {"quant_method": "aqlm"}}, "aqlm.*known: awq"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": "four"}}, "bits"),
        ({**MLA, "model_type": "deepseek_v4", "hidden_size": 64}, "hyper-connections"),
        ({**LLAMA, "model_type": "phi4mm"}, "towers of Phi-4-multimodal"),
        (
            {
                "model_type": "minicpmv",
                "auto_map": {"AutoConfig": "x.Y"},
                "text_config": LLAMA,
                "vision_config": {"hidden_size": 1152},
            },
            "the vision tower of minicpmv",
        ),
        ({"model_type": "mllama", "text_config": LLAMA}, "cross-attention to images"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], message: str
) -> None:
    for name in ("count_parameters", "ask_vllm"):  # where neither is installed
        monkeypatch.setattr(f"samullm_plugin.checkpoints.description.{name}", lambda *given: None)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, config).weight_bytes()
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: there is no such file"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must be a JSON object"):
        describe(tmp_path)


def write_safetensors(file: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Write a file of headers alone: nothing else of it is read."""
    header = {n: {"dtype": d, "shape": s, "data_offsets": [0, 0]} for n, (d, s) in tensors.items()}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


SMALL = LLAMA | {
    "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 128, "vocab_size": 1000,
}  # fmt: skip


def test_weights_of_the_folder_decide(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {"model.embed_tokens.weight": ("F32", [1000, 64]),
               "model.layers.0.mlp.up_proj.weight": ("F32", [128, 64]),
               "model.layers.1.eh_proj.weight": ("F32", [128, 64]),
               "mtp.fc.weight": ("F32", [128, 64])}  # fmt: skip
    write_safetensors(file, tensors)
    found = read(tmp_path, SMALL)
    numbers = 1000 * 64 + 128 * 64  # layers that predict further tokens are not loaded
    assert (found.source, found.parameters) == ("safetensors", numbers)
    assert found.weight_bytes() == 2 * numbers  # 32-bit weights are loaded as 16 bits
    assert found.weight_bytes(EngineOptions(dtype="float32")) == 4 * numbers
    packed = tensors | {"model.layers.0.mlp.up_proj.qweight": ("I32", [16, 64])}
    write_safetensors(file, packed)
    assert read(tmp_path, SMALL | {"quantization_config": AWQ}).weight_bytes() == (
        2 * numbers + 4 * 16 * 64
    )


def test_a_broken_weight_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        read(tmp_path, SMALL)


def test_missing_shards_leave_the_configuration_to_decide(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read(tmp_path, SMALL).source == "config.json"


def test_groups_of_layers_are_those_of_vllm() -> None:
    sliding = KvCacheLayers("sliding_window", 22, 1, 1024, window_tokens=512)
    full = KvCacheLayers("full", 4, 1, 1024)
    groups = kv_cache_groups((sliding, full))
    assert [(g.kind, g.num_layers) for g in groups] == [
        ("sliding_window", 4), ("sliding_window", 4), ("sliding_window", 4),
        ("sliding_window", 4), ("sliding_window", 3), ("sliding_window", 3), ("full", 4),
    ]  # fmt: skip
    assert pool_block_bytes(groups) == 4 * 16 * 1024
    # Heads are shared out, but not below one a device.
    split = kv_cache_groups((KvCacheLayers("full", 2, 8, 512),), tensor_parallel_size=16)
    assert pool_block_bytes(split) == 2 * 16 * 512
    # Blocks of attention hold as many tokens as make a page the size of a state.
    state = KvCacheLayers("mamba", 28, state_bytes=311296)
    hybrid = kv_cache_groups((state, KvCacheLayers("full", 4, 8, 512)))
    assert {(g.block_size, g.page_bytes) for g in hybrid} == {(80, 80 * 4096)}
    assert len(hybrid) == 8


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTXPRO6000-96GB"),
        ("AMD Instinct MI300X", "MI300X-192GB"),
        ("b200", "B200-180GB"),
        ("Tesla T4", None),
    ],
)
def test_names_of_gpus(said: str, known: str | None) -> None:
    assert known_name(said) == known


def test_an_unknown_gpu_is_refused_with_what_is_known() -> None:
    with pytest.raises(InputError, match=r"H100-80GB.*gpu_memory_gib"):
        bundled_gpu("H1000")


@pytest.mark.parametrize(
    ("engine", "weights", "cache"),
    [
        (EngineOptions(dtype="float32"), 2.0, 2.0),
        (EngineOptions(dtype="half"), 1.0, 1.0),
        (EngineOptions(extra=(("kv_cache_dtype", "fp8"),)), 1.0, 0.5),
        (EngineOptions(extra=(("quantization", "fp8"),)), 9.08 / 16.06, 1.0),
    ],
)
def test_engine_settings_change_bytes_of_bundled_names(
    engine: EngineOptions, weights: float, cache: float
) -> None:
    plain, other = bundled_model(BUNDLED).architecture, bundled_model(BUNDLED, engine=engine)
    assert plain is not None
    assert other.architecture is not None
    assert other.architecture.weight_bytes / plain.weight_bytes == pytest.approx(weights, rel=0.02)
    assert other.architecture.kv_bytes_per_token / plain.kv_bytes_per_token == cache


def test_a_bundled_name_is_not_stored_quantised() -> None:
    for name, told in (("awq", "not stored so"), ("own", "not stored so")):
        with pytest.raises(InputError, match=told):
            bundled_model(BUNDLED, engine=EngineOptions(extra=(("quantization", name),)))
    with pytest.raises(InputError, match="'float12' is not known"):
        bundled_model(BUNDLED, engine=EngineOptions(dtype="float12"))
