"""What vLLM would refuse is refused before anything starts, without importing it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from samullm_vllm.arguments import (
    architectures,
    check_model,
    check_sampling,
    check_tokenizer,
    check_weights,
    class_fields,
)
from samullm_vllm.pipeline_stages import divides

from samullm_plugin import EngineOptions, InputError, ModelSpec

pytestmark = pytest.mark.vllm


def model(folder: Path, **engine: object) -> ModelSpec:
    dtype = str(engine.pop("dtype", "auto"))
    options = EngineOptions(dtype=dtype, extra=tuple(engine.items()))
    return ModelSpec("mine", 512, path=str(folder), engine=options)


def test_fields_are_those_of_the_installed_vllm() -> None:
    from vllm.engine.arg_utils import EngineArgs

    read = class_fields("engine/arg_utils.py", "EngineArgs")
    assert set(EngineArgs.__dataclass_fields__) == set(read)
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM"} <= architectures().keys()
    assert "temperature" in class_fields("sampling_params.py", "SamplingParams")


def test_stages_are_those_that_the_installed_vllm_has() -> None:
    """As its own classes say, by inheritance, also from other files and under other names."""
    from vllm.model_executor.models import ModelRegistry, supports_pp

    names = ("LlamaForCausalLM", "IQuestLoopCoderForCausalLM", "BertModel")
    found = {n: divides(n) for n in names}
    with warnings.catch_warnings(action="ignore"):  # of PyTorch, as it is imported
        own = {n: supports_pp(ModelRegistry.models[n].load_model_cls()) for n in names}
    assert found == own
    assert len(set(found.values())) == 2
    assert divides("NoSuchModel") is None


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"enforce_eagr": True}, "enforce_eagr: the installed vLLM has no such field"),
        ({"enforce_eager": "yes"}, "enforce_eager: 'yes' is not one of"),
        ({"seed": 1.5}, "seed: 1.5 is not one of"),
        ({"dtype": "float7"}, "dtype: 'float7' is not one of: auto, half"),
        ({"kv_cache_dtype": "fp9"}, "kv_cache_dtype: 'fp9' is not one of: auto"),
    ],
)
def test_wrong_engine_arguments(tmp_path: Path, engine: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_model(model(tmp_path, **engine))


def test_right_engine_arguments(tmp_path: Path) -> None:
    check_model(
        model(
            tmp_path, enforce_eager=True, seed=3, dtype="float32", kv_cache_dtype="auto",
            tokenizer=None, quantization="fp8", load_format="dummy", cpu_offload_gb=2,
        )
    )  # fmt: skip


def test_architectures_that_vllm_does_not_serve(tmp_path: Path) -> None:
    config = {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="OddForCausalLM, which the installed vLLM does not serve"):
        check_model(model(tmp_path))


def test_sampling_parameters() -> None:
    check_sampling({"temperature": 0.5, "top_k": 3, "stop": ["a"], "seed": None}, "n")
    with pytest.raises(InputError, match="temprature: the installed vLLM has no such field"):
        check_sampling({"temprature": 1.0}, "n")
    with pytest.raises(InputError, match="ignore_eos: 'no' is not one of: bool"):
        check_sampling({"ignore_eos": "no"}, "n")


def test_tokenizers_and_chat_templates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer in .*engine_args\.tokenizer"):
        check_tokenizer(model(tmp_path), chat=False)
    check_tokenizer(model(tmp_path, skip_tokenizer_init=True), chat=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    given = model(tmp_path, tokenizer=str(other))
    check_tokenizer(given, chat=False)
    with pytest.raises(InputError, match="holds no chat template"):
        check_tokenizer(given, chat=True)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    check_tokenizer(given, chat=True)
    (other / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"other/tokenizer\.json: cannot be read as a tokenizer"):
        check_tokenizer(given, chat=False)
    (tmp_path / "tekken.json").write_text("{}")
    check_tokenizer(model(tmp_path, tokenizer_mode="mistral"), chat=True)


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def write_weights(file: Path, *, cut: int = 0) -> None:
    """Write a safetensors file of one tensor, its last bytes left out."""
    tensor = {"dtype": "F32", "shape": [25], "data_offsets": [0, 100]}
    header = json.dumps({"w": tensor}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100 - cut))


def write_index(folder: Path, *names: str) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {n: n for n in names}})
    )


def test_files_of_weights(tmp_path: Path) -> None:
    """Half of a download is found before an engine is started."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 512}))
    with pytest.raises(InputError, match="no files of weights; download it again, or set"):
        check_weights(model(tmp_path))
    check_weights(model(tmp_path, load_format="dummy"))
    write_weights(tmp_path / "a-00001-of-00002.safetensors")
    with pytest.raises(InputError, match="there are 1 of 2 files of weights"):
        check_weights(model(tmp_path))
    write_weights(tmp_path / "a-00002-of-00002.safetensors", cut=1)
    with pytest.raises(InputError, match=r"00002\.safetensors is cut off: it has (\d+) of"):
        check_weights(model(tmp_path))
    write_weights(tmp_path / "a-00002-of-00002.safetensors")
    check_weights(model(tmp_path))
    write_index(tmp_path, "a-00001-of-00002.safetensors", "b.safetensors")
    with pytest.raises(InputError, match=r"names b\.safetensors, which is not there"):
        check_weights(model(tmp_path))
    (tmp_path / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="run git lfs pull"):
        check_weights(model(tmp_path))


def test_files_that_another_index_names_are_not_missing(tmp_path: Path) -> None:
    """Of several sets of files an engine takes one that is whole."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_index(tmp_path, "a.safetensors")
    with pytest.raises(InputError, match=r"names a\.safetensors, which is not there"):
        check_weights(model(tmp_path))
    (tmp_path / "b.bin").write_bytes(b"x")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "b.bin"}}')
    check_weights(model(tmp_path))


def test_a_header_without_places_is_said(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [25]}}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"a\.safetensors: its header does not say where"):
        check_weights(model(tmp_path))


def test_sequences_longer_than_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 511}))
    dummy = model(tmp_path, load_format="dummy")
    with pytest.raises(InputError, match="max_model_len: 512 is more than 511"):
        check_model(dummy)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    check_model(dummy)


def test_limits_that_contradict_each_other(tmp_path: Path) -> None:
    options = EngineOptions(max_num_seqs=64, max_num_batched_tokens=32)
    with pytest.raises(InputError, match="max_num_batched_tokens: 32 is below max_num_seqs 64"):
        check_model(ModelSpec("mine", 16, path=str(tmp_path), engine=options))
    with pytest.raises(InputError, match="min_tokens: 9 is above max_tokens 8"):
        check_sampling({"min_tokens": 9, "max_tokens": 8}, "here")


def test_a_chat_template_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for m in messages %}\n{{ m.content }}\n{% endif %}")
    with pytest.raises(InputError, match=r"chat_template\.jinja:3: no chat template"):
        check_tokenizer(model(tmp_path), chat=True)
    check_tokenizer(model(tmp_path), chat=False)
    template.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    check_tokenizer(model(tmp_path), chat=True)


def test_a_tokenizer_that_is_nowhere(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(InputError, match=rf"engine_args\.tokenizer: there is no folder {gone}"):
        check_tokenizer(model(tmp_path, tokenizer=str(gone)), chat=False)
