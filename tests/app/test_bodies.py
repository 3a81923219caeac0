"""Lines of the OpenAI batch format: every field has its effect, or the line is refused by name."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.app import bodies
from samullm_plugin.app.bodies import BodyError, check_chat, check_messages, content_text
from samullm_plugin.app.requestlines import RowError, checked
from samullm_plugin.app.sampling import REFUSED, SamplingSection

MESSAGES = [{"role": "user", "content": "hi"}]


def line(body: dict[str, Any], **more: Any) -> Any:
    return checked({"custom_id": "r", "method": "POST", "body": body, **more}, 1)


def chat(**body: Any) -> Any:
    return line({"model": "x", "messages": MESSAGES, **body}, url="/v1/chat/completions")


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({"temperature": 0, "seed": 3, "top_k": 5}, {"temperature": 0.0, "seed": 3, "top_k": 5}),
        ({"logprobs": True, "top_logprobs": 2}, {"logprobs": 2}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"prompt_logprobs": 1}, {"prompt_logprobs": 1}),
        ({"logit_bias": {"5": 100, "7": -1.5}}, {"logit_bias": {5: 100.0, 7: -1.5}}),
        ({"stop": ["a"], "user": "u", "metadata": {"a": 1}, "store": False}, {"stop": ["a"]}),
        ({"response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"json_object": True}},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": {"type": "object"}},
                },
                "structured_outputs": {"disable_any_whitespace": True},
            },
            {"structured_outputs": {"disable_any_whitespace": True, "json": {"type": "object"}}},
        ),
        ({"vllm_xargs": {"a": 1}}, {"extra_args": {"a": 1}}),
        ({"stream": False, "use_beam_search": False, "priority": 0, "best_of": 1}, {}),
        ({"bad_words": ["x"], "min_p": None, "tool_choice": "none"}, {"bad_words": ["x"]}),
    ],
)
def test_sampling_fields_are_honoured(body: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert dict(chat(**body).values.sampling) == sampling


def test_limits_choices_and_prompts() -> None:
    found = chat(max_completion_tokens=4, max_tokens=9, n=3)
    assert (found.id, found.values.max_tokens, found.values.n) == ("r", 4, 3)
    assert line({"prompt": [1, 2, 3]}).values.prompt_token_ids == (1, 2, 3)
    assert line({"prompt": ["x"]}, url="/v1/completions").fields["prompt"] == "x"
    assert line({"prompt": "x", "logprobs": 2, "add_special_tokens": True}).values.sampling == {
        "logprobs": 2
    }


def test_chat_options_reach_the_template() -> None:
    options: dict[str, Any] = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"enable_thinking": False},
        "chat_template": "{{ messages }}",
        "add_generation_prompt": False,
        "continue_final_message": True,
        "documents": [{"title": "t", "text": "d"}],
        "reasoning_effort": "low",
    }
    assert set(options) == bodies.CHAT_OPTIONS
    assert chat(**options).values.chat == options
    plain = checked({"id": "a", "messages": MESSAGES, "tools": options["tools"]}, 1)
    assert plain.values.chat == {"tools": options["tools"]}
    other = checked({"id": "a", "prompt": "x", "tools": "a column"}, 1)
    assert (other.values.chat, other.fields["tools"]) == ({}, "a column")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"echo": True}, "body.echo: True is not supported"),
        ({"stream": True}, "body.stream: True is not supported"),
        ({"tool_choice": "required"}, "body.tool_choice: 'required' is not supported"),
        ({"response_format": {"type": "yaml"}}, "body.response_format:"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "json_schema.schema: missing",
        ),
        ({"top_logprobs": 3}, "body.top_logprobs: needs logprobs: true"),
        ({"logprobs": 3}, "body.logprobs: must be true or false"),
        ({"temprature": 1}, "body.temprature: unknown field (did you mean 'temperature'"),
        ({"guided_json": {}}, "body.guided_json: unknown field"),
        ({"temperature": "hot"}, "sampling_params.temperature: Input should be a valid number"),
        ({"logit_bias": {"x": 1}}, "sampling_params.logit_bias"),
        ({"best_of": 3}, "body.best_of: 3 is not supported: ask for n choices"),
        ({"tools": [{"type": "function"}]}, "tools.0.function.name: missing"),
        ({"add_special_tokens": True}, "body.add_special_tokens: True is not supported"),
        ({"truncate_prompt_tokens": 5}, "prompts are not shortened"),
    ],
)
def test_what_is_not_done_is_refused_by_name(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as error:
        chat(**body)
    assert message in str(error.value)


@pytest.mark.parametrize("url", ["/v1/embeddings", "/v1/responses", "/v1/audio/transcriptions"])
def test_other_endpoints_are_refused(url: str) -> None:
    with pytest.raises(RowError, match=rf"url: '{url}' is not served"):
        line({"model": "x", "input": "hi"}, url=url)
    with pytest.raises(BodyError, match="several prompts in one request"):
        bodies.from_batch({"custom_id": "a", "body": {"prompt": ["a", "b"]}})


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([], "there is none"),
        (["hi"], "messages.0: must be a mapping"),
        ([{"content": "x"}], "messages.0.role: missing"),
        ([{"role": "user"}], "messages.0.content: missing"),
        ([{"role": "user", "content": 3}], "messages.0.content: must be a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0: text: missing"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], None),
        ([{"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}], None),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], None),
    ],
)
def test_conversations_are_checked(messages: list[Any], wrong: str | None) -> None:
    found = check_messages(messages)
    assert (found is None) if wrong is None else (found is not None and wrong in found)


def test_parts_are_joined_as_vllm_joins_them() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        "b",
        {"type": "refusal", "refusal": "c"},
    ]
    assert content_text(parts) == "a\nb\nc"
    assert content_text(None) == ""
    assert bodies.has_media([{"role": "user", "content": parts}])
    assert not bodies.has_media([{"role": "user", "content": "image_url"}])
    assert check_chat({"tools": "f"}) == "tools: must be a list, not 'f'"


def vllm_fields(file: str, name: str) -> set[str]:
    """Return the public fields of a class of the installed vLLM, without importing it."""
    module = find_spec("vllm")
    assert module is not None
    assert module.origin is not None
    tree = ast.parse((Path(module.origin).parent / file).read_text())
    cls = next(c for c in tree.body if isinstance(c, ast.ClassDef) and c.name == name)
    named = {
        s.target.id
        for s in cls.body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
    }
    return {n for n in named if not n.startswith("_")}


@pytest.mark.vllm
def test_every_field_of_vllms_requests_is_known() -> None:
    folder = "entrypoints/openai"
    fields = vllm_fields(f"{folder}/chat_completion/protocol.py", "ChatCompletionRequest")
    fields |= vllm_fields(f"{folder}/completion/protocol.py", "CompletionRequest")
    assert {"tools", "suffix"} < fields
    given = {"max_completion_tokens", "top_logprobs", "response_format", "tool_choice"}
    given |= {"messages", "prompt", "vllm_xargs", *SamplingSection.model_fields}
    known = given | bodies.CHAT_OPTIONS | bodies.WITHOUT_EFFECT | bodies.REFUSED.keys()
    assert sorted(fields - known) == []


@pytest.mark.vllm
def test_every_sampling_parameter_of_vllm_is_honoured_or_refused() -> None:
    fields = vllm_fields("sampling_params.py", "SamplingParams")
    assert sorted(fields - SamplingSection.model_fields.keys() - REFUSED.keys()) == []
    assert sorted(SamplingSection.model_fields.keys() - fields) == ["extra"]
    assert sorted(REFUSED.keys() - fields) == []
