"""What sampling parameters mean for a request that is moved."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from samullm_plugin import EngineRequest, RequestOutput
from samullm_plugin.host.interfaces.moving import CARRIED, RESTARTED, continued, move_rule


@pytest.mark.parametrize(
    ("sampling", "rule"),
    [
        ({}, "carry"),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1}, "carry"),
        ({"temperature": 0.0, "seed": 3}, "carry"),
        ({"temperature": 0.7, "seed": 3}, "restart"),
        ({"seed": 3}, "restart"),
        ({"seed": None}, "carry"),
        ({"repetition_penalty": 1.2}, "carry"),
        ({"presence_penalty": 0.5}, "restart"),
        ({"presence_penalty": 0.0, "frequency_penalty": 0}, "carry"),
        ({"frequency_penalty": 0.5}, "restart"),
        ({"min_tokens": 5}, "carry"),
        ({"stop": ["x"]}, "carry"),
        ({"stop": ["x"], "min_tokens": 5}, "restart"),
        ({"stop": [], "min_tokens": 5}, "carry"),
        ({"stop_token_ids": [7], "min_tokens": 5}, "carry"),
        ({"logprobs": 3}, "carry"),
        ({"prompt_logprobs": 1}, "restart"),
        ({"structured_outputs": {"regex": "a+"}}, "restart"),
        ({"bad_words": ["x y"]}, "restart"),
        ({"extra_args": {"kv_transfer_params": {}}}, "bar"),
        ({"something_new": 1}, "bar"),
        ({"something_new": 1, "prompt_logprobs": 1}, "bar"),
        ({"something_new": None}, "carry"),
    ],
)
def test_rules(sampling: dict[str, object], rule: str) -> None:
    assert move_rule(sampling) == rule


@pytest.mark.vllm
def test_every_parameter_of_vllm_has_a_rule() -> None:
    """A parameter that a new vLLM brings is barred until somebody has thought about it."""
    module = find_spec("vllm")
    assert module is not None
    assert module.origin is not None
    source = (Path(module.origin).parent / "sampling_params.py").read_text()
    cls = next(
        c
        for c in ast.parse(source).body
        if isinstance(c, ast.ClassDef) and c.name == "SamplingParams"
    )
    named = [
        s.target.id
        for s in cls.body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
    ]
    fields = {f for f in named if not f.startswith("_")}
    assert "temperature" in fields
    internal = {"skip_clone", "output_text_buffer_length"}
    barred = {
        "extra_args", "routed_experts_prompt_start", "trace_decode_token_ids", "watermarking",
    }  # fmt: skip
    assert fields - CARRIED - RESTARTED - internal == barred


def test_continued_request() -> None:
    first = EngineRequest(4, (5, 6, 7), 3, 10, sampling={"temperature": 0.0}, output_tokens=9)
    second = continued(first, RequestOutput(4, 2, (8, 9)))
    assert second == EngineRequest(
        4, (5, 6, 7, 8, 9), 5, 8, sampling={"temperature": 0.0}, num_generated=2, output_tokens=7
    )
    third = continued(second, RequestOutput(4, 1, (10,)))
    assert third.prompt_token_ids == (5, 6, 7, 8, 9, 10)
    assert (third.max_tokens, third.num_generated, third.output_tokens) == (7, 3, 6)


def test_continued_text_becomes_token_ids() -> None:
    first = EngineRequest(4, None, 99, 10, prompt="hello")
    second = continued(first, RequestOutput(4, 2, (8, 9), prompt_token_ids=(1, 2)))
    assert second.prompt is None
    assert second.prompt_token_ids == (1, 2, 8, 9)
    assert second.prompt_tokens == 4


def test_continued_simulation_has_lengths_only() -> None:
    first = EngineRequest(4, None, 30, 10)
    second = continued(first, RequestOutput(4, 2))
    assert (second.prompt_tokens, second.max_tokens) == (32, 8)
    assert second.prompt_token_ids is None


def test_nothing_is_continued_that_begins_again() -> None:
    first = EngineRequest(4, (1, 2), 2, 10, sampling={"presence_penalty": 1.0})
    assert continued(first, RequestOutput(4, 2, (8, 9))) is first
    plain = EngineRequest(4, (1, 2), 2, 10)
    assert continued(plain, RequestOutput(4, 0, ())) is plain
    text = EngineRequest(4, None, 2, 10, prompt="hello")
    assert continued(text, RequestOutput(4, 2, (8, 9))) is text  # tokens of the prompt unknown
