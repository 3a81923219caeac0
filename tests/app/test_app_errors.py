"""Wrong input: one message with file, field or line, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import load_application
from samullm_plugin.app.templates import Output, render
from samullm_plugin.errors import InputError

Load = Callable[..., LoadedApplication]

APP = """
version: 1
name: t
models: {a: {model: lmsys/vicuna-13b-v1.5}, b: {model: chatglm3-6b}}
nodes:
  x: {model: a, requests: r.jsonl, sampling_params: {max_tokens: 10}}
  y: {model: b, inputs: {i: x}, sampling_params: {max_tokens: 10}}
cluster: {gpus: 2}
"""
LINES = [f'{{"id": "{i}", "prompt": "hello there"}}' for i in range(10)]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write(
        field: str = "", value: Any = None, line: str | None = None, text: str | None = None
    ) -> LoadedApplication:
        spec = yaml.safe_load(APP)
        *parents, last = field.split(".")
        inner = spec
        for part in parents:
            inner = inner[part]
        if field:
            inner[last] = value
        lines = LINES if line is None else [*LINES[:6], line, *LINES[7:]]
        (tmp_path / "r.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / "app.yaml").write_text(yaml.safe_dump(spec) if text is None else text)
        return load_application(tmp_path / "app.yaml")

    return write


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("node", 1, "app.yaml: node: unknown field (did you mean 'nodes'"),
        ("nodes.x.request", "r", "nodes.x.request: unknown field (did you mean 'requests'?)"),
        ("nodes.y.inputs", {"i": {"from": "x", "takes": 1}}, "nodes.y.inputs.i.takes: unknown"),
        ("nodes.y.inputs", {"i": {"take": "all"}}, "nodes.y.inputs.i.from: missing"),
        ("nodes.y.inputs", {"i": ["x"]}, "nodes.y.inputs.i: must be a text or a mapping"),
        ("nodes.x.sampling_params", {"max_token": 1}, "(did you mean 'max_tokens'"),
        ("nodes.x.max_tokens", 5, "(did you mean sampling_params.max_tokens?)"),
        ("nodes.x.sampling_params", {}, "nodes.x.sampling_params.max_tokens: missing"),
        ("nodes.x.inputs", {"j": "y"}, "they form a cycle: x -> y -> x"),
        ("nodes.y.inputs", {"i": "xx"}, "inputs.i.from: there is no node 'xx' (did you mean 'x'?)"),
        ("nodes.y.inputs", {}, "nodes.y: it has no requests: give requests"),
        ("nodes.x.model", "c", "nodes.x.model: no model 'c'; models: a, b"),
        ("nodes.x.requests", "q.jsonl", "q.jsonl: there is no such requests file"),
        ("nodes.x.copies", 0, "nodes.x.copies: Input should be greater than or equal to 1"),
        ("nodes.x.where", {"rout": 1}, "r.jsonl line 1 has no field 'rout'"),
        ("nodes.x.where", {"prompt": "z"}, "nodes.x.where: no line of r.jsonl has these values"),
        ("nodes.x.prompt", "{{ i", "nodes.x.prompt: line 1 of the template"),
        ("nodes.y.prompt", "{{ ii }}", "{{ ii }} is neither a field of request '0' nor an input"),
        ("nodes.x.route", {"y": {"probability": 0.4}}, "the probabilities add up to 0.4"),
        ("nodes.x.route", {"y": {"probability": 1, "when": "("}}, "is not a regular expression"),
        (
            "nodes.z",
            {"python": "best by scor", "inputs": {"c": "x"}},
            "nodes.z.python: there is no field 'scor'; there are",
        ),
        (
            "nodes.z",
            {"python": "vote by logprob", "inputs": {"c": "x"}},
            "no field 'logprob'; ask for it with sampling_params.logprobs",
        ),
        ("nodes.x.output_schema", {"regex": "a(?=b)"}, "output_schema.regex: no engine can"),
        (
            "nodes.z",
            {"python": "best by output", "inputs": {"c": "x", "d": "y"}},
            "nodes.z.python: it chooses among the rows of one input, and there are 2",
        ),
        (
            "nodes.z",
            {
                "model": "a",
                "requests": "r.jsonl",
                "messages": [{"history": "promt"}],
                "sampling_params": {"max_tokens": 4},
            },
            "nodes.z.messages.history: no row has a field 'promt' (did you mean 'prompt'?)",
        ),
        (
            "nodes.z",
            {"python": "best by output", "inputs": {"c": "x"}, "model": "a"},
            "nodes.z.model: is not a field beside the others",
        ),
        ("nodes.y.for_each", "z", "nodes.y.for_each: there is no node 'z'"),
        ("nodes.y.chain", "chapter", "nodes.y.chain: request '0' has no field 'chapter'"),
        ("cluster.gpus", 0, "cluster.gpus: at least one GPU is needed, not 0"),
        ("cluster.gpus", [], "cluster.gpus: at least one GPU is needed"),
        ("cluster.gpu", "A100-90GB", "its memory is not known (did you mean 'A100-80GB'"),
        ("cluster.nvlink", [[0, 5]], "cluster: nvlink_groups names device 5"),
        ("cluster.network_gbit_s", 100, "network_gbit_s: it counts only for replicas across"),
        ("cluster.network_latency_us", -1, "network_latency_us: Input should be greater than or"),
        (
            "cluster.replicas_across_machines",
            2,
            "cluster.replicas_across_machines: Input should be",
        ),
        ("cluster.engines_per_gpu", 0, "cluster.engines_per_gpu: Input should be greater than or"),
        ("cluster.engines_per_gpu", 2, "cluster.slowdown: missing, and engines_per_gpu is 2"),
        ("cluster.slowdown", 0.9, "cluster.slowdown: Input should be greater than or equal to 1"),
        ("cluster.slowdown", float("inf"), "cluster.slowdown: Input should be a finite number"),
        ("cluster.slowdown", 1e308, "cluster.slowdown: Input should be less than or equal to 1000"),
        ("cluster.slowdown", 1.5, "cluster.slowdown: it counts only where engines share a GPU"),
        (
            "cluster.gpus",
            [{"gpu": "A100-80GB", "count": 2, "engines_per_gpu": 2}],
            "cluster.gpus[0].slowdown: missing",
        ),
        (
            "cluster",
            {"gpus": [{"gpu": "A100-80GB", "count": 2}], "engines_per_gpu": 2, "slowdown": 1.5},
            "cluster.engines_per_gpu: gpus lists several kinds; write it in the entries",
        ),
        ("cluster.machines", 3, "cluster.machines: 2 GPUs cannot be spread evenly over 3"),
        ("models.a.max_model_len", -5, "models.a.max_model_len: Input should be greater"),
        ("models.a.architecture", "c.json", "neither a bundled model nor a file"),
        ("models.a.architecture", {"num_layers": 3}, "architecture.hidden_size: missing"),
        ("models.a.model", "new", "models.a.max_model_len: missing"),
        ("models.a.engine_args", {"max_num_seq": 1}, "(did you mean 'max_num_seqs'?)"),
        ("models.a.engine_args", {"tensor_parallel_size": 2}, "the planner decides it"),
        ("models.a.engine_args", {"max_num_seqs": 0}, "must be a whole number of at least 1"),
        ("models.a.engine_args", {"gpu_memory_utilization": 1.5}, "at most 1, not 1.5"),
        ("planner", {"schedule": "x"}, "planner.schedule: unknown field (did you mean 'scheduler'"),
        ("version", 2, "version: Input should be 1, not 2"),
        ("name", "a b", "name: 'a b': use letters"),
        ("applications", ["z.yaml"], "give models and nodes, or applications, not both"),
    ],
)
def test_wrong_fields(load: Load, field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(field, value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).count("app.yaml") <= 1  # a message says once where it is about


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "7", "prompt": ', "r.jsonl line 7: is not JSON"),
        ("[1]", "r.jsonl line 7: must be a JSON object, not list"),
        ('{"prompt_tokens": -3}', "r.jsonl line 7: prompt_tokens: Input should be greater"),
        ('{"prompt_tokens": 9, "max_tokens": 0}', "r.jsonl line 7: max_tokens: Input should be"),
        ('{"id": "2", "prompt": "a"}', "line 7: the id '2' is already that of line 3"),
        ('{"id": "7x"}', "r.jsonl line 7: it has no prompt; give prompt"),
        ('{"prompt": "a", "messages": []}', "line 7: give prompt or messages, not both"),
        ('{"prompt": "a", "inputs": ["z:1"]}', "'z:1' does not name a node's output"),
        ('{"prompt": "a", "sampling_params": {"topp": 1}}', "topp: unknown field (did you mean"),
        ('{"prompt_tokens": 5000}', "line 7: its prompt has 5000 tokens, but node x uses"),
        ('{"chunks": []}', "r.jsonl line 7: chunks: List should have at least 1 item"),
    ],
)
def test_wrong_lines(load: Load, line: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(line=line)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "app.yaml line 1: expected"),
        ("- a", "app.yaml: must hold a mapping"),
        ("version: 1\nname: x\nname: y\n", "app.yaml line 3: the field 'name' is given twice"),
        ("version: 1\nname: x\n", "app.yaml: it has no nodes"),
        ("version: 1\nname: x\napplications: [app.yaml]\n", "it contains itself"),
        ("version: 1\nname: x\napplications: [routing]\n", "'routing' is not a file"),
    ],
)
def test_wrong_files(load: Load, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(text=text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ prompt + 1 }}", "prompt template: can only concatenate"),
        ("{{ prompt.nothing }}", "has no attribute 'nothing'"),
        ("{{ prompt.__class__.__mro__ }}", "is unsafe"),
        ("{{ 1 / 0 }}", "prompt template: division by zero"),
    ],
)
def test_templates_that_fail_or_reach_into_python(load: Load, template: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load("nodes.x.prompt", template)
    assert "nodes.x" in str(error.value)
    assert message in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"app\.yaml: there is no such file"):
        load_application(tmp_path / "app.yaml")


def test_the_unchanged_file_is_right(load: Load) -> None:
    assert load().app.num_requests == 20


def test_a_field_that_is_nearly_a_known_one_is_noted(load: Load) -> None:
    notes = load(line='{"prompt": "a", "max_token": 3}').app.notes
    assert any("line 7" in n and "did you mean 'max_tokens'" in n for n in notes)


def test_estimated_lengths_are_noted(load: Load) -> None:
    assert any("10 of 10 requests are estimated at 4 characters" in n for n in load().app.notes)


def test_unmatched_requests(load: Load) -> None:
    where = {"id": ["1", "2"]}
    text = yaml.safe_dump(
        {
            **yaml.safe_load(APP),
            "nodes": {
                "x": {
                    "model": "a",
                    "requests": "r.jsonl",
                    "where": where,
                    "sampling_params": {"max_tokens": 5},
                },
                "y": {
                    "model": "b",
                    "requests": "r.jsonl",
                    "inputs": {"i": "x"},
                    "sampling_params": {"max_tokens": 5},
                },
            },
        }
    )
    with pytest.raises(InputError, match="request '0' finds no output with item '0' in x"):
        load(text=text)
    loaded = load(text=text.replace("i: x", "i: {from: x, optional: true}"))
    assert len(loaded.app.nodes[1].requests.input_node) == 2


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ rate.scor }}", r"no field 'scor' \(did you mean 'score'\?\)"),
        ("{{ rate['zzz'] }}", "no field 'zzz'; it has text, value, score"),
    ],
)
def test_a_field_that_an_output_lacks(template: str, said: str) -> None:
    with pytest.raises(InputError, match=f"node g: prompt template: an output has {said}"):
        render(template, {"rate": Output.of("one", {"score": 1})}, "node g")
