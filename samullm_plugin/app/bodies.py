"""Requests of the OpenAI batch format: every field has an effect or is refused by name.

``tests/app/test_bodies.py`` compares this with the request classes of the installed vLLM.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from samullm_plugin.app.sampling import SamplingSection
from samullm_plugin.checkpoints.images import file_of, url_of
from samullm_plugin.errors import InputError, suggest

CHAT_OPTIONS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "documents",
        "reasoning_effort",
        "tools",
    }
)
"""Variables passed to the chat template of a conversation."""
WITHOUT_EFFECT = frozenset(
    {
        "include_reasoning",  # outputs are what the model wrote
        "metadata",
        "model",  # the node says which model answers
        "parallel_tool_calls",  # calls are not parsed
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "stream_options",
        "user",
    }
)
"""Fields that say nothing about the output: they are passed over."""

REFUSED: Mapping[str, tuple[object, str]] = {
    # name: the value that asks for nothing, and why any other is refused
    "add_special_tokens": (None, "a chat template adds its own; give prompt_token_ids instead"),
    "audio": (None, "outputs are texts"),
    "best_of": (1, "ask for n choices and choose in a node of its own"),
    "cache_salt": (None, "prefix caches are not salted"),
    "ec_transfer_params": (None, "caches are not transferred"),
    "echo": (False, "outputs do not repeat the prompt"),
    "function_call": (None, "use tools"),
    "functions": (None, "use tools"),
    "kv_transfer_params": (None, "caches are not transferred"),
    "length_penalty": (1.0, "there is no beam search"),
    "logits_processors": (None, "use extra_args of vLLM's plugins"),
    "media_io_kwargs": (None, "set it in the model's engine_args"),
    "mm_payload": ("tensors", "media are not returned"),
    "mm_processor_kwargs": (None, "set it in the model's engine_args"),
    "modalities": (["text"], "outputs are texts"),
    "prediction": (None, "not supported"),
    "priority": (0, "the plan's request policy orders requests"),
    "prompt_embeds": (None, "give a prompt or token ids"),
    "return_mm_kwargs": (False, "media are not returned"),
    "return_prompt_text": (False, "prompts are not returned"),
    "return_token_ids": (False, "token ids are not returned"),
    "return_token_offsets": (False, "token offsets are not returned"),
    "return_tokens_as_token_ids": (False, "log probabilities name tokens by their text"),
    "routed_experts_prompt_start": (0, "routed experts are not returned"),
    "stream": (False, "an offline run does not stream"),
    "stream_interval": (None, "an offline run does not stream"),
    "suffix": (None, "infilling is not supported"),
    "truncate_prompt_tokens": (None, "prompts are not shortened; a longer one fails"),
    "truncation_side": (None, "prompts are not shortened"),
    "use_beam_search": (False, "there is no beam search"),
    "web_search_options": (None, "there is no search"),
}

_SAMPLING = SamplingSection.model_fields.keys() - {"extra"}
_AROUND_BODY = frozenset({"body", "url", "method", "custom_id"})
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions")

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and the field that holds it."""

MEDIA_PARTS = frozenset(
    {"image_url", "input_image", "image_embeds", "audio_url", "input_audio", "video_url"}
)
"""Types of content parts that only some models read."""

FIELD_TURNS = frozenset({"history", "image"})
"""Roles of turns that name a field of the row instead of holding a template."""


class BodyError(ValueError):
    """A request asks for something that is not done here; the message says what."""


