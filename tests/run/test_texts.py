"""Prompts from an app.yaml as a run makes them: templates, routers, filters, chains, joins."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent, indent

import pytest

from samullm_plugin.app.loading import load_application
from samullm_plugin.errors import InputError
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.prompts import Prompt, Refused
from samullm_plugin.run.python_calls import Call
from samullm_plugin.run.results import Result
from samullm_plugin.run.text_prompts import TextPrompts

HEAD = """
    version: 1
    name: texts
    models:
      small: {model: lmsys/vicuna-13b-v1.5}
      large: {model: mistralai/Mixtral-8x7B-Instruct-v0.1}
"""


def load(folder: Path, nodes: str, lines: list[dict[str, object]]) -> tuple[TextPrompts, Ledger]:
    (folder / "requests.jsonl").write_text(
        "".join(json.dumps({"max_tokens": 9, **line}) + "\n" for line in lines)
    )
    (folder / "app.yaml").write_text(dedent(HEAD) + "nodes:\n" + indent(dedent(nodes), "  "))
    loaded = load_application(folder / "app.yaml")
    return TextPrompts(loaded), Ledger(loaded.app)


def finish(ledger: Ledger, node: int, request: int, text: str) -> None:
    ledger.settle((node, request), Status.FINISHED, 1.0, Result(3, 5, "stop", text))


def prompt(source: TextPrompts, ledger: Ledger, node: int, request: int) -> Prompt:
    made = source.prepare((node, request), ledger)
    assert isinstance(made, Prompt), made
    return made


def test_outputs_enter_templates(tmp_path: Path) -> None:
    nodes = """
      draft: {model: small, requests: requests.jsonl, sampling_params: {seed: 1}}
      judge:
        model: large
        for_each: draft
        inputs: {answer: draft}
        prompt: "Q: {{ prompt }} A: {{ answer }}"
        chat: true
        sampling_params: {max_tokens: 9}
    """
    source, ledger = load(tmp_path, nodes, [{"id": "x", "prompt": "Why?"}])
    first = prompt(source, ledger, 0, 0)
    assert (first.text, first.messages, first.max_tokens) == ("Why?", None, 9)
    assert first.sampling == {"seed": 1}
    finish(ledger, 0, 0, "Because.")
    second = prompt(source, ledger, 1, 0)
    assert second.messages == ({"role": "user", "content": "Q: Why? A: Because."},)
    assert second.prompt_tokens >= 3
    assert source.custom_id("draft", 0) == "x"
    assert source.is_chat("judge", 0)


def test_rows_of_functions_say_how_an_output_ended(tmp_path: Path) -> None:
    """A line's own field of such a name stays what it is; a function's value ends nothing."""
    nodes = """
      draft:
        model: small
        requests: requests.jsonl
        check: steps.py:look
        sampling_params: {max_tokens: 9}
      first: {python: "steps.py:look", for_each: draft}
      second: {python: "steps.py:look", for_each: first}
    """
    (tmp_path / "steps.py").write_text("def look(row): return 1\n")
    source, ledger = load(tmp_path, nodes, [{"id": "x", "prompt": "Why?", "num_tokens": "mine"}])
    checked = source.judge((0, 0), Result(3, 5, "length", "So"), ledger)
    ledger.settle((0, 0), Status.FINISHED, 1.0, Result(3, 5, "length", "So"))
    first = source.prepare((1, 0), ledger)
    ledger.settle((1, 0), Status.FINISHED, 2.0, Result(1, finish_reason="stop", value=1))
    second = source.prepare((2, 0), ledger)
    for call in (checked, first, second):
        assert isinstance(call, Call)
        (row,) = call.rows
        assert (row["finish_reason"], row["num_tokens"]) == ("length", "mine")


def test_a_router_chooses_by_its_output(tmp_path: Path) -> None:
    nodes = """
      route:
        model: small
        requests: requests.jsonl
        route: {easy: {when: "^easy", probability: 0.5}, hard: {when: "^hard", probability: 0.5}}
      easy: {model: small, sampling_params: {max_tokens: 9}}
      hard: {model: large, sampling_params: {max_tokens: 9}}
    """
    lines: list[dict[str, object]] = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    source, ledger = load(tmp_path, nodes, lines)
    for r, text in enumerate(("easy one", "hard one", "no idea")):
        finish(ledger, 0, r, text)
    assert source.prepare((1, 0), ledger) is not None
    assert source.prepare((2, 0), ledger) is None
    assert source.prepare((1, 1), ledger) is None
    assert source.prepare((2, 1), ledger) is not None
    refused = source.prepare((1, 2), ledger)
    assert isinstance(refused, Refused)
    assert "matches no branch: 'no idea'" in refused.reason


def test_a_filter_drops_items(tmp_path: Path) -> None:
    nodes = """
      check:
        model: small
        requests: requests.jsonl
        keep: {when: "yes", probability: 0.5}
      answer:
        model: large
        for_each: check
        prompt: "{{ prompt }}"
        sampling_params: {max_tokens: 9}
    """
    source, ledger = load(tmp_path, nodes, [{"prompt": "a"}, {"prompt": "b"}])
    finish(ledger, 0, 0, "yes!")
    finish(ledger, 0, 1, "no")
    assert prompt(source, ledger, 1, 0).text == "a"
    assert source.prepare((1, 1), ledger) is None


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 1 // (answer | length - 1) }}", "by zero"),
        ("{% if answer %}{{ {'x': 1}[answer] }}{% endif %}", "has no attribute"),
        (
            "{% if answer %}{{ answer.encode().__class__ }}{% endif %}",
            "access to attribute '__class__'",
        ),
    ],
)
def test_a_template_that_breaks_fails_its_request_only(
    tmp_path: Path, template: str, why: str
) -> None:
    """With some output only: what breaks always is found when the application is read."""
    nodes = f"""
      one: {{model: small, requests: requests.jsonl}}
      two:
        model: large
        for_each: one
        inputs: {{answer: one}}
        prompt: "{template}"
        sampling_params: {{max_tokens: 9}}
    """
    source, ledger = load(tmp_path, nodes, [{"prompt": "a"}])
    finish(ledger, 0, 0, "z")
    refused = source.prepare((1, 0), ledger)
    assert isinstance(refused, Refused)
    assert "its prompt cannot be made" in refused.reason
    assert why in refused.reason


def test_applications_without_texts_are_refused() -> None:
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.planning.applications import build_named

    with pytest.raises(InputError, match="has no prompts: it can be planned, and run with"):
        TextPrompts(build_named(PluginHost.from_settings(), "small-1"))
