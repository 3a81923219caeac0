"""Models of an ``app.yaml``, and what is read of their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samullm_plugin.app.loading import load_application
from samullm_plugin.checkpoints.models import config_of
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import ModelSpec

FIGURES = (
    "{hidden_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 2, head_dim: 32, "
    "intermediate_size: 128, vocab_size: 512}"
)


def app(folder: Path, model: str) -> Path:
    """Write an application of one node whose model has these fields."""
    folder.mkdir(exist_ok=True)
    (folder / "r.jsonl").write_text('{"prompt": "hello"}\n')
    (folder / "app.yaml").write_text(
        f"version: 1\nname: a\nmodels: {{m: {{{model}}}}}\n"
        "nodes: {n: {model: m, requests: r.jsonl, sampling_params: {max_tokens: 4}}}\n"
        "cluster: {gpus: 1}\n"
    )
    return folder / "app.yaml"


@pytest.mark.parametrize("figures", ["lmsys/vicuna-13b-v1.5", FIGURES])
def test_a_folder_that_holds_only_a_tokenizer_is_enough_beside_figures(
    tmp_path: Path, figures: str
) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "tokenizer.json").write_text("{}")
    fields = f"model: x, path: ../stub, architecture: {figures}"
    loaded = load_application(app(tmp_path / "a", f"{fields}, max_model_len: 2048"))
    model = loaded.app.nodes[0].model
    assert (model.path, model.max_model_len) == (str(tmp_path / "stub"), 2048)
    assert config_of(model) is None


def test_a_length_that_no_file_tells_is_asked_for_by_its_field(tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    fields = f"model: x, path: ../stub, architecture: {FIGURES}"
    with pytest.raises(InputError, match=r"app.yaml: models.m.max_model_len: missing, and .*stub"):
        load_application(app(tmp_path / "a", fields))


def test_a_name_means_no_folder_where_the_command_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "llama").mkdir(parents=True)
    (tmp_path / "here" / "llama" / "config.json").write_text("{")
    file = app(tmp_path / "a", f"model: llama, architecture: {FIGURES}, max_model_len: 64")
    monkeypatch.chdir(tmp_path / "here")
    assert load_application(file).app.nodes[0].model.name == "llama"


def test_configurations_are_read_once_until_they_change(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama"}))
    model = ModelSpec("m", 64, path=str(tmp_path))
    first = config_of(model)
    assert first is not None
    assert config_of(model) is first
    file.write_text(json.dumps({"model_type": "llama", "vision_start": 1}))
    changed = config_of(model)
    assert changed is not None
    assert changed.raw["vision_start"] == 1
