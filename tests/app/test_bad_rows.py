"""A row that cannot be asked: listed with all others before anything starts, or an error output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samullm_plugin.app.fields import bad_rows_message
from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import load_application
from samullm_plugin.cli.app import main
from samullm_plugin.errors import InputError

APP = """
version: 1
name: rows
on_bad_row: {policy}
models: {{a: {{model: lmsys/vicuna-13b-v1.5}}}}
nodes:
  x: {{model: a, requests: r.jsonl, sampling_params: {{max_tokens: 10}}}}
  y: {{model: a, for_each: x, prompt: "{{{{ output }}}}", sampling_params: {{max_tokens: 10}}}}
cluster: {{gpus: 2}}
"""
ROWS = [
    '{"id": "good", "prompt": "x"}',
    '{"id": "b", "prompt": "y"',
    '{"id": "empty", "prompt": ""}',
    '{"id": "null", "prompt": null}',
    '{"id": "good", "prompt": "again"}',
    '{"id": "\\ud800", "prompt": "x"}',
    '{"id": "long", "prompt_tokens": 5000}',
    '{"id": "huge", "prompt": "x", "max_tokens": 3000000000}',
    '{"id": "ids", "prompt_token_ids": [1, 99999999999999]}',
    '{"id": "seed", "prompt": "x", "sampling_params": {"seed": 99999999999999999999}}',
    '{"id": "parts", "messages": [{"role": "user", "content": [{"type": "smell"}]}]}',
    '{"id": "nan", "prompt": "x", "score": NaN}',
    '{"custom_id": "n", "body": {"messages": [{"role": "user", "content": "x"}], "echo": true}}',
]
BAD = {
    2: "is not JSON",
    3: "it has no prompt",
    4: "it has no prompt",
    5: "the id 'good' is already that of line 1",
    6: "half of a UTF-16 pair",
    7: "its prompt has 5000 tokens",
    8: "max_tokens: Input should be less than",
    9: "prompt_token_ids.1: Input should be less than",
    10: "sampling_params.seed: Input should be less than",
    11: "messages.0.content.0: parts of type 'smell' are not supported",
    13: "body.echo: True is not supported: outputs do not repeat the prompt",
}


def load(folder: Path, policy: str, rows: list[str]) -> LoadedApplication:
    (folder / "app.yaml").write_text(APP.format(policy=policy))
    (folder / "r.jsonl").write_text("\n".join(rows) + "\n")
    return load_application(folder / "app.yaml")


def test_all_bad_rows_are_listed_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path, "fail", ROWS)
    message = str(error.value)
    assert message.startswith("11 bad rows: ")
    assert f"{tmp_path}/r.jsonl lines 3-4: it has no prompt" in message
    for number, reason in BAD.items():
        assert reason in message
        assert number == 4 or f"line {number}" in message or f"lines {number}" in message
    assert message.endswith("write `on_bad_row: skip` in app.yaml to run the others)")
    assert "\n" not in message


def test_bad_rows_come_before_what_follows_from_them(tmp_path: Path) -> None:
    rows = ['{"id": "a", "prompt": ', '{"id": "b", "prompt": "x", "inputs": ["x:a"]}']
    with pytest.raises(InputError, match=r"r.jsonl line 1: is not JSON"):
        load(tmp_path, "fail", rows)


def test_skipped_rows_are_error_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load(tmp_path, "skip", ROWS)
    assert any(n.startswith("11 bad rows: ") for n in loaded.app.notes)
    taken = loaded.app.nodes[0].requests.probability
    assert [k + 1 for k in range(len(ROWS)) if taken[k] == 0] == list(BAD)
    run = ["run", str(tmp_path / "app.yaml"), "--executor", "simulated"]
    assert main([*run, "--output-dir", str(tmp_path / "run"), "--scheduler", "greedy"]) == 1
    capsys.readouterr()
    for node in ("x", "y"):
        lines = (tmp_path / f"run/outputs/{node}.jsonl").read_text().splitlines()
        outputs = [json.loads(line) for line in lines]
        assert len(outputs) == len(ROWS)
        for number, output in enumerate(outputs, start=1):
            assert (output["error"] is not None) == (number in BAD)
            if number in BAD and node == "x":
                assert BAD[number] in output["error"]["message"]
            elif number in BAD:
                assert "of node x failed" in output["error"]["message"]
    assert main([*run[:2], "--resume", str(tmp_path / "run")]) == 1


def test_estimates_refuse_nothing(tmp_path: Path) -> None:
    loaded = load(tmp_path, "fail", [json.dumps({"id": "a", "prompt": "word " * 4000})])
    assert loaded.app.nodes[0].requests.prompt_tokens[0] == 4095
    assert any("1 of these prompts may be longer than" in n for n in loaded.app.notes)


def test_one_message_for_very_many() -> None:
    places = {f"f line {n}": f"reason {n % 30}" for n in range(1, 1001)}
    message = bad_rows_message(places)
    assert len(message) < 20_000
    assert "1000 bad rows: f line 1, line 31" in message
    assert "reason 20" in message
    assert "reason 21" not in message
    assert "also f line 21, f line 51" in message
    assert bad_rows_message({"f line 1": "no", "f line 2": "no", "f line 3, chunk 1": "no"}) == (
        "3 bad rows: f lines 1-2, line 3, chunk 1: no (correct them, or write `on_bad_row: skip` "
        "in app.yaml to run the others)"
    )


@pytest.mark.parametrize(("config", "refused"), [({}, True), ({"vision_config": {}}, False)])
def test_images_for_models_that_read_text(
    tmp_path: Path, config: dict[str, object], refused: bool
) -> None:
    """They are told with file and line before anything starts."""
    from tests.models import make_tiny_llama

    folder = make_tiny_llama(tmp_path / "m", tokenizer=True)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    rows = [{"prompt": "w3"}, {"messages": [{"role": "user", "content": [part]}]}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    node = {"model": "m", "requests": "r.jsonl", "sampling_params": {"max_tokens": 4}}
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
    sizes |= {"intermediate_size": 128, "vocab_size": 512}
    model = {"model": "m", "path": "m", "architecture": sizes, "max_model_len": 512}
    app = {"version": 1, "name": "t", "models": {"m": model}, "nodes": {"n": node}}
    (tmp_path / "app.yaml").write_text(json.dumps(app))
    if not refused:
        assert load_application(tmp_path / "app.yaml").app.nodes[0].requests.probability.all()
        return
    with pytest.raises(InputError, match=r"r.jsonl line 2.*images.*model m reads text only; take"):
        load_application(tmp_path / "app.yaml")


def asked(folder: Path, rows: list[dict[str, object]], node: str, policy: str) -> LoadedApplication:
    (folder / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "app.yaml").write_text(
        f"version: 1\nname: asked\non_bad_row: {policy}\n"
        "models: {a: {model: lmsys/vicuna-13b-v1.5}}\n"
        f"nodes:\n  x: {{model: a, requests: r.jsonl, {node},\n"
        "      sampling_params: {max_tokens: 5}}\n"
        "cluster: {gpus: 2}\n"
    )
    return load_application(folder / "app.yaml")


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(
    ("node", "field"),
    [
        ('prompt: "{{ about }}"', "about"),
        ('prompt: "{{ about.upper() }}"', "about"),
        ("messages: [{history: about}, {user: go on}]", "about"),
    ],
)
def test_a_row_without_a_templates_field_costs_that_row(
    tmp_path: Path, node: str, field: str, bad: int
) -> None:
    """Also where it is the first row."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good = {"about": turns if "history" in node else "a"}
    rows: list[dict[str, object]] = [{"id": str(k), **good} for k in range(3)]
    del rows[bad][field]
    with pytest.raises(InputError, match=rf"r\.jsonl line {bad + 1}: .*'{field}'"):
        asked(tmp_path, rows, node, "fail")
    loaded = asked(tmp_path, rows, node, "skip")
    assert (loaded.app.nodes[0].requests.probability == [k != bad for k in range(3)]).all()


def test_what_no_row_has_is_the_applications_fault(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"id": str(k), "about": "a"} for k in range(3)]
    with pytest.raises(InputError, match=r"nodes\.x\.prompt: \{\{ abuot \}\} is neither a field"):
        asked(tmp_path, rows, 'prompt: "{{ abuot }}"', "skip")


def test_fields_that_only_some_rows_have_may_be_asked_for(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "0", "about": "a"},
        {"id": "1", "about": "b", "hint": "c"},
    ]
    node = """prompt: "{{ about }}{% if hint is defined %} {{ hint }}{% endif %}" """
    loaded = asked(tmp_path, rows, node, "fail")
    assert (loaded.app.nodes[0].requests.probability == 1).all()
