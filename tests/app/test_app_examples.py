"""Every shape of application in ``examples/applications``: its graph and its prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import load_application
from samullm_plugin.model.scenarios import draw_taken

EXAMPLES = Path(__file__).parents[2] / "examples" / "applications"


def load(name: str) -> LoadedApplication:
    return load_application(EXAMPLES / name / "app.yaml")


def inputs(loaded: LoadedApplication, node: str, request: str) -> list[tuple[str, str]]:
    """The (node, id) pairs that a request waits for."""
    assert loaded.sources is not None
    index = loaded.app.index(node)
    row = loaded.sources[index].ids.index(request)
    table = loaded.app.nodes[index].requests
    part = slice(table.input_indptr[row], table.input_indptr[row + 1])
    return [
        (loaded.app.nodes[n].name, loaded.sources[n].ids[r])
        for n, r in zip(table.input_node[part], table.input_request[part], strict=True)
    ]


def prompt(loaded: LoadedApplication, node: str, request: str) -> str:
    assert loaded.sources is not None
    sources = loaded.sources
    index = loaded.app.index(node)
    made = loaded.conversation(
        index, sources[index].ids.index(request), lambda n, r: f"<{sources[n].ids[r]}>"
    )
    return made if isinstance(made, str) else "\n\n".join(str(m["content"]) for m in made)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/app.yaml")), ids=lambda p: p.parent.name)
def test_examples_load(path: Path) -> None:
    loaded = load_application(path)
    assert loaded.app.name == path.parent.name
    assert loaded.cluster is not None
    assert loaded.sources is not None
    for node, source in zip(loaded.app.all_nodes, loaded.sources, strict=True):
        assert len(source.ids) == len(source.fields) == len(node.requests)
        assert len(source.labels) == len(node.requests.input_node)
        shown = [bool(label) for label in source.labels]
        assert shown == node.requests.input_in_prompt.tolist()


def test_ensembling_joins_by_item() -> None:
    loaded = load("ensembling")
    assert [n.name for n in loaded.app.nodes] == [
        "answer.vicuna",
        "answer.koala",
        "answer.mpt",
        "fuse",
    ]
    assert inputs(loaded, "fuse", "q2") == [
        ("answer.vicuna", "q2"),
        ("answer.koala", "q2"),
        ("answer.mpt", "q2"),
    ]
    text = prompt(loaded, "fuse", "q2")
    assert "Question: Write a short poem" in text
    assert text.count("<q2>") == 3


def test_routing_picks_lines() -> None:
    loaded = load("routing")
    assert loaded.sources is not None
    assert [s.ids for s in loaded.sources] == [("r1", "r5"), ("r2",), ("r3", "r4")]
    code = loaded.app.nodes[1].requests
    assert code.prompt_tokens.tolist() == [120]
    assert code.max_tokens.tolist() == [300]  # the line's own limit comes first
    assert loaded.sources[1].sampling_params(0)["max_tokens"] == 300


def test_run_time_routing_takes_one_branch() -> None:
    loaded = load("runtime-routing")
    app = loaded.app
    solve, answer = app.nodes[1].requests, app.nodes[2].requests
    assert solve.probability.tolist() == [0.25] * 4
    assert solve.choice.tolist() == answer.choice.tolist() == [0, 1, 2, 3]
    assert not solve.input_in_prompt.any()  # the router's word is not part of the question
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        taken = draw_taken(app, rng)
        assert (taken[1] ^ taken[2]).all()
        assert taken[3].all()
        shares.append(taken[1].mean())
    assert abs(np.mean(shares) - 0.25) < 0.05
    assert loaded.sources is not None
    router = loaded.sources[0]
    assert [router.branch({"output": text}) for text in ("Math.", "other", "")] == [1, 2, 2]


def test_chain_waits_for_the_previous_chunk() -> None:
    loaded = load("chain-summary")
    assert inputs(loaded, "summarise", "novel/0") == []
    assert inputs(loaded, "summarise", "novel/3") == [("summarise", "novel/2")]
    assert inputs(loaded, "judge", "story#4") == [("summarise", "story/1")]
    table = loaded.app.nodes[0].requests
    template = table.prompt_tokens[0] - 2048
    assert 0 < template < 20
    assert table.prompt_tokens[4] == 977 + template
    assert "Summary so far: \n" in prompt(loaded, "summarise", "letter/0")
    assert "Summary so far: <letter/0>\n\nNext part: I remain" in prompt(
        loaded, "summarise", "letter/1"
    )


def test_map_reduce_joins_by_field() -> None:
    loaded = load("map-reduce")
    assert inputs(loaded, "reduce", "annual report") == [("map", m) for m in ("a1", "a2", "a3")]
    text = prompt(loaded, "reduce", "minutes")
    assert text.split()[5:] == [
        "sections",
        "of",
        "minutes",
        "into",
        "one:",
        "-",
        "<m1>",
        "-",
        "<m2>",
    ]


def test_vote_reads_all_copies() -> None:
    loaded = load("vote")
    assert inputs(loaded, "vote", "2") == [("solve", f"2#{k}") for k in range(1, 6)]


def test_refining_uses_the_outputs_of_all_steps() -> None:
    loaded = load("refine")
    assert inputs(loaded, "revise", "2") == [("critique", "2"), ("draft", "2")]
    text = prompt(loaded, "compare", "4")
    assert text.startswith("Task: Describe how a bicycle pump works.")
    assert text.index("<4>") < text.index("B: <4>")


def test_filter_drops_an_item_everywhere() -> None:
    loaded = load("filter-vote")
    app = loaded.app
    answers = [app.nodes[i].requests for i in (1, 2, 3)]
    assert all(t.gate is not None and t.gate.tolist() == [0, 1, 2, 3, 4] for t in answers)
    rng = np.random.default_rng(1)
    kept = []
    for _ in range(300):
        taken = draw_taken(app, rng)
        assert taken[0].all()
        assert (taken[1] == taken[2]).all()
        assert (taken[1] == taken[4]).all()  # the vote follows what was kept
        kept.append(taken[1].mean())
    assert abs(np.mean(kept) - 0.6) < 0.05
    assert loaded.sources is not None
    keep = loaded.sources[0].keep
    assert keep is not None
    assert keep.holds({"output": "Yes, it can."})
    assert not keep.holds({"output": "No."})


def test_mixed_keeps_parts_apart() -> None:
    loaded = load("mixed")
    names = [n.name for n in loaded.app.nodes]
    assert names[:2] == ["chain-summary/summarise", "chain-summary/judge"]
    assert inputs(loaded, "ensembling/fuse", "q1")[0] == ("ensembling/answer.vicuna", "q1")
    assert inputs(loaded, "chain-summary/judge", "novel#1") == [
        ("chain-summary/summarise", "novel/4")
    ]
    assert any(n.startswith("ensembling: node fuse") for n in loaded.app.notes)


def test_a_tokenizer_is_used_where_there_is_one() -> None:
    path = EXAMPLES / "vote" / "app.yaml"
    loaded = load_application(path, count_tokens=lambda model, text: len(text.split()))
    assert loaded.app.nodes[0].requests.prompt_tokens.tolist() == [14] * 5 + [6] * 5 + [7] * 5
    assert loaded.app.notes == ()


def test_messages_and_batch_lines(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(
        '{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m",'
        ' "messages": [{"role": "user", "content": "hi there"}], "max_tokens": 7,'
        ' "temperature": 0.5}}\n'
        '{"id": "ids", "prompt_token_ids": [1, 2, 3]}\n'
        '{"id": "n", "prompt": "x", "inputs": ["first:k"], "prefix_id": "p", "prefix_tokens": 1}\n'
    )
    (tmp_path / "first.jsonl").write_text('{"id": "k", "prompt": "y"}\n')
    (tmp_path / "app.yaml").write_text(
        "version: 1\nname: t\nmodels: {a: {model: chatglm3-6b}}\nnodes:\n"
        "  second: {model: a, requests: r.jsonl, sampling_params: {max_tokens: 9}}\n"
        "  first: {model: a, requests: first.jsonl, chat: true, sampling_params: {max_tokens: 9}}\n"
    )
    loaded = load_application(tmp_path / "app.yaml")
    assert loaded.sources is not None
    source, table = loaded.sources[0], loaded.app.nodes[0].requests
    assert table.max_tokens.tolist() == [7, 9, 9]
    assert source.sampling_params(0) == {"max_tokens": 7, "temperature": 0.5}
    assert source.prompt_token_ids == {1: (1, 2, 3)}
    assert table.prompt_tokens[1] == 3
    assert table.prefix_id.tolist() == [-1, -1, 0]
    assert inputs(loaded, "second", "n") == [("first", "k")]

    def output(node: int, request: int) -> str:
        return "out"

    assert loaded.conversation(0, 0, output) == [{"role": "user", "content": "hi there"}]
    assert loaded.conversation(0, 2, output) == "x\n\nout"
    assert loaded.conversation(1, 0, output) == [{"role": "user", "content": "y"}]


def test_what_a_filter_lets_pass_is_a_fallback_also_where_it_is_only_waited_for(
    tmp_path: Path,
) -> None:
    text = (EXAMPLES / "cascade" / "app.yaml").read_text()
    questions = EXAMPLES / "cascade" / "questions.jsonl"
    (tmp_path / "questions.jsonl").write_text(questions.read_text())
    waits = text.replace("{from: [small, large]}", "{from: [small, large], in_prompt: false}")
    waits = waits.replace("{{ reply }}", "it")
    assert waits != text
    (tmp_path / "app.yaml").write_text(waits)
    for loaded in (load("cascade"), load_application(tmp_path / "app.yaml")):
        assert loaded.sources is not None
        small, explain = loaded.app.index("small"), loaded.app.index("explain")
        table = loaded.app.nodes[explain].requests
        assert set(table.probability.tolist()) == {1.0}
        spare = np.flatnonzero(table.input_node == small)
        assert loaded.sources[explain].fallback == frozenset(spare.tolist())
