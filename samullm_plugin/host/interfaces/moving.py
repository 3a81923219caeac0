"""Moving an unfinished request to another engine: what can be carried over and how.

A request that is stopped goes on elsewhere with everything generated so far appended to its prompt.
The new engine takes those tokens for prompt, which is right for most sampling parameters and wrong
for those that look at a request's own output. :func:`move_rule` says which is which, and
:func:`continued` makes the request for the new engine.

The names are those of ``vllm/sampling_params.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from samullm_plugin.host.interfaces.executor import EngineRequest, RequestOutput

MoveRule = Literal["carry", "restart", "bar"]

CARRIED = frozenset(
    {
        "allowed_token_ids",
        "detokenize",
        "flat_logprobs",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "logprob_token_ids",
        "logprobs",  # of the tokens generated before; reported when the engine is stopped
        "max_tokens",
        "min_p",
        "min_tokens",  # lowered by what was generated
        "n",
        "output_kind",
        "repetition_penalty",  # looks at prompt and output alike
        "seed",  # with random sampling it restarts, see below
        "skip_reading_prefix_cache",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",  # looked for across the cut when the request ends
        "stop_token_ids",
        "stream_interval",
        "temperature",
        "top_k",
        "top_p",
        "truncate_prompt_tokens",
    }
)
"""Parameters with which a request can go on elsewhere."""

RESTARTED = frozenset(
    {
        "bad_words",  # a sequence of tokens may lie across the cut
        "frequency_penalty",  # looks at the output only
        "guided_decoding",  # the grammar's state is lost
        "presence_penalty",  # looks at the output only
        "prompt_logprob_start",
        "prompt_logprob_token_ids",
        "prompt_logprobs",  # the prompt is another one
        "repetition_detection",  # looks at the output only
        "response_format",
        "structured_outputs",
        "thinking_token_budget",  # counts the output only
    }
)
"""Parameters with which a request begins again from its prompt, if they are set."""

_NEUTRAL: Mapping[str, object] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "min_tokens": 0,
}


def move_rule(sampling: Mapping[str, object]) -> MoveRule:
    """Return what happens to a request with these sampling parameters when its engine is stopped.

    ``carry``: it goes on with what it has generated. ``restart``: it begins again from its prompt.
    ``bar``: its engine must not be stopped before it has finished, because parameters this table
    does not know (custom logits processors, cache transfers) may have effects outside the request.
    """
    given = {k: v for k, v in sampling.items() if v is not None and v != _NEUTRAL.get(k, ())}
    given = {k: v for k, v in given.items() if v not in ([], {}, ())}
    if given.keys() - CARRIED - RESTARTED:
        return "bar"
    if given.keys() & RESTARTED:
        return "restart"
    random = sampling.get("temperature", 1.0) != 0
    if random and "seed" in given:
        return "restart"  # the random numbers drawn so far cannot be drawn again from here
    if "stop" in given and "min_tokens" in given:
        return "restart"  # where the search for stop strings began is lost
    return "carry"


def continued(request: EngineRequest, output: RequestOutput) -> EngineRequest:
    """Return the request that finishes elsewhere what ``output`` is the beginning of.

    Args:
        request: as it was given to the engine that was stopped.
        output: what that engine's ``stop_engine`` returned for it.

    Returns:
        The same request if nothing was generated, nothing may be carried over, or its text's tokens
        are not known (an engine that died had tokenised it).
    """
    if output.num_tokens == 0 or move_rule(request.sampling) != "carry":
        return request
    if request.sampling.get("logprobs") is not None and output.logprobs is None:
        return request  # those of an engine that died are lost
    prompt = output.prompt_token_ids or request.prompt_token_ids
    textual = request.prompt is not None or request.messages is not None
    if (prompt is None and textual) or (prompt is not None and output.token_ids is None):
        return request
    left = request.output_tokens
    return replace(
        request,
        prompt_token_ids=None if prompt is None else (*prompt, *(output.token_ids or ())),
        prompt_tokens=(len(prompt) if prompt is not None else request.prompt_tokens)
        + output.num_tokens,
        max_tokens=request.max_tokens - output.num_tokens,
        prompt=None,
        messages=None,
        num_generated=request.num_generated + output.num_tokens,
        output_tokens=None if left is None else left - output.num_tokens,
    )
