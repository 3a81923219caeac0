"""From requests to what vLLM's engine takes as a prompt: tokens, and media if there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from samullm_plugin import EngineRequest


class RequestError(Exception):
    """A request cannot be run; the message says why."""


@dataclass(frozen=True, slots=True)
class EnginePrompt:
    """A prompt.

    Attributes:
        inputs: what ``LLMEngine.add_request`` takes.
        token_ids: its tokens, placeholders of media included.
        media: it is more than its tokens.
    """

    inputs: Any
    token_ids: list[int]
    media: bool = False

    @classmethod
    def of_tokens(cls, token_ids: list[int]) -> EnginePrompt:
        """Return a prompt of tokens only."""
        return cls({"prompt_token_ids": token_ids}, token_ids)


def engine_prompt(request: EngineRequest, engine: Any, tokenizer: Any) -> EnginePrompt:
    """Return a request's prompt; conversations are put together by vLLM's own renderer.

    Raises:
        RequestError: for text without a tokenizer.
    """
    if request.prompt_token_ids is not None:
        return EnginePrompt.of_tokens(list(request.prompt_token_ids))
    if request.prompt is None and request.messages is None:
        raise RequestError("the request has neither token ids, nor text, nor messages")
    if tokenizer is None:
        raise RequestError("the model's folder holds no tokenizer: give the prompt as token ids")
    if request.messages is not None:
        return _conversation(request, engine)
    return EnginePrompt.of_tokens(list(tokenizer.encode(request.prompt)))


def _conversation(request: EngineRequest, engine: Any) -> EnginePrompt:
    """Return the prompt of a conversation, as vLLM's chat interface makes it."""
    from vllm.renderers import ChatParams
    from vllm.tokenizers.mistral import MistralTokenizer

    renderer = engine.renderer
    options: dict[str, Any] = dict(request.chat)
    template = options.pop("chat_template", None)
    own: dict[str, Any] = dict(options.pop("chat_template_kwargs", None) or {})
    effort = options.get("reasoning_effort")
    if effort is not None and "enable_thinking" not in own:
        own["enable_thinking"] = effort != "none"
    options.setdefault("add_generation_prompt", not options.get("continue_final_message", False))
    kwargs = {**own, **options, "tokenize": isinstance(renderer.tokenizer, MistralTokenizer)}
    params = ChatParams(chat_template=template, chat_template_kwargs=kwargs)
    tokenizing = renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
    messages = [dict(m) for m in request.messages or ()]
    _, (inputs,) = renderer.render_chat([messages], params, tokenizing)
    media = inputs["type"] != "token"
    ids = list(inputs["prompt_token_ids"])
    return EnginePrompt(inputs, ids, media) if media else EnginePrompt.of_tokens(ids)


def modelled_prompt(request: EngineRequest) -> EnginePrompt:
    """Return the prompt's token ids, or any that begin like no other request's."""
    if request.prompt_token_ids is not None:
        return EnginePrompt.of_tokens(list(request.prompt_token_ids))
    first = request.request * 7919
    return EnginePrompt.of_tokens([3 + (first + i) % 31_990 for i in range(request.prompt_tokens)])
