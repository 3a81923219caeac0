"""Requests as engines have them, one engine after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from samullm_plugin.host.interfaces.executor import EngineRequest, RequestOutput
from samullm_plugin.host.interfaces.moving import continued
from samullm_plugin.model.logprobs import PositionLogprobs
from samullm_plugin.run.prompts import Prompt
from samullm_plugin.run.results import RequestId


class Whole(NamedTuple):
    """What all engines together generated for a request.

    Attributes:
        num_tokens: tokens generated.
        prompt_tokens: tokens of the prompt as the user wrote it.
        token_ids: the tokens, if the engines gave them.
        logprobs: of the tokens, if asked for.
    """

    num_tokens: int
    prompt_tokens: int
    token_ids: tuple[int, ...] | None
    logprobs: tuple[PositionLogprobs, ...] | None


class Asked:
    """Keeps requests from when engines get them until they are settled.

    What one engine had generated is part of the prompt for the next one; here a request is
    continued, and its parts are put together again.
    """

    def __init__(self, moved: Mapping[RequestId, RequestOutput]) -> None:
        """Begin with no request at an engine.

        Args:
            moved: what unfinished requests generated before the run was interrupted.
        """
        self._moved = dict(moved)
        self._requests: dict[RequestId, EngineRequest] = {}
        self._logprobs: dict[RequestId, tuple[PositionLogprobs, ...]] = {}

    def moved_tokens(self, request: RequestId) -> int | None:
        """Return what a request not yet made again had generated before an interruption."""
        if not self._moved or request not in self._moved:
            return None
        return self._moved[request].num_tokens

    def find(self, request: RequestId, priority: int) -> EngineRequest | None:
        """Return a request that was made before, of this priority now."""
        made = self._requests.get(request)
        if made is not None and made.priority != priority:
            made = self._requests[request] = replace(made, priority=priority)
        return made

    def make(self, request: RequestId, prompt: Prompt, priority: int) -> EngineRequest:
        """Make a request, with what it generated before the run was interrupted."""
        made = engine_request(request[1], prompt, priority)
        if self._moved and request in self._moved:
            moved = self._moved.pop(request)
            made = continued(made, moved)
            if made.num_generated and moved.logprobs is not None:
                self._logprobs[request] = moved.logprobs
        self._requests[request] = made
        return made

    def whole(self, request: RequestId, output: RequestOutput) -> Whole:
        """Return what was generated for a request that its last engine has finished."""
        given = self._requests[request]
        before = given.num_generated
        ids, logprobs = output.token_ids, output.logprobs
        if before and logprobs is not None:
            logprobs = (*self._logprobs.get(request, ()), *logprobs)
        if ids is not None and before and given.prompt_token_ids is not None:
            ids = (*given.prompt_token_ids[-before:], *ids)
        if output.prompt_token_ids is not None and not before:
            prompt_tokens = len(output.prompt_token_ids)
        else:
            prompt_tokens = given.prompt_tokens - before
        return Whole(before + output.num_tokens, prompt_tokens, ids, logprobs)

    def cut(
        self, request: RequestId, given: EngineRequest, output: RequestOutput
    ) -> tuple[int, dict[str, Any] | None]:
        """Keep what an engine had generated when it was stopped.

        Returns:
            The tokens that the request goes on from, and what the journal needs to know of them;
            None if that is nothing new.
        """
        after = continued(given, output)
        fields: dict[str, Any] | None = None
        if after is not given:
            if output.logprobs is not None:
                self._logprobs[request] = (*self._logprobs.get(request, ()), *output.logprobs)
            fields = {"num_tokens": after.num_generated, "token_ids": _generated_ids(after)}
            if given.prompt_token_ids is None and output.prompt_token_ids is not None:
                fields["prompt_token_ids"] = output.prompt_token_ids
            if request in self._logprobs:
                fields["logprobs"] = self._logprobs[request]
        if after.num_generated:
            self._requests[request] = after
        else:  # it is made anew when its turn comes
            self.forget(request)
        return after.num_generated, fields

    def forget(self, request: RequestId) -> None:
        """Keep nothing of a request: it is settled, or made anew."""
        self._requests.pop(request, None)
        if self._logprobs:
            self._logprobs.pop(request, None)


def engine_request(request: int, prompt: Prompt, priority: int = 0) -> EngineRequest:
    """Return a request as engines get it."""
    return EngineRequest(
        request,
        prompt.token_ids,
        prompt.prompt_tokens,
        prompt.max_tokens,
        priority,
        prompt.sampling,
        prompt.text,
        prompt.messages,
        0,
        prompt.output_tokens,
        prompt.chat,
        prompt.task,
        prompt.pair,
        prompt.lora,
    )


def _generated_ids(request: EngineRequest) -> tuple[int, ...] | None:
    if request.prompt_token_ids is None or not request.num_generated:
        return None
    return request.prompt_token_ids[-request.num_generated :]
