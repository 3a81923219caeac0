"""Requests on their way to the engines and back: admitted, queued, taken back, settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np

from samullm_plugin.host.interfaces.executor import EngineRequest, RequestOutput
from samullm_plugin.host.interfaces.moving import continued
from samullm_plugin.model.logprobs import PositionLogprobs
from samullm_plugin.run.ledger import Ledger, RequestId, Result, Status
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.prompts import Prompt, PromptBuilder, Refused
from samullm_plugin.run.reuse import Reuse
from samullm_plugin.run.user_nodes import UserNodes


class RequestQueue:
    """Keeps the ledger, and the requests that can be served.

    Attributes:
        ledger: what has become of every request.
        changed: a node has been settled since this was last set to False.
    """

    def __init__(
        self,
        ledger: Ledger,
        source: PromptBuilder,
        log: RunLog,
        moved: Mapping[RequestId, RequestOutput],
        reuse: Reuse | None = None,
    ) -> None:
        """Begin with nothing admitted.

        Args:
            ledger: may hold settled requests already.
            source: makes prompts.
            log: is told.
            moved: tokens that unfinished requests generated before the run was interrupted.
            reuse: outputs of earlier runs; None: everything is asked.
        """
        self.ledger, self.changed = ledger, False
        self._source, self._log, self._moved = source, log, moved
        self._reuse = reuse
        self._keys: dict[RequestId, bytes] = {}
        self._users = UserNodes(ledger.app)
        self._left = {
            name: int((ledger.status[i][part.rows] < Status.FINISHED).sum())
            for name, i, part in self._users
        }
        self._requests: dict[RequestId, EngineRequest] = {}
        self._logprobs: dict[RequestId, tuple[PositionLogprobs, ...]] = {}
        self._queue: list[list[int]] = [[] for _ in ledger.app.nodes]

    def queued(self, node: int) -> list[int]:
        """Return the requests of a node that could be served but are at no engine."""
        return self._queue[node]

    def take_queue(self, node: int) -> list[EngineRequest]:
        """Empty a node's queue and return its requests in the order of the table."""
        taken = sorted(self._queue[node])
        self._queue[node].clear()
        self.ledger.status[node][taken] = Status.SUBMITTED
        return [self._requests[node, r] for r in taken]

    def unqueue(self, node: int, request: int) -> None:
        """Take one request out of its node's queue."""
        self._queue[node].remove(request)

    def admit_first(self, now_s: float) -> None:
        """Admit the requests that wait for nothing."""
        self._admit(self.ledger.first(), now_s)

    def _admit(self, complete: Iterable[RequestId], now_s: float) -> None:
        """Decide what becomes of requests whose inputs are all settled."""
        waiting = deque(complete)
        while waiting:
            request = waiting.popleft()
            node, r = request
            if self.ledger.status[node][r] != Status.WAITING:
                continue
            decision = self._decide(request)
            if isinstance(decision, Prompt):
                if (found := self._answered(request, decision)) is not None:
                    waiting.extend(self._note(request, Status.FINISHED, now_s, found, reused=True))
                    continue
                self.ledger.status[node][r] = Status.READY
                self._requests[request] = self._taken_up(request, decision)
                self._queue[node].append(r)
            elif decision is None:
                waiting.extend(self._note(request, Status.SKIPPED, now_s, Result()))
            else:
                result = Result(finish_reason="error", error=decision.reason)
                waiting.extend(self._note(request, Status.FAILED, now_s, result))

    def _answered(self, request: RequestId, prompt: Prompt) -> Result | None:
        """Return the output of an equal request of an earlier run."""
        if self._reuse is None:
            return None
        self._keys[request] = self._reuse.key(request, self.engine_request(request[1], prompt))
        return self._reuse.find(request, self._keys[request])

    def _decide(self, request: RequestId) -> Prompt | Refused | None:
        inputs = self.ledger.inputs(request)
        if inputs:
            states = [self.ledger.status[i][q] for i, q in inputs]
            if Status.FAILED in states:
                failed = inputs[states.index(Status.FAILED)]
                node, index = self._users.written(failed)
                name = self._source.custom_id(node, index)
                return Refused(f"its input {name} of node {node} failed")
            if all(s == Status.SKIPPED for s in states):
                return None
        return self._source.prepare(request, self.ledger)

    @staticmethod
    def engine_request(request: int, prompt: Prompt) -> EngineRequest:
        """Return a request as engines get it."""
        return EngineRequest(
            request,
            prompt.token_ids,
            prompt.prompt_tokens,
            prompt.max_tokens,
            sampling=prompt.sampling,
            prompt=prompt.text,
            messages=prompt.messages,
            chat=prompt.chat,
            output_tokens=prompt.output_tokens,
        )

    def _taken_up(self, request: RequestId, prompt: Prompt) -> EngineRequest:
        """Return a request, with what it generated before the run was interrupted."""
        made = self.engine_request(request[1], prompt)
        if request in self._moved:
            moved = self._moved[request]
            made = continued(made, moved)
            self.ledger.generated[request[0]][request[1]] = made.num_generated
            if made.num_generated and moved.logprobs is not None:
                self._logprobs[request] = moved.logprobs
        return made

    def finish(self, request: RequestId, output: RequestOutput, time_s: float) -> None:
        """Settle a request that an engine has finished."""
        if self.ledger.status[request[0]][request[1]] >= Status.FINISHED:
            return  # its node was given up in the meantime
        given = self._requests[request]
        if output.finish_reason == "error":
            self.fail(request, output.error or "the engine reported an error", time_s)
            return
        before = given.num_generated
        ids, logprobs = output.token_ids, output.logprobs
        if before and logprobs is not None:
            logprobs = (*self._logprobs.pop(request, ()), *logprobs)
        if ids is not None and before and given.prompt_token_ids is not None:
            ids = (*given.prompt_token_ids[-before:], *ids)
        if output.prompt_token_ids is not None and not before:
            prompt_tokens = len(output.prompt_token_ids)
        else:
            prompt_tokens = given.prompt_tokens - before
        result = Result(
            before + output.num_tokens,
            prompt_tokens,
            output.finish_reason,
            output.text,
            ids,
            stop_reason=output.stop_reason,
            logprobs=logprobs,
            prompt_logprobs=output.prompt_logprobs,
        )
        self._admit(self._note(request, Status.FINISHED, time_s, result), time_s)

    def fail(self, request: RequestId, reason: str, time_s: float) -> None:
        """Settle a request that cannot be served; so are those that wait for it."""
        result = Result(finish_reason="error", error=reason)
        self._admit(self._note(request, Status.FAILED, time_s, result), time_s)

    def fail_node(self, node: int, reason: str, time_s: float) -> None:
        """Settle every request of a node that is not settled as failed."""
        self._queue[node].clear()
        complete: list[RequestId] = []
        result = Result(finish_reason="error", error=reason)
        for r in np.flatnonzero(self.ledger.status[node] < Status.FINISHED).tolist():
            complete += self._note((node, r), Status.FAILED, time_s, result)
        self._admit(complete, time_s)

    def take_back(
        self, node: int, given: EngineRequest, output: RequestOutput, now_s: float
    ) -> None:
        """Keep what a stopped engine had generated; the request goes on elsewhere."""
        if output.finish_reason is not None:
            self.finish((node, output.request), output, now_s)
            return
        request = continued(given, output)
        key = node, output.request
        if request is given:
            self._logprobs.pop(key, None)
        else:
            if output.logprobs is not None:
                self._logprobs[key] = (*self._logprobs.get(key, ()), *output.logprobs)
            known = given.prompt_token_ids is not None or output.prompt_token_ids is None
            name, index = self._users.written((node, output.request))
            self._log.add(
                now_s,
                "moved",
                node=name,
                request=index,
                num_tokens=request.num_generated,
                token_ids=_generated_ids(request),
                **({} if known else {"prompt_token_ids": output.prompt_token_ids}),
                **({"logprobs": self._logprobs[key]} if key in self._logprobs else {}),
            )
        self._requests[node, output.request] = request
        self.ledger.generated[node][output.request] = request.num_generated
        self.ledger.status[node][output.request] = Status.READY
        self._queue[node].append(output.request)

    def _note(
        self,
        request: RequestId,
        status: Status,
        time_s: float,
        result: Result,
        *,
        reused: bool = False,
    ) -> list[RequestId]:
        """Write a settled request down; return the requests that have all their inputs now."""
        name, index = self._users.written(request)
        fields: dict[str, object] = {"node": name, "request": index}
        if status is Status.FINISHED:
            fields |= {
                "prompt_tokens": result.prompt_tokens,
                "num_tokens": result.num_tokens,
                "finish_reason": result.finish_reason,
                "text": result.text,
                "token_ids": result.token_ids if not result.text else None,
                "stop_reason": result.stop_reason,
                "logprobs": result.logprobs,
                "prompt_logprobs": result.prompt_logprobs,
            }
            fields = {k: v for k, v in fields.items() if v is not None}
            key = self._keys.pop(request, None)
            if self._reuse is not None and key is not None:
                if reused:
                    fields["reused"] = True
                else:
                    self._reuse.keep(request, key, fields, result)
                fields["key"] = key.hex()
        elif status is Status.FAILED:
            fields["error"] = result.error
        self._log.add(time_s, status.name.lower(), **fields)
        self._requests.pop(request, None)
        complete = self.ledger.settle(request, status, time_s, result)
        self._left[name] -= 1
        if not self._left[name]:
            self._log.add(time_s, "node_finished", node=name)
        if self.ledger.settled(request[0]):
            self.changed = True
        return complete


def _generated_ids(request: EngineRequest) -> tuple[int, ...] | None:
    if request.prompt_token_ids is None or not request.num_generated:
        return None
    return request.prompt_token_ids[-request.num_generated :]
