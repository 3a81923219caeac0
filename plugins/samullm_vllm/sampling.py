"""From requests to vLLM's prompts and sampling parameters, and from its outputs back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from samullm_plugin import EngineRequest, RequestOutput
from samullm_vllm.tracking import Tracked, plain_logprobs

EOS_TOKEN = 2
"""What an engine that models computing ends a request with."""

_CONTEXT_TOKENS = 6
"""Prompt tokens that decide how the text behind them begins, as in vLLM's detokenizer."""


class RequestError(Exception):
    """A request cannot be run; the message says why."""


def prompt_ids(request: EngineRequest, tokenizer: Any) -> list[int]:
    """Return a request's prompt as token ids.

    Raises:
        RequestError: for text without a tokenizer.
    """
    if request.prompt_token_ids is not None:
        return list(request.prompt_token_ids)
    if request.prompt is None and request.messages is None:
        raise RequestError("the request has neither token ids, nor text, nor messages")
    if tokenizer is None:
        raise RequestError("the model's folder holds no tokenizer: give the prompt as token ids")
    if request.messages is not None:
        return list(
            tokenizer.apply_chat_template(
                [dict(m) for m in request.messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        )
    return list(tokenizer.encode(request.prompt))


def modelled_prompt(request: EngineRequest) -> list[int]:
    """Return the prompt's token ids, or any that begin like no other request's."""
    if request.prompt_token_ids is not None:
        return list(request.prompt_token_ids)
    first = request.request * 7919
    return [3 + (first + i) % 31_990 for i in range(request.prompt_tokens)]


def modelled_params(request: EngineRequest) -> Any:
    """Return sampling parameters for an engine that models computing: it knows when to end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=request.max_tokens,
        stop_token_ids=[EOS_TOKEN],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"samullm_output_tokens": request.output_tokens or request.max_tokens + 1},
    )


def sampling_params(request: EngineRequest, tokenizer: Any) -> Any:
    """Return vLLM's sampling parameters of a request.

    Args:
        request: the request.
        tokenizer: None if the engine has none.

    Raises:
        RequestError: for parameters vLLM refuses or that have no meaning here.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    given: dict[str, Any] = dict(request.sampling)
    if given.pop("n", 1) != 1:
        raise RequestError("n must be 1: write the request several times instead")
    for name in ("max_tokens", "output_kind", "stream_interval"):
        given.pop(name, None)
    if request.num_generated:
        given.pop("truncate_prompt_tokens", None)
        given["min_tokens"] = max(0, int(given.get("min_tokens") or 0) - request.num_generated)
    structured = given.pop("structured_outputs", None)
    if isinstance(structured, Mapping):
        given["structured_outputs"] = StructuredOutputsParams(**structured)
    given["detokenize"] = tokenizer is not None and given.get("detokenize", True)
    try:
        return SamplingParams(
            **given,
            max_tokens=request.max_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except (TypeError, ValueError) as error:
        raise RequestError(f"sampling parameters: {error}") from error


def request_output(tracked: Tracked, output: Any, tokenizer: Any) -> RequestOutput:
    """Return what came of a finished request.

    Args:
        tracked: the request.
        output: vLLM's ``RequestOutput``.
        tokenizer: None if the engine has none.
    """
    completion, request = output.outputs[0], tracked.request
    reason = completion.finish_reason
    result = RequestOutput(
        request.request,
        len(completion.token_ids),
        tuple(completion.token_ids),
        completion.text if tokenizer is not None else None,
        reason if reason in ("stop", "length") else "error",
        None if reason in ("stop", "length") else f"the engine ended it: {reason}",
        tracked.prompt_token_ids,
        completion.stop_reason,
        plain_logprobs(completion.logprobs),
    )
    if request.num_generated and tokenizer is not None:
        return _whole_text(request, result, tokenizer)
    return result


def _whole_text(request: EngineRequest, output: RequestOutput, tokenizer: Any) -> RequestOutput:
    """Return the output with the text of all its tokens, ended at a stop string across the cut.

    The engine looks for stop strings only in what it generates itself.
    """
    ids, sampling = output.token_ids or (), request.sampling
    prompt = request.prompt_token_ids or ()
    cut = len(prompt) - request.num_generated
    context, before = prompt[max(0, cut - _CONTEXT_TOKENS) : cut], prompt[cut:]
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
