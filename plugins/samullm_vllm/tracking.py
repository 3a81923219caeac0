"""What an engine's requests have generated, read from the engine itself.

vLLM hands out the tokens of an unfinished request only by building an output object per request and
step. This module reads them where they are kept instead (``vllm/v1/engine/output_processor.py``),
which costs nothing while the engine computes. All knowledge of that place is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from samullm_plugin import EngineRequest, RequestOutput
from samullm_plugin.model.logprobs import PositionLogprobs, TokenLogprob


@dataclass(slots=True)
class Tracked:
    """A request an engine has.

    Attributes:
        request: as it was submitted.
        prompt_token_ids: its prompt, if the engine tokenised it.
        media: it holds more than tokens, and can be begun again only.
        reported: tokens reported so far.
    """

    request: EngineRequest
    prompt_token_ids: tuple[int, ...] | None
    media: bool = False
    reported: int = 0


def unfinished_tokens(engine: Any) -> Iterator[tuple[int, list[int]]]:
    """Yield the requests an engine has and the tokens each has generated."""
    for state in engine.output_processor.request_states.values():
        if state.detokenizer is None:
            continue  # a pooling request
        yield int(state.external_req_id), state.detokenizer.output_token_ids


def unfinished_outputs(engine: Any, tracked: Mapping[int, Tracked]) -> list[RequestOutput]:
    """Return the unfinished requests with everything they have generated."""
    outputs = []
    for state in engine.output_processor.request_states.values():
        request = int(state.external_req_id)
        if state.detokenizer is None:  # a pooling request: all of it or nothing
            outputs.append(RequestOutput(request, 0, ()))
            continue
        ids, entry = tuple(state.detokenizer.output_token_ids), tracked[request]
        outputs.append(
            RequestOutput(
                request,
                len(ids),
                ids,
                prompt_token_ids=None if entry.media else entry.prompt_token_ids,
                logprobs=plain_logprobs(state.logprobs_processor.logprobs),
            )
        )
    return outputs


def new_tokens(engine: Any, tracked: Mapping[int, Tracked]) -> tuple[list[int], list[int], bytes]:
    """Return what was generated since the last call: requests, how many tokens each, and them."""
    requests: list[int] = []
    counts: list[int] = []
    tokens: list[int] = []
    for request, ids in unfinished_tokens(engine):
        entry = tracked[request]
        if len(ids) > entry.reported:
            requests.append(request)
            counts.append(len(ids) - entry.reported)
            tokens += ids[entry.reported :]
            entry.reported = len(ids)
    return requests, counts, np.asarray(tokens, dtype=np.int32).tobytes()


def plain_logprobs(logprobs: Any) -> tuple[PositionLogprobs, ...] | None:
    """Return vLLM's log probabilities as plain numbers."""
    return None if logprobs is None else tuple(_position(p) for p in logprobs)


def plain_prompt_logprobs(logprobs: Any) -> tuple[PositionLogprobs | None, ...] | None:
    """Return vLLM's log probabilities of a prompt as plain numbers; the first token has none."""
    if logprobs is None:
        return None
    return tuple(None if p is None else _position(p) for p in logprobs)


def _position(position: Any) -> PositionLogprobs:
    return tuple(
        TokenLogprob(int(k), float(v.logprob), v.rank, v.decoded_token) for k, v in position.items()
    )
