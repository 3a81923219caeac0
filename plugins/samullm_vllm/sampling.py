"""From requests to vLLM's sampling parameters, and from its outputs back.

The text of a request may have begun in an earlier engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from samullm_plugin import EngineRequest, RequestOutput
from samullm_vllm.prompts import RequestError
from samullm_vllm.tracking import Tracked, plain_logprobs, plain_prompt_logprobs

EOS_TOKEN = 2
"""What an engine that models computing ends a request with."""


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
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        StructuredOutputsParams,
    )

    given: dict[str, Any] = dict(request.sampling)
    given.pop("max_tokens", None)  # what is left of it comes with the request
    if request.output_tokens is not None:
        given["ignore_eos"] = True
    if request.num_generated:
        given["min_tokens"] = max(0, int(given.get("min_tokens") or 0) - request.num_generated)
    given["detokenize"] = tokenizer is not None and given.get("detokenize", True)
    if (bias := given.get("logit_bias")) is not None:
        given["logit_bias"] = {int(t): min(100.0, max(-100.0, b)) for t, b in bias.items()}
    made = {
        "structured_outputs": StructuredOutputsParams,
        "repetition_detection": RepetitionDetectionParams,
    }
    try:
        for name, kind in made.items():
            if isinstance(given.get(name), Mapping):
                given[name] = kind(**given[name])
        return SamplingParams(
            **given,
            max_tokens=request.output_tokens or request.max_tokens,
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
    if request.output_tokens is not None and request.output_tokens < request.max_tokens:
        reason = "stop"  # where its own end was to be
    detokenizes = tokenizer is not None and request.sampling.get("detokenize") is not False
    result = RequestOutput(
        request.request,
        len(completion.token_ids),
        tuple(completion.token_ids),
        completion.text if detokenizes else None,
        reason if reason in ("stop", "length") else "error",
        None if reason in ("stop", "length") else f"the engine ended it: {reason}",
        tracked.prompt_token_ids,
        completion.stop_reason,
        plain_logprobs(completion.logprobs),
        plain_prompt_logprobs(output.prompt_logprobs),
    )
    if request.num_generated and detokenizes:
        return whole_text(request, result, tokenizer)
    return result


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
