"""Which matrices a checkpoint's quantisation means, by every method's own way to say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.checkpoints.description import describe
from samullm_plugin.errors import InputError
from tests.checkpoints.published import LLAMA, MLA

ATTENTION, MLP = 32 * (2 * 4096**2 + 2 * 4096 * 1024), 32 * 3 * 4096 * 14336
OUTSIDE = 2 * 128256 * 4096
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
ROWS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
PACKED, ZERO = 0.5 + 2 / 128, 0.5 + 2.5 / 128
FINE = 1 + 3 / 32
"""Bytes of a weight: 4 bits with a scale a group, with a zero point too, and 8 bits in groups of 32
with both."""


def tensors(*groups: tuple[list[str], dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a compressed-tensors configuration of groups of layers."""
    listed = {f"group_{i}": {"targets": t, "weights": w} for i, (t, w) in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "ignore": ["lm_head"],
            "format": "pack-quantized", "config_groups": listed, **more}  # fmt: skip


def modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    """Return a modelopt configuration."""
    return {"quant_method": "modelopt", "quant_algo": algorithm, **more}


def stored(folder: Path, config: dict[str, Any]) -> float:
    """Return the bytes of a configuration's weights."""
    (folder / "config.json").write_text(json.dumps(config))
    return describe(folder).weight_bytes()


@pytest.mark.parametrize(
    ("section", "attention", "mlp"),
    [
        (GPTQ | {"dynamic": {"-:.*attn.*": {}}}, 2, ZERO),
        (GPTQ | {"dynamic": {"+:.*mlp.*": {"bits": 8, "group_size": 32}}}, ZERO, FINE),
        (GPTQ | {"dynamic": {r".*\.down_proj.*": {"bits": 8, "group_size": 32}}},
         ZERO, (2 * ZERO + FINE) / 3),
        (GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"]]},
         2, (2 * ZERO + 2) / 3),
        (ROUND | {"extra_config": {".*self_attn.*": {"bits": 16}}}, 2, ZERO),
        (ROUND | {"extra_config": {f"model.layers.{i}.mlp.down_proj": {"bits": 8, "group_size": 32}
                                   for i in range(32)}}, ZERO, (2 * ZERO + FINE) / 3),
        (ROUND | {"data_type": "mx_fp", "group_size": 32}, 0.5 + 1 / 32, 0.5 + 1 / 32),
        (AWQ | {"modules_to_not_convert": ["self_attn.q_proj", "self_attn.o_proj"]},
         (4 * 2 + ZERO) / 5, ZERO),
        ({"quant_method": "fp8", "ignored_layers": [f"model.layers.{i}.mlp.down_proj"
                                                    for i in range(32)]}, 1, 4 / 3),
        ({"quant_method": "fp8", "modules_to_not_convert": [
            f"model.language_model.layers.{i}.self_attn.{n}_proj" for i in range(32)
            for n in "qkvo"]}, 2, 1),
        ({"quant_method": "fp8", "modules_to_not_convert": [
            f"language_model.model.layers.{i}.feed_forward" for i in range(32)]}, 1, 2),
        ({"quant_method": "fp8", "modules_to_not_convert": [
            f"model.layers.{i}.self_attn.qkv_proj" for i in range(32)]}, (2 * 2 + 3 * 4) / 10, 1),
        (tensors((["re:.*self_attn.*"], ROWS), (["re:.*mlp.*"], W4)), 1, PACKED),
        (tensors((["re:.*mlp.*"], W4)), 2, PACKED),
        (tensors((["Linear"], W4), ignore=["re:.*self_attn"]), 2, PACKED),
        (tensors((["Linear"], W4 | {"num_bits": 8, "type": "float", "group_size": 32}),
                 format="mxfp8-quantized"), 1 + 1 / 32, 1 + 1 / 32),
        (modelopt("MXFP8", group_size=32), 1 + 1 / 32, 1 + 1 / 32),
        (modelopt("W4A8_AWQ", group_size=128), PACKED, PACKED),
        (modelopt("NVFP4", ignore=["lm_head", "model.layers.*.self_attn*"]), 2, 0.5 + 1 / 16),
        (modelopt("MIXED_PRECISION", quantized_layers={
            **{f"model.layers.{i}.self_attn.{n}_proj": {"quant_algo": "FP8"}
               for i in range(32) for n in "qkvo"},
            **{f"model.layers.{i}.mlp.{n}_proj": {"quant_algo": "NVFP4", "group_size": 16}
               for i in range(32) for n in ("gate", "up", "down")}}), 1, 0.5 + 1 / 16),
    ],
)  # fmt: skip
def test_matrices_that_a_configuration_names_are_stored_as_it_says(
    tmp_path: Path, section: dict[str, Any], attention: float, mlp: float
) -> None:
    wanted = attention * ATTENTION + mlp * MLP + 2 * OUTSIDE
    found = stored(tmp_path, LLAMA | {"quantization_config": section})
    assert found == pytest.approx(wanted, rel=0.002)