def from_batch(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of the batch format as fields of a plain line.

    Args:
        fields: with ``custom_id`` and ``body``.

    Raises:
        BodyError: naming what would not be honoured.
    """
    given: Mapping[str, Any] = fields["body"]
    url = fields.get("url")
    if url is not None and url not in _ENDPOINTS:
        raise BodyError(f"url: {url!r} is not served; nodes generate text ({_ENDPOINTS[0]})")
    found = {n: v for n, v in fields.items() if n not in _AROUND_BODY}
    if "custom_id" in fields:
        found.setdefault("id", fields["custom_id"])
    body = {}
    for name, value in given.items():
        if name in WITHOUT_EFFECT:
            continue
        if name not in REFUSED:
            body[name] = value
        elif name != "add_special_tokens" or value is not ("messages" not in given):
            nothing, why = REFUSED[name]  # beside what vLLM does by itself
            if value not in (nothing, None):
                raise BodyError(f"body.{name}: {_short(value)} is not supported: {why}")
    sampling = _sampling(body)
    prompt = body.pop("prompt", None)
    if isinstance(prompt, list):
        if prompt and all(type(t) is int for t in prompt):
            found["prompt_token_ids"] = prompt
        elif len(prompt) == 1:
            found["prompt"] = prompt[0]
        else:
            raise BodyError("body.prompt: several prompts in one request; write a line for each")
    elif prompt is not None:
        found["prompt"] = prompt
    for name in ("messages", "prompt_token_ids", *CHAT_OPTIONS):
        if (value := body.pop(name, None)) is not None:
            found[name] = value
    for name in list(body):
        if body[name] is None:
            del body[name]
    if body:
        name = next(iter(body))
        known = {*SamplingSection.model_fields, *CHAT_OPTIONS, "messages", "prompt"}
        raise BodyError(f"body.{name}: unknown field{suggest(name, known)}")
    return {"sampling_params": sampling, **found}


def _sampling(body: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling parameters out of a body."""
    sampling: dict[str, Any] = {}
    limits = [body.pop(n, None) for n in ("max_completion_tokens", "max_tokens")]
    limit = next((v for v in limits if v is not None), None)
    if limit is not None:
        sampling["max_tokens"] = limit
    chat = "messages" in body
    top, wanted = body.pop("top_logprobs", None), body.pop("logprobs", None)
    if chat and wanted is not None and not isinstance(wanted, bool):
        raise BodyError("body.logprobs: must be true or false for a conversation")
    if wanted is False or (wanted is None and top in (None, 0)):
        if top:
            raise BodyError("body.top_logprobs: needs logprobs: true")
    elif wanted is None:
        raise BodyError("body.top_logprobs: needs logprobs: true")
    else:
        sampling["logprobs"] = (top or 0) if wanted is True else wanted
    form, choice = body.pop("response_format", None), body.pop("tool_choice", None)
    if choice not in (None, "none", "auto"):
        raise BodyError(
            f"body.tool_choice: {_short(choice)} is not supported: tools reach the chat template, "
            "and calls stay part of the text; ask for a form with response_format"
        )
    if form is not None:
        sampling |= _structured(form, body.pop("structured_outputs", None))
    if (extra := body.pop("vllm_xargs", None)) is not None:
        sampling["extra_args"] = extra
    for name in [n for n in body if n in _SAMPLING]:
        if (value := body.pop(name)) is not None:
            sampling[name] = value
    return sampling


def _structured(form: Any, given: Any) -> dict[str, Any]:
    """Return the structured outputs that a response format asks for, as vLLM understands it."""
    import json

    kind = form.get("type") if isinstance(form, Mapping) else form
    if kind == "text":
        return {} if given is None else {"structured_outputs": given}
    own = dict(given) if isinstance(given, Mapping) else {}
    if kind == "json_object":
        own["json_object"] = True
    elif kind == "json_schema" and isinstance(form.get("json_schema"), Mapping):
        own["json"] = form["json_schema"].get("schema", form["json_schema"].get("json_schema"))
        if own["json"] is None:
            raise BodyError("body.response_format.json_schema.schema: missing")
    elif kind == "structural_tag":
        own["structural_tag"] = json.dumps(form)
    else:
        raise BodyError(f"body.response_format: {_short(form)} is not supported")
    return {"structured_outputs": own}


_CHAT_TYPES: Mapping[str, tuple[type, str]] = {
    "add_generation_prompt": (bool, "must be true or false"),
    "chat_template": (str, "must be a text"),
    "chat_template_kwargs": (Mapping, "must be a mapping"),
    "continue_final_message": (bool, "must be true or false"),
    "documents": (list, "must be a list"),
    "reasoning_effort": (str, "must be a text"),
    "tools": (list, "must be a list"),
}


def check_chat(options: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the variables of a chat template, or None."""
    for name, value in options.items():
        kind, wanted = _CHAT_TYPES[name]
        if not isinstance(value, kind):
            return f"{name}: {wanted}, not {_short(value)}"
    for k, tool in enumerate(options.get("tools", ())):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return f"tools.{k}.function.name: missing"
    if options.get("add_generation_prompt", False) and options.get("continue_final_message"):
        return "continue_final_message: needs add_generation_prompt: false"
    return None


def check_messages(messages: Sequence[Any]) -> str | None:
    """Return what is wrong with a conversation, or None."""
    if not messages:
        return "messages: there is none"
    for k, message in enumerate(messages):
        where = f"messages.{k}"
        if not isinstance(message, Mapping):
            return f"{where}: must be a mapping with role and content"
        if not isinstance(message.get("role"), str):
            return f"{where}.role: missing"
        content = message.get("content")
        if content is None:
            if not message.get("tool_calls") and not message.get("reasoning"):
                return f"{where}.content: missing"
        elif isinstance(content, list):
            for i, part in enumerate(content):
                if (wrong := _check_part(part)) is not None:
                    return f"{where}.content.{i}: {wrong}"
        elif not isinstance(content, str):
            return f"{where}.content: must be a text or a list of parts"
    return None


def _check_part(part: Any) -> str | None:
    if isinstance(part, str):
        return None
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        return "type: missing"
    if kind in MEDIA_PARTS:
        return None
    if kind not in TEXT_PARTS:
        return f"parts of type {kind!r} are not supported"
    return None if isinstance(part.get(TEXT_PARTS[kind]), str) else f"{TEXT_PARTS[kind]}: missing"


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a conversation holds images, audio or video."""
    return any(True for _ in media_parts(messages))


def media_parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the images, audio and video of a conversation."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type") in MEDIA_PARTS:
                yield part


def content_text(content: Any) -> str:
    """Return the text of a message's content; parts are joined as vLLM joins them."""
    if not isinstance(content, list):
        return "" if content is None else str(content)
    texts = [
        part if isinstance(part, str) else part.get(TEXT_PARTS.get(str(part.get("type")), ""), "")
        for part in content
    ]
    return "\n".join(t for t in texts if t)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def image_parts(
    fields: Mapping[str, Any], name: str, folder: Path, where: str
) -> list[dict[str, object]]:
    """Return the images that a field of a row holds, as parts of a message.

    Args:
        fields: of the row.
        name: of the field: a file, a data URL, or a list of these; empty or null: no image.
        folder: what files are relative to.
        where: node and request, for messages.

    Raises:
        InputError: if it holds something else, or a file that is not there.
    """
    value = fields.get(name)
    given = value if isinstance(value, list) else [value] if value else []
    return [
        {"type": "image_url", "image_url": {"url": _url(one, folder, f"{where}: image {name}")}}
        for one in given
    ]


def _url(value: object, folder: Path, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: it is a {type(value).__name__}; give a file or a data URL")
    if value.startswith("data:image/"):
        return value
    if "://" in value[:10]:
        raise InputError(
            f"{where}: nothing is downloaded during a run; download {value[:60]} and give the file"
        )
    path = (folder / value).resolve()
    if not path.is_file():
        raise InputError(f"{where}: there is no file {path}")
    return path.as_uri()


def with_files(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation with the contents of the image files that its URLs name.

    Raises:
        OSError: if one cannot be read.
    """
    return [
        {**message, "content": [_with_file(part) for part in content]}
        if isinstance(content := message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _with_file(part: Any) -> Any:
    image = part.get("image_url") if isinstance(part, Mapping) else None
    if not isinstance(image, Mapping) or (path := file_of(url_of(part) or "")) is None:
        return part
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {**image, "url": f"data:{kind};base64,{data}"}}
