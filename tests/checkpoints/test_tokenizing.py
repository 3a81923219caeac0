"""Prompts are counted by the model's own tokenizer where it is here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samullm_plugin.checkpoints import tokenizing
from samullm_plugin.checkpoints.tokenizing import OwnTokenizer, OwnTokenizers, count_prompt_tokens
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import EngineOptions, ModelSpec
from samullm_plugin.planning.applications import find_application
from tests.models import make_tiny_llama


def test_tokens_are_those_of_the_models_tokenizer(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "m", tokenizer=True)
    bare = make_tiny_llama(tmp_path / "bare")
    (tmp_path / "r.jsonl").write_text(
        "".join(json.dumps({"prompt": "w5 " * n, "max_tokens": 4}) + "\n" for n in (1, 7, 100))
    )
    (tmp_path / "app.yaml").write_text(
        "version: 1\nname: a\n"
        "models: {m: {model: m, max_model_len: 64}, bare: {model: bare, max_model_len: 64}}\n"
        "nodes:\n  n: {model: m, requests: r.jsonl}\n  b: {model: bare, requests: r.jsonl}\n"
        "on_bad_row: skip\n"
    )
    loaded = find_application(PluginHost.from_settings(), str(tmp_path / "app.yaml"))
    counted, estimated = loaded.app.nodes
    assert counted.requests.prompt_tokens[:2].tolist() == [1, 7]
    assert loaded.sources is not None
    # 100 tokens are too many of 64: known to be so, one request is refused, and that one only.
    assert list(loaded.sources[0].refused) == [2]
    assert estimated.requests.prompt_tokens.tolist() == [1, 6, 63]
    assert not loaded.sources[1].refused
    assert any("node b: prompt tokens of 3 of 3" in note for note in loaded.app.notes)

    counter = OwnTokenizers()
    assert counter(ModelSpec("x", 64, path=str(bare)), "w5 w6") is None
    told = EngineOptions(extra=(("tokenizer", str(folder)),))
    assert counter(ModelSpec("x", 64, path=str(bare), engine=told), "w5 w6") == 2
    texts = ["w5", "w5 w6 w7", "w5"]
    found = counter.counts(ModelSpec("x", 64, path=str(folder)), texts)
    assert found == {"w5": 1, "w5 w6 w7": 3}
    assert counter.counts(ModelSpec("x", 64, path=str(bare)), texts) == {}


TEMPLATE = (
    "{% for m in messages %}w3 w4 {{ m.content }} w5 {% endfor %}"
    "{% if add_generation_prompt %}w6{% endif %}"
)


def test_tokens_of_the_chat_template_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = make_tiny_llama(tmp_path / "m", tokenizer=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"messages": [{"role": "user", "content": "w7 " * n}]} for n in (1, 5)]
    rows += [{"messages": [*rows[0]["messages"], {"role": "assistant", "content": "w8"},
                           *rows[1]["messages"]]}]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "w7 w8"}) + "\n")
    (tmp_path / "app.yaml").write_text(
        "version: 1\nname: a\nmodels: {m: {model: m, max_model_len: 64}}\nnodes:\n"
        "  n: {model: m, requests: r.jsonl, sampling_params: {max_tokens: 4}}\n"
        "  p: {model: m, requests: p.jsonl, chat: true, sampling_params: {max_tokens: 4}}\n"
    )
    loaded = find_application(PluginHost.from_settings(), str(tmp_path / "app.yaml"))
    conversations, asked = (n.requests.prompt_tokens.tolist() for n in loaded.app.nodes)
    assert conversations == [1 + 3 + 1, 5 + 3 + 1, 7 + 3 * 3 + 1]
    assert asked == [2 + 3 + 1]
    model = ModelSpec("m", 64, path=str(folder))
    counted = [count_prompt_tokens(model, r["messages"]) for r in rows]
    assert counted == conversations

    last = {"add_generation_prompt": False}
    assert count_prompt_tokens(model, rows[0]["messages"], last) == conversations[0] - 1
    goes_on = {"continue_final_message": True}
    assert count_prompt_tokens(model, rows[2]["messages"], goes_on) == conversations[2] - 2
    other = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    assert count_prompt_tokens(model, rows[0]["messages"], other) == 1
    bare = make_tiny_llama(tmp_path / "bare")
    told = EngineOptions(extra=(("tokenizer", str(folder)),))
    elsewhere = ModelSpec("x", 64, path=str(bare), engine=told)
    assert count_prompt_tokens(elsewhere, rows[0]["messages"]) == conversations[0]


def test_what_a_chat_template_adds_is_kept_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    folder = make_tiny_llama(tmp_path / "m", tokenizer=True)
    template = folder / "chat_template.jinja"
    model, asked = ModelSpec("m", 64, path=str(folder)), [{"role": "user", "content": "w7"}]
    template.write_text("{% nothing of the kind %}")
    assert OwnTokenizers().framing(model, asked, "w7", {}) == 0
    template.write_text(TEMPLATE)  # that it could not be found out was not kept
    assert OwnTokenizers().framing(model, asked, "w7", {}) == 4
    tokenizing._read.cache_clear()
    monkeypatch.setattr(OwnTokenizer, "_whole", None)  # transformers is not asked again
    assert OwnTokenizers().framing(model, asked, "w7", {}) == 4
    assert OwnTokenizers().framing(model, asked, "w7", {"chat_template": "x"}) == 0
    assert OwnTokenizers().framing(model, [{"role": "tool"}], "", {}) == 0
    template.write_text(TEMPLATE + "w5")
    assert OwnTokenizers().framing(model, asked, "w7", {}) == 0


def test_a_tokenizer_that_comes_later_is_found(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "m")
    model = ModelSpec("m", 64, path=str(folder))
    assert OwnTokenizers()(model, "w5 w6") is None
    assert count_prompt_tokens(model, "w5 w6") is None
    make_tiny_llama(folder, tokenizer=True)
    assert OwnTokenizers()(model, "w5 w6") == 2
    assert count_prompt_tokens(model, "w5 w6") == 2


def test_counts_of_long_windows_are_kept_until_the_tokenizer_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_llama(tmp_path / "m", tokenizer=True)
    texts = ["w7 " * 20_000, "w7 w8 " * 10_000]
    assert OwnTokenizer(str(folder)).count_all(texts) == [20_000, 20_000]
    again = OwnTokenizer(str(folder))
    monkeypatch.setattr(OwnTokenizer, "_fast", object())  # what counts is not asked
    assert again.count_all(texts) == [20_000, 20_000]
    (folder / "tokenizer.json").touch()
    with pytest.raises(AttributeError, match="encode_batch_fast"):
        OwnTokenizer(str(folder)).count_all(texts)