@pytest.mark.parametrize(
    "section", [GPTQ | {"lm_head": True}, ROUND | {"extra_config": {"lm_head": {"bits": 4}}}]
)
def test_a_packed_head_is_counted_as_one(tmp_path: Path, section: dict[str, Any]) -> None:
    wanted = ZERO * (ATTENTION + MLP + OUTSIDE / 2) + OUTSIDE
    found = stored(tmp_path, LLAMA | {"quantization_config": section})
    assert found == pytest.approx(wanted, rel=0.002)


def test_experts_are_found_by_the_names_of_one_of_them(tmp_path: Path) -> None:
    """DeepSeek-V3's shape: 58 layers of 256 experts, packed by a pattern of their names."""
    config = {"model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
              "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
              "n_shared_experts": 1, "num_attention_heads": 128, "num_experts_per_tok": 8,
              "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536,
              "vocab_size": 129280, "tie_word_embeddings": False} | MLA  # fmt: skip
    pattern = r"re:.*mlp\.experts\.\d+\.(gate|up|gate_up|down)_proj.*"
    experts = 58 * 256 * 3 * 7168 * 2048
    found = stored(tmp_path, config | {"quantization_config": tensors(([pattern], W4))})
    assert found == pytest.approx(2 * (671.03e9 - experts) + PACKED * experts, rel=0.002)


@pytest.mark.parametrize(
    ("section", "feature"),
    [
        (tensors((["Linear"], W4), format="marlin-24"), "sparse weights"),
        (tensors((["Linear"], ROWS), sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
        (tensors((["MixtralMLP"], W4)), "'MixtralMLP'"),
        (tensors((["re:.*wholly_other.*"], W4)), "none of the modules that it names"),
        (tensors((["re:(("], W4)), "no regular expression"),
        (modelopt("MIXED_PRECISION"), "none of the modules"),
        (modelopt("Q8_0"), "quant_algo 'Q8_0'"),
        ({"quant_method": "torchao"}, "'torchao'"),
    ],
)
def test_what_a_configuration_says_and_nobody_knows_is_refused(
    tmp_path: Path, section: dict[str, Any], feature: str
) -> None:
    with pytest.raises(InputError) as caught:
        stored(tmp_path, LLAMA | {"quantization_config": section})
    assert feature in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("section", [None, {}, tensors(format="dense")])
def test_nothing_said_is_nothing_shrunk(tmp_path: Path, section: dict[str, Any] | None) -> None:
    found = stored(tmp_path, LLAMA | {"quantization_config": section})
    assert found == pytest.approx(2 * (ATTENTION + MLP + OUTSIDE), rel=0.002)


def test_defaults_of_classes_that_come_with_the_files(tmp_path: Path) -> None:
    """MiniCPM's files do not say that the head is the embedding: their class does."""
    config = {"model_type": "minicpm", "auto_map": {"AutoConfig": "x.Y"}, "hidden_size": 2304,
              "intermediate_size": 5760, "num_attention_heads": 36, "num_hidden_layers": 40,
              "num_key_value_heads": 36, "vocab_size": 122753}  # fmt: skip
    assert stored(tmp_path, config) == pytest.approx(2 * 2.725e9, rel=0.002)


def test_width_of_values_that_a_class_derives(tmp_path: Path) -> None:
    config = {"model_type": "minicpm3", "hidden_size": 2560, "intermediate_size": 6400,
              "kv_lora_rank": 256, "num_attention_heads": 40, "num_hidden_layers": 62,
              "num_key_value_heads": 40, "q_lora_rank": 768, "qk_nope_head_dim": 64,
              "qk_rope_head_dim": 32, "vocab_size": 73448}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(tmp_path).parameters == pytest.approx(4.074e9, rel=0.001)
