"""Nodes of pooling models, from app.yaml to the outputs, on small real engines."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.app.loading import build_application, load_application, read_spec
from samullm_plugin.app.spec import ModelSection
from samullm_plugin.errors import InputError
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.run import resume_run, start_run
from tests.models import make_tiny_encoder, make_tiny_llama, make_tiny_reward
from tests.run.test_pipelines import ENGINE, EXAMPLES, outputs, setup_of

APP = EXAMPLES / "search-answers" / "app.yaml"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the example, small."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_encoder(folder / "embedder")
    make_tiny_encoder(folder / "ranker", labels=1)
    make_tiny_encoder(folder / "sorter", labels=3, seed=1)
    make_tiny_llama(folder / "writer", characters=True, vocab_size=104)
    make_tiny_reward(folder / "critic", seed=2)
    return folder


def small(models: Path, name: str) -> ModelSection:
    """Return one of them for an app.yaml."""
    length = 512 if name in ("embedder", "ranker", "sorter") else 2048
    place = str(models / name)
    return ModelSection(
        model=name, path=place, architecture=place, max_model_len=length,
        engine_args={**{k: v for k, v in ENGINE.items() if "structured" not in k}},
    )  # fmt: skip


def reference(models: Path, name: str, *texts: str) -> Any:
    """Return what transformers gives for the same text: a vector, or the classes' numbers."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModel if name == "embedder" else AutoModelForSequenceClassification
    model, tokenizer = (
        kind.from_pretrained(models / name),
        AutoTokenizer.from_pretrained(models / name),
    )
    with torch.no_grad():
        made = model(**tokenizer(*texts, return_tensors="pt"))
    if name == "embedder":
        return torch.nn.functional.normalize(made.last_hidden_state[0, 0], dim=0).tolist()
    return made.logits[0]


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("executor", ["simulated", "emulated"])
def test_executors_that_model_engines(models: Path, tmp_path: Path, executor: str) -> None:
    """They run every kind of node for as long as the plan says, with numbers of no meaning."""
    spec = read_spec(APP)
    made = setup_of(spec, {n: small(models, n) for n in spec.models}, APP, tmp_path / "r")
    options = {"time_scale": 0.2} if executor == "emulated" else {}
    truth = made.instance.problem
    ready = replace(made, executor=executor, executor_options=options, truth=truth)
    plan = make_plan(ready.host, truth, "min-heuristic").plan
    outcome = start_run(ready, plan)
    assert outcome.failed == ()
    for node, counts in outcome.metrics["nodes"].items():
        taken = sum(counts["requests"].values())
        assert taken > 0, node
    for i, node in enumerate(truth.app.nodes):
        told = outcome.metrics["nodes"][node.name]["requests"]
        assert told["finished"] == int((truth.scenarios[0].output_tokens[i] > 0).sum()), node.name


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_search_answers(models: Path, tmp_path: Path) -> None:
    """Every kind of number is what the model says, joined, journaled, and not asked for again."""
    spec = read_spec(APP)
    ready = setup_of(spec, {n: small(models, n) for n in spec.models}, APP, tmp_path / "r")
    plan = make_plan(ready.host, ready.instance.problem, "min-heuristic").plan
    outcome = start_run(ready, plan)
    assert outcome.failed == ()
    rows = {
        r["id"]: r
        for r in map(json.loads, (APP.parent / "paragraphs.jsonl").read_text().splitlines())
    }
    vectors = {k: v["embedding"] for k, v in outputs(tmp_path / "r", "embed").items()}
    assert set(vectors) == set(rows)
    for name, vector in vectors.items():
        expected = reference(models, "embedder", rows[name]["paragraph"])
        assert vector == pytest.approx(expected, abs=1e-4)
    assert len(outputs(tmp_path / "r", "distinct")) <= 5  # p1 and p2 are one text
    scores = {k: v["score"] for k, v in outputs(tmp_path / "r", "rank").items()}
    assert scores
    for name, score in scores.items():
        row = rows[name]
        logit = reference(models, "ranker", row["question"], row["paragraph"])[0]
        assert score == pytest.approx(float(logit.sigmoid()), abs=1e-4)
    kept = {k for k, v in scores.items() if v > 0.1}
    assert kept
    labels = outputs(tmp_path / "r", "sort")
    assert set(labels) == kept
    for name, value in labels.items():
        probs = reference(models, "sorter", rows[name]["paragraph"]).softmax(0).tolist()
        assert value["probs"] == pytest.approx(probs, abs=1e-4)
        assert value["label"] == f"LABEL_{probs.index(max(probs))}"
    praise = outputs(tmp_path / "r", "praise")
    assert len(praise) == 2 * len(kept)
    best = outputs(tmp_path / "r", "best")
    assert set(best) == kept
    for item, chosen in best.items():
        assert chosen["score"] == max(v["score"] for k, v in praise.items() if f"{item}#" in k)
    records = [r for r in read_journal(tmp_path / "r/events.jsonl") if r["kind"] == "finished"]
    resume_run(ready)
    again = [r for r in read_journal(tmp_path / "r/events.jsonl") if r["kind"] == "finished"]
    assert len(again) == len(records)


