"""The text of a request of which an earlier engine generated the first part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from samullm_plugin import EngineRequest, RequestOutput

_CONTEXT_TOKENS = 6
"""Prompt tokens that decide how the text behind them begins, as in vLLM's detokenizer."""


def whole_text(request: EngineRequest, output: RequestOutput, tokenizer: Any) -> RequestOutput:
    """Return the output with the text of all its tokens, ended at a stop string across the cut.

    The engine looks for stop strings only in what it generates itself.
    """
    ids, sampling = output.token_ids or (), request.sampling
    prompt = request.prompt_token_ids or ()
    own = len(prompt) - request.num_generated
    context, before = prompt[max(0, own - _CONTEXT_TOKENS) : own], prompt[own:]
    options = {
        name: bool(sampling.get(name, True))
        for name in ("skip_special_tokens", "spaces_between_special_tokens")
    }

    lead = len(tokenizer.decode(list(context), **options))

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode([*context, *tokens], **options))[lead:]

    def cut(count: int, part: str, at: int, string: str) -> RequestOutput:
        keep = bool(sampling.get("include_stop_str_in_output", False))
        return replace(
            output,
            num_tokens=count,
            token_ids=ids[:count],
            text=part[: at + len(string)] if keep else part[:at],
            finish_reason="stop",
            stop_reason=string,
            logprobs=None if output.logprobs is None else output.logprobs[:count],
        )

    text, old = decode((*before, *ids)), len(decode(before))
    stops = _strings(sampling.get("stop"))
    longest = max((len(s) for s in stops), default=0)
    for count in range(1, len(ids) + 1):
        part = decode((*before, *ids[:count])) if longest else ""
        found = [(at, s) for s in stops if (at := part.find(s, max(0, old - len(s) + 1))) >= 0]
        if found:
            return cut(count, part, *min(found))
        if len(part) - old >= longest:
            break  # from here on the engine's own search sees all of a stop string
    if isinstance(output.stop_reason, str) and (at := text.find(output.stop_reason, old)) >= 0:
        return cut(len(ids), text, at, output.stop_reason)
    return replace(output, text=text)


def _strings(stop: object) -> list[str]:
    """Return the stop strings of a parameter that may be one, several or None."""
    if isinstance(stop, str):
        return [stop]
    return [str(s) for s in stop] if isinstance(stop, Sequence) else []
