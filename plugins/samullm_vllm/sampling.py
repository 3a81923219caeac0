"""From requests to vLLM's prompts and sampling parameters, and from its outputs back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samullm_plugin import EngineRequest, RequestOutput
from samullm_vllm.resumed_text import whole_text
from samullm_vllm.tracking import Tracked, plain_logprobs

EOS_TOKEN = 2
"""What an engine that models computing ends a request with."""


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
    if request.output_tokens is not None:
        given["ignore_eos"] = True
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
        return whole_text(request, result, tokenizer)
    return result