def refused(models: Path, tmp_path: Path, name: str, node: dict[str, Any], **more: Any) -> str:
    """Return why a node of one of the models is refused."""
    (tmp_path / "r.jsonl").write_text('{"id": "1", "prompt": "hello world"}\n')
    model = {"model": name, "path": str(models / name), "engine_args": more.pop("engine_args", {})}
    app = {
        "version": 1, "name": "wrong", "models": {"m": model, "w": {"model": "vicuna-13b-v1.5"}},
        "nodes": {"n": {"model": "m", "requests": "r.jsonl", **node}, **more},
        "cluster": {"gpus": 1},
    }  # fmt: skip
    (tmp_path / "app.yaml").write_text(json.dumps(app))
    with pytest.raises(InputError) as found:
        load_application(tmp_path / "app.yaml")
    return str(found.value)


@pytest.mark.parametrize(
    ("name", "node", "why"),
    [
        ("writer", {"task": "embed"}, "nodes.n.task: embed needs an embedding model.*generative"),
        ("ranker", {"task": "embed"}, "embed needs an embedding model.*classifier"),
        ("embedder", {"task": "classify"}, "classify needs a sequence classifier"),
        ("embedder", {"task": "reward"}, "reward needs a reward model"),
        ("sorter", {"task": "reward"}, "one label, and sorter has 3; use task: classify"),
        ("sorter", {"task": "score", "pair": "x"}, "one label"),
        ("ranker", {"task": "score"}, "pair: missing"),
        ("ranker", {"task": "score", "pair": "{{ nothing }}"}, "nothing.*neither a field"),
        ("embedder", {"sampling_params": {"max_tokens": 1}}, "n.task: missing; embedder is a pool"),
        ("embedder", {"task": "embed", "sampling_params": {"top_p": 1}}, "generates no text"),
        ("sorter", {"task": "classify", "keep": {"expr": "lable == 'x'"}}, "did you mean .label"),
        ("sorter", {"task": "classify", "keep": {"expr": "logprob < 1"}}, "no field 'logprob'"),
    ],
)
def test_wrong_tasks(models: Path, tmp_path: Path, name: str, node: Any, why: str) -> None:
    message = refused(models, tmp_path, name, node)
    assert str(tmp_path / "app.yaml") in message
    assert re.search(why, message), message


def test_models_that_pool_by_their_arguments(models: Path, tmp_path: Path) -> None:
    args = {"runner": "pooling", "convert": "classify"}
    node = {"sampling_params": {"max_tokens": 1}}
    message = refused(models, tmp_path, "writer", node, engine_args=args)
    assert "nodes.n.task: missing; writer is a pooling model (its engine_args say so)" in message


def test_vectors_are_no_prompt(models: Path, tmp_path: Path) -> None:
    reader = {
        "model": "w",
        "for_each": "n",
        "prompt": "{{ n }}",
        "sampling_params": {"max_tokens": 1},
    }
    message = refused(models, tmp_path, "embedder", {"task": "embed"}, reader=reader)
    assert "nodes.reader: its prompt takes the output of n, which is a vector" in message


def test_whole_prompts(models: Path, tmp_path: Path) -> None:
    args = {"enable_chunked_prefill": True}
    message = refused(models, tmp_path, "embedder", {"task": "embed"}, engine_args=args)
    assert "cannot have enable_chunked_prefill" in message
    args = {"max_num_batched_tokens": 100}
    message = refused(models, tmp_path, "embedder", {"task": "embed"}, engine_args=args)
    assert "raise max_num_batched_tokens to its max_model_len 512" in message
    spec = read_spec(APP)
    spec = spec.model_copy(update={"models": {n: small(models, n) for n in spec.models}})
    app = build_application(spec, APP).app
    engines = {n.name: n.model.engine for n in app.nodes}
    for name in ("embed", "rank", "sort"):
        assert engines[name].given("enable_chunked_prefill") is False
    assert engines["praise"].given("enable_chunked_prefill") is None
    assert engines["praise"].given("runner") == "pooling"
    assert engines["answer"].given("runner") is None
    assert not engines["embed"].async_scheduling
    for node in app.nodes:
        if node.name != "answer":
            assert node.requests.max_tokens.tolist() == [1] * len(node.requests)


def test_cosine_of_the_example() -> None:
    """The step of the example leaves out what nearly points the same way."""
    import runpy

    steps = runpy.run_path(str(APP.parent / "steps.py"))
    near = [{"embedding": v} for v in ([1.0, 0.0], [1.0, 1e-6], [0.0, 2.0])]
    assert steps["distinct"](near) == [near[0], near[2]]
    assert steps["cosine"]([1.0, 1.0], [0.0, 3.0]) == pytest.approx(math.sqrt(0.5))
