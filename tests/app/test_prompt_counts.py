"""Prompt lengths of conversations and of pairs of texts, before anything has run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.app.loaded import LoadedApplication, prompt_text
from samullm_plugin.app.loading import load_application
from samullm_plugin.checkpoints.tokenizing import OwnTokenizers
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import ModelSpec


def load(
    folder: Path, nodes: str, rows: list[dict[str, Any]], counter: Any = None
) -> LoadedApplication:
    """Load nodes that read these rows."""
    (folder / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "app.yaml").write_text(
        "version: 1\nname: a\nmodels: {m: {model: lmsys/vicuna-13b-v1.5}}\n"
        f"nodes: {{{nodes}}}\ncluster: {{gpus: 1}}\n"
    )
    return load_application(folder / "app.yaml", count_tokens=counter)


def words(_: ModelSpec, text: str) -> int:
    """Count words as tokens."""
    return len(text.split())


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "what is it"}, "like there"]},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}]},
    {"role": "tool", "content": "very warm"},
]


def test_conversations_are_counted_as_the_texts_of_their_turns(tmp_path: Path) -> None:
    node = "n: {model: m, requests: r.jsonl, sampling_params: {max_tokens: 4}}"
    loaded = load(tmp_path, node, [{"messages": CONVERSATION}], words)
    assert loaded.app.nodes[0].requests.prompt_tokens.tolist() == [7]


def test_counts_made_side_by_side_are_those_that_conversations_are_asked_for(
    tmp_path: Path,
) -> None:
    class Seen(OwnTokenizers):
        def __init__(self) -> None:
            super().__init__()
            self.counted: list[str] = []

        def counts(self, model: ModelSpec, texts: Any) -> dict[str, int]:
            self.counted += texts
            return dict.fromkeys(texts, 1)

        def __call__(self, model: ModelSpec, text: str) -> int:
            raise AssertionError("counted by itself")

    node = "n: {model: m, requests: r.jsonl, sampling_params: {max_tokens: 4}}"
    seen = Seen()
    load(tmp_path, node, [{"messages": CONVERSATION}], seen)
    assert seen.counted == [prompt_text({"messages": CONVERSATION})]


ASKED = "a: {model: m, requests: r.jsonl, sampling_params: {max_tokens: 4}, SAMPLE}"
SCORED = "b: {{model: m, task: score, for_each: a, prompt: '{prompt}', pair: '{pair}'}}"


@pytest.mark.parametrize(
    ("prompt", "pair", "tokens"),
    [
        ("{{ prompt }}", "one two", 3 + 2),
        # Of an output as it may be, "b" enters; its 4 characters are taken for 1 token.
        ('{{ prompt }} {{ output.split(". ")[1] }}', "one two", 3 + 1 - 1 + 2),
        ("{{ prompt }}", 'one {{ output.split(". ")[1] }}', 3 + 1 + 1 - 1),
    ],
)
def test_both_texts_of_a_pair_are_counted(
    tmp_path: Path, prompt: str, pair: str, tokens: int
) -> None:
    nodes = f"{ASKED.replace('SAMPLE', 'sample: a. b')}, {SCORED.format(prompt=prompt, pair=pair)}"
    loaded = load(tmp_path, nodes, [{"prompt": "what is it"}], words)
    assert loaded.app.nodes[1].requests.prompt_tokens.tolist() == [tokens]


def test_a_pair_that_fails_on_every_output_is_refused_with_what_it_was_tried_with(
    tmp_path: Path,
) -> None:
    scored = SCORED.format(prompt="{{ prompt }}", pair="{{ output.nothing }}")
    with pytest.raises(InputError, match=r"nodes\.b\.pair: .*tried with request .*give `sample`"):
        load(tmp_path, f"{ASKED.replace(', SAMPLE', '')}, {scored}", [{"prompt": "what is it"}])


@pytest.mark.parametrize(
    ("prompt", "pair", "field"),
    [("{{ promt }}", "x", "prompt"), ("{{ prompt }}", "{{ promt }}", "pair")],
)
def test_unknown_variables_are_named_by_the_field_that_uses_them(
    tmp_path: Path, prompt: str, pair: str, field: str
) -> None:
    nodes = f"{ASKED.replace(', SAMPLE', '')}, {SCORED.format(prompt=prompt, pair=pair)}"
    with pytest.raises(InputError, match=rf"nodes\.b\.{field}: {{{{ promt }}}} is neither"):
        load(tmp_path, nodes, [{"prompt": "what is it"}])
