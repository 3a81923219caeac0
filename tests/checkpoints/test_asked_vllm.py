"""What vLLM says of models that the reader does not know, against the reader where it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.checkpoints import stacks
from samullm_plugin.checkpoints.asking import _read
from samullm_plugin.checkpoints.description import describe
from samullm_plugin.checkpoints.hf_config import read_config_file
from samullm_plugin.errors import InputError
from tests.checkpoints.published import AWQ, MLA

LATENT: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 512,
    "num_hidden_layers": 3, "hidden_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 512, "q_lora_rank": None,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "first_k_dense_replace": 1, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
} | MLA  # fmt: skip


@pytest.fixture
def only_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reader and transformers know no family."""
    monkeypatch.setattr(stacks, "FAMILIES", {})
    monkeypatch.setattr("samullm_plugin.checkpoints.description.count_parameters", lambda *_: None)


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)  # vLLM is imported twice, by itself the second time
def test_vllm_says_what_the_reader_would(
    tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    read = describe(write(tmp_path, LATENT))
    request.getfixturevalue("only_vllm")
    asked = describe(tmp_path)
    assert (read.source, asked.source) == ("config.json", "vllm")
    assert asked.parameters == pytest.approx(read.parameters, rel=0.01)
    assert asked.weight_bytes() == pytest.approx(read.weight_bytes(), rel=0.01)
    assert asked.kv_cache() == read.kv_cache()
    ours, theirs = read.architecture(), asked.architecture()
    assert theirs.active_parameters == pytest.approx(ours.active_parameters, rel=0.05)
    assert "is asked what this model is, once" in caplog.text
    caplog.clear()
    assert describe(tmp_path).parameters == asked.parameters
    assert not caplog.text  # kept

    # Of a quantised one vLLM would say how many weights there are, not which are stored how.
    with pytest.raises(InputError, match="'deepseek_v2' is not modelled"):
        describe(write(tmp_path, LATENT | {"quantization_config": AWQ}))


@pytest.mark.vllm
def test_architectures_that_vllm_does_not_serve_are_refused_at_once(
    tmp_path: Path, only_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("vLLM was asked")

    monkeypatch.setattr("samullm_plugin.checkpoints.asking.ask", never)
    for name in ("MllamaForConditionalGeneration", "NobodysForCausalLM"):
        with pytest.raises(InputError, match="not modelled"):
            describe(write(tmp_path, LATENT | {"architectures": [name]}))
    with pytest.raises(InputError, match="not modelled"):
        describe(write(tmp_path, {"model_type": "bart", "architectures": ["LlamaForCausalLM"]}))


def test_states_and_indices_of_an_answer_keep_their_types(tmp_path: Path) -> None:
    file = read_config_file(write(tmp_path, LATENT))
    layers = [
        {"spec": "MambaSpec", "state": [["bfloat16", 300], ["float32", 4000]]},
        {"spec": "SlidingWindowSpec", "kv_heads": 2, "dtype": "bfloat16", "token_bytes": 512.0,
         "window": 128},
        {"spec": "MLAAttentionSpec", "kv_heads": 1, "dtype": "uint8", "token_bytes": 132.0,
         "window": 0},
    ]  # fmt: skip
    answer = {"layers": layers, "parameters": 3_000_001, "experts": 2_000_000}
    found = _read(file, answer)
    assert found is not None
    assert found.parameters == 3_000_001
    state, sliding, index = found.layers
    assert state.state is not None
    assert (state.state.conv_size, state.state.ssm_size) == (300, 4000)
    assert sliding.attention is not None
    assert (sliding.attention.kind, sliding.attention.window) == ("sliding_window", 128)
    assert (sliding.attention.kv_heads, sliding.attention.entry_size) == (2, 128)
    assert index.attention is not None
    assert (index.attention.entry_size, index.attention.side_bytes) == (0, 132)
    assert sum(x.mlp.active_matrices for x in found.layers if x.mlp) == pytest.approx(
        3_000_001 - 2_000_000 - 2 * 512 * 256 + 2_000_000 * 2 / 8, rel=0.01
    )
    unknown = {**answer, "layers": [{"spec": "CrossAttentionSpec", "kv_heads": 1}]}
    assert _read(file, unknown) is None
