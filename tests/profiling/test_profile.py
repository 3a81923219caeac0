from __future__ import annotations

import json
from pathlib import Path

import pytest

from samullm_plugin.checkpoints.model_config import read_model_config
from samullm_plugin.errors import InputError
from samullm_plugin.profiling.architecture_tables import read_architectures
from samullm_plugin.profiling.profile_files import bundled_profiles, read_profile, write_profile


def test_bundled_profile_survives_writing_and_reading(tmp_path: Path) -> None:
    profile = bundled_profiles()["A100-80GB"]
    path = tmp_path / "p.json"
    write_profile(profile, path)
    assert read_profile(path) == profile
    assert path.stat().st_size < 100_000
    assert profile.transfer is not None
    assert "de1677dc" in profile.source


def test_bundled_profile_holds_no_machine_paths() -> None:
    profile = bundled_profiles()["A100-80GB"]
    assert "/" not in profile.source.replace("puddingfjz/vllm", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": None}, "device"),
        ({"surprise": 1}, "surprise"),
        ({"format": "other"}, "format"),
        ({"models": [{"model": "a"}]}, r"models\.0\.tensor_parallel_size"),
        ({"memory": {"wrong": 1.0}}, "not a usable profile"),
        ({"architectures": {"a": {"num_layers": 0}}}, "not a usable profile"),
    ],
)
def test_wrong_profiles_are_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"device": "X", "source": "y", **change}))
    with pytest.raises(InputError, match=said) as caught:
        read_profile(path)
    assert str(path) in str(caught.value)
    path.write_text("{")
    with pytest.raises(InputError, match="not a profile"):
        read_profile(path)


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


def config(tmp_path: Path, **fields: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return path


def test_sizes_of_common_kinds(tmp_path: Path) -> None:
    llama = read_model_config(config(tmp_path, **LLAMA).parent)
    assert (llama.num_kv_heads, llama.head_dim, llama.mlp, llama.dtype_bytes) == (
        8,
        128,
        "gated",
        2,
    )
    mixture = read_model_config(
        config(
            tmp_path,
            **{**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
        )
    )
    assert (mixture.num_experts, mixture.num_active_experts) == (8, 2)
    gptj = read_model_config(
        config(tmp_path, model_type="gptj", n_layer=28, n_embd=4096, n_head=16, vocab_size=50400)
    )
    assert (gptj.mlp, gptj.head_dim, gptj.intermediate_size) == ("plain", 256, 16384)
    qwen = {
        **LLAMA,
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "head_dim": 64,
    }
    assert read_model_config(config(tmp_path, **qwen)).intermediate_size == 768
    quantized = {**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4}}
    assert read_model_config(config(tmp_path, **quantized)).dtype_bytes == 0.5
    wide = {**LLAMA, "torch_dtype": "float32"}
    assert read_model_config(config(tmp_path, **wide)).dtype_bytes == 2  # loaded as 16 bits


def test_foreign_code_needs_consent(tmp_path: Path) -> None:
    path = config(tmp_path, **{**LLAMA, "model_type": "custom", "auto_map": {"AutoModel": "x.Y"}})
    with pytest.raises(InputError, match="trust_remote_code") as caught:
        read_model_config(path)
    assert str(path) in str(caught.value)
    assert read_model_config(path, trust_remote_code=True).hidden_size == 4096
    with pytest.raises(InputError, match="model_type 'custom' is not known"):
        read_model_config(config(tmp_path, **{**LLAMA, "model_type": "custom"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "big"}, "whole number"),
        ({"quantization_config": {"quant_method": "odd"}}, "quantization 'odd'"),
    ],
)
def test_wrong_configs_are_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_model_config(config(tmp_path, **{**LLAMA, **change}))


def test_tables_of_sizes(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text(
        "model,layers,hidden_size,attention_heads,kv_heads,head_dim,intermediate_size,mlp,vocab_size\n"
        "a/b,2,64,4,4,16,128,plain,100\n"
    )
    assert read_architectures(table)["a/b"].mlp == "plain"
    table.write_text(table.read_text().replace("plain", "odd"))
    with pytest.raises(InputError, match="mlp is 'odd'"):
        read_architectures(table)
    table.write_text("model,layers\n")
    with pytest.raises(InputError, match="no column mlp"):
        read_architectures(table)
    table.write_text(
        "model,layers,hidden_size,attention_heads,kv_heads,head_dim,intermediate_size,mlp,vocab_size\n"
        "a/b,two,64,4,4,16,128,plain,100\n"
    )
    with pytest.raises(InputError, match="row 2"):
        read_architectures(table)
    other = tmp_path / "a.json"
    other.write_text(json.dumps({"a/b": {"num_layers": 2, "colour": 3}}))
    with pytest.raises(InputError, match="colour"):
        read_architectures(other)
