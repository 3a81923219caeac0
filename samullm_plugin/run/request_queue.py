"""Requests on their way to the engines and back: admitted, queued, taken back, settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from msgspec import structs

from samullm_plugin.app.calling import Returned
from samullm_plugin.app.requestlines import estimate_tokens
from samullm_plugin.app.templates import text_of
from samullm_plugin.host.interfaces.executor import EngineRequest, RequestOutput
from samullm_plugin.model.requests import NodePart
from samullm_plugin.run.asked import Asked, engine_request
from samullm_plugin.run.ledger import Ledger, Status, is_call
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.prompts import A_PROMPT, Given, Prepared, Prompt, PromptBuilder, Refused
from samullm_plugin.run.python_calls import Call, ImitatedCalls
from samullm_plugin.run.results import RequestId, Result, fields_of
from samullm_plugin.run.reuse import Reuse
from samullm_plugin.run.user_nodes import UserNodes

WAITING, READY, SUBMITTED, FINISHED, SKIPPED, FAILED = map(int, Status)
"""As plain numbers: a look-up in an enumeration takes a microsecond, and there are many."""

_NAMES = {int(s): s.name.lower() for s in Status}


class RequestQueue:
    """Keeps the ledger, and the requests that can be served.

    Attributes:
        ledger: what has become of every request.
        changed: a node has been settled since this was last set to False.
        calls: the calls of Python nodes, and those that check outputs.
    """

    def __init__(
        self,
        ledger: Ledger,
        source: PromptBuilder,
        log: RunLog,
        moved: Mapping[RequestId, RequestOutput],
        reuse: Reuse | None = None,
        rejected: Mapping[RequestId, int] | None = None,
    ) -> None:
        """Begin with nothing admitted.

        Args:
            ledger: may hold settled requests already.
            source: makes prompts.
            log: where events are recorded.
            moved: tokens that unfinished requests generated before the run was interrupted.
            reuse: outputs of earlier runs; None: everything is asked.
            rejected: how often outputs were rejected before the run was interrupted.
        """
        self.ledger, self.changed = ledger, False
        self._source, self._log, self._asked = source, log, Asked(moved)
        self._reuse = reuse
        self._finds = reuse is not None and reuse.hopeful
        self._keys: dict[RequestId, bytes] = {}
        self._users = UserNodes(ledger.app)
        self._left = {
            name: int((ledger.status[i][part.rows] < FINISHED).sum())
            for name, i, part in self._users
        }
        self.calls = source.call_runner()
        self._rejected = dict(rejected or {})
        self._checked: dict[RequestId, Result] = {}
        self._queue: list[list[int]] = [[] for _ in ledger.app.nodes]
        if log.journal is not None:
            ledger.results.read = log.journal.read
            log.written = ledger.results.written

    def queued(self, node: int) -> list[int]:
        """Return the requests of a node that could be served but are at no engine."""
        return self._queue[node]

    def take_queue(self, node: int) -> list[int]:
        """Empty a node's queue and return its requests in the order of the table."""
        taken = sorted(self._queue[node])
        self._queue[node].clear()
        return taken

    def take_given(self, node: int, now_s: float) -> list[EngineRequest]:
        """Empty a node's queue; return its requests as engines get them, but those that fail."""
        made = (self.given(node, r, now_s) for r in self.take_queue(node))
        return [m for m in made if m is not None]

    def put_back(self, node: int, requests: Iterable[int]) -> None:
        """Queue requests again that were taken from the queue but not given to an engine."""
        self._queue[node] += requests

    def given(self, node: int, r: int, now_s: float, priority: int = 0) -> EngineRequest | None:
        """Return a request as an engine is to get it, which is when its prompt is made.

        Returns:
            None if it cannot be asked: it has failed then.
        """
        request = node, r
        states = self.ledger.states[node]
        if states[r] != READY:
            return None  # its node was given up in the meantime
        made = self._asked.find(request, priority)
        if made is None:
            prompt = self._source.prepare(request, self.ledger)
            if not isinstance(prompt, Prompt):
                reason = prompt.reason if isinstance(prompt, Refused) else "it has no prompt"
                self.fail(request, reason, now_s)
                return None
            if self._reuse is not None:
                self._keys[request] = self._reuse.key(request, engine_request(r, prompt))
            if self._rejected and (attempt := self._rejected.get(request)):
                prompt = self._source.again(request, prompt, attempt) or prompt
            made = self._asked.make(request, prompt, priority)
            self.ledger.generated[node][r] = made.num_generated
        states[r] = SUBMITTED
        return made

    def rejected(self, node: int, part: NodePart) -> int:
        """Return how many outputs of one of the user's nodes have been rejected."""
        return sum(
            count
            for (i, r), count in self._rejected.items()
            if i == node and part.start <= r < part.stop
        )

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
            states = self.ledger.states[node]
            if states[r] != WAITING:
                continue
            decision = self._decide(request)
            if decision is A_PROMPT and not self._finds:  # mostly
                self._make_ready(request)
                continue
            found = None
            if self._finds and isinstance(decision, Prompt):
                decision = self._source.prepare(request, self.ledger)
                if isinstance(decision, Prompt):
                    found = self._answered(request, decision)
            if isinstance(decision, Prompt):
                judgement = found and self._source.judge(request, found, self.ledger)
                if found is not None and isinstance(judgement, Call):
                    states[r] = SUBMITTED
                    self._checked[request] = found
                    self.calls.submit(request, judgement, now_s)
                    continue
                if found is not None and judgement is None:
                    waiting.extend(self._note(request, FINISHED, now_s, found, reused=True))
                    continue
                self._make_ready(request)
            elif isinstance(decision, Call):
                states[r] = SUBMITTED
                self.calls.submit(request, decision, now_s)
            elif isinstance(decision, Given):
                result = Result(decision.num_tokens, finish_reason="stop", value=decision.value)
                waiting.extend(self._note(request, FINISHED, now_s, result))
            elif decision is None:
                waiting.extend(self._note(request, SKIPPED, now_s, Result()))
            else:
                result = Result(finish_reason="error", error=decision.reason)
                waiting.extend(self._note(request, FAILED, now_s, result))

    def _make_ready(self, request: RequestId) -> None:
        """Queue a request."""
        node, r = request
        if self._keys:
            self._keys.pop(request, None)
        self.ledger.states[node][r] = READY
        if (num_tokens := self._asked.moved_tokens(request)) is not None:
            self.ledger.generated[node][r] = num_tokens
        self._queue[node].append(r)

    def _answered(self, request: RequestId, prompt: Prompt) -> Result | None:
        """Return the output of an equal request of an earlier run."""
        if self._reuse is None:
            return None
        self._keys[request] = self._reuse.key(request, engine_request(request[1], prompt))
        return self._reuse.find(request, self._keys[request])

    def _decide(self, request: RequestId) -> Prepared:
        node, num_models = request[0], len(self._queue)
        if self._users.repeats(request):
            before = self.ledger.inputs(request)[-1]
            if self.ledger.status[before[0]][before[1]] != FINISHED:
                return None
        if node < num_models and self.ledger.inputs_finished(request):
            return self._source.decide(request, self.ledger)
        inputs = self.ledger.inputs(request)
        python = self.ledger.app.python[node - num_models] if node >= num_models else None
        if python is not None and request[1] >= python.num_calls:
            call = inputs[-1]
            if self.ledger.status[call[0]][call[1]] == FAILED:
                return None  # reported once, by the call
        if inputs and not (python is not None and python.at_once and request[1] == 0):
            status = self.ledger.status
            states = [int(status[i][q]) for i, q in inputs]
            if FAILED in states:
                failed = inputs[states.index(FAILED)]
                where, index = self._users.written(failed)
                name = self._source.custom_id(where, index)
                return Refused(f"its input {name} of node {where} failed")
            if states.count(SKIPPED) == len(states) or self.ledger.lacks(request):
                return None
        return self._source.decide(request, self.ledger)

    def finish(self, request: RequestId, output: RequestOutput, time_s: float) -> None:
        """Settle a request that an engine has finished."""
        if self.ledger.states[request[0]][request[1]] >= FINISHED:
            return  # its node was given up in the meantime
        if output.finish_reason == "error":
            self.fail(request, output.error or "the engine reported an error", time_s)
            return
        whole = self._asked.whole(request, output)
        text, numbers = output.text, output.numbers
        value = None if numbers is None else self._source.pooled(request, numbers)
        if text is None and numbers is None:
            made = self._source.stand_in(request, whole.num_tokens, self.ledger)
            text, value = (None, None) if made is None else (made.text, made.value)
        result = Result(
            whole.num_tokens,
            whole.prompt_tokens,
            output.finish_reason,
            text,
            whole.token_ids,
            stop_reason=output.stop_reason,
            logprobs=whole.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            value=value,
        )
        judgement = self._source.judge(request, result, self.ledger)
        if isinstance(judgement, Call):
            self._checked[request] = result
            self.calls.submit(request, judgement, time_s)
        elif judgement is not None:
            self._reject(request, result, judgement, time_s)
        elif complete := self._note(request, FINISHED, time_s, result):
            self._admit(complete, time_s)

    def _reject(self, request: RequestId, result: Result, reason: str, time_s: float) -> None:
        """Ask a request again whose output will not do, or give it up."""
        attempt = self._rejected[request] = self._rejected.get(request, 0) + 1
        if self._source.again(request, A_PROMPT, attempt) is None:
            tries = f" ({attempt} times)" if attempt > 1 else ""
            why = f"rejected{tries}: {reason}"
            failed = structs.replace(result, finish_reason="error", error=why)
            self._admit(self._note(request, FAILED, time_s, failed), time_s)
            return
        name, index = self._users.written(request)
        self._log.add(
            time_s, "rejected", node=name, request=index, attempt=attempt, reason=reason,
            num_tokens=result.num_tokens, text=result.text,
        )  # fmt: skip
        self._asked.forget(request)  # it is made anew, for this attempt
        self.ledger.generated[request[0]][request[1]] = 0
        self.ledger.status[request[0]][request[1]] = READY
        self._queue[request[0]].append(request[1])

    def end_calls(self, now_s: float) -> None:
        """Settle requests whose calls have ended."""
        for end in self.calls.take(now_s):
            returned, request = end.returned, end.request
            time_s = now_s if end.time_s is None else end.time_s
            if self.ledger.status[request[0]][request[1]] >= FINISHED:
                continue  # its node was given up in the meantime
            checked = self._checked.pop(request, None)
            if checked is not None and returned.kind == "rejected":
                self._reject(request, checked, returned.reason, time_s)
                continue
            if returned.kind in ("failed", "rejected"):
                rejected = "rejected: " if returned.kind == "rejected" else ""
                text = f"{rejected}{returned.reason}"
                failed = checked or Result()
                result = structs.replace(failed, finish_reason="error", error=text)
                self._admit(self._note(request, FAILED, time_s, result), time_s)
                continue
            if returned.kind == "dropped" and checked is None:
                self._admit(self._note(request, SKIPPED, time_s, Result()), time_s)
                continue
            if checked is not None:
                result = structs.replace(checked, value=returned.value)
            else:
                result = self._called(request, returned)
            self._admit(self._note(request, FINISHED, time_s, result), time_s)

    def _called(self, request: RequestId, returned: Returned) -> Result:
        """Return the result of a call; in imitations its value is a number of tokens."""
        if isinstance(self.calls, ImitatedCalls):
            num_tokens = int(returned.value)
            made = None
            if not is_call(self.ledger.app, request):  # its rows have what it gave
                made = self._source.stand_in(request, num_tokens, self.ledger)
            return made or Result(num_tokens, finish_reason="stop")
        tokens = estimate_tokens(text_of(returned.value))
        return Result(tokens, finish_reason="stop", value=returned.value, seconds=returned.seconds)

    def fail(self, request: RequestId, reason: str, time_s: float) -> None:
        """Settle a request that cannot be served; so are those that wait for it."""
        result = Result(finish_reason="error", error=reason)
        self._admit(self._note(request, FAILED, time_s, result), time_s)

    def fail_node(self, node: int, reason: str, time_s: float) -> None:
        """Settle every request of a node that is not settled as failed."""
        self._queue[node].clear()
        complete: list[RequestId] = []
        result = Result(finish_reason="error", error=reason)
        for r in np.flatnonzero(self.ledger.status[node] < FINISHED).tolist():
            complete += self._note((node, r), FAILED, time_s, result)
        self._admit(complete, time_s)

    def _keeps_ids(self, result: Result) -> bool:
        """Return whether an output's tokens are needed beside its text."""
        return not result.text or result.logprobs is not None or self._source.with_token_ids

    def take_back(
        self, node: int, given: EngineRequest, output: RequestOutput, now_s: float
    ) -> None:
        """Keep what a stopped engine had generated; the request goes on elsewhere."""
        if output.finish_reason is not None:
            self.finish((node, output.request), output, now_s)
            return
        num_tokens, fields = self._asked.cut((node, output.request), given, output)
        if fields is not None:
            name, index = self._users.written((node, output.request))
            self._log.add(now_s, "moved", node=name, request=index, **fields)
        self.ledger.generated[node][output.request] = num_tokens
        self.ledger.status[node][output.request] = READY
        self._queue[node].append(output.request)

    def _note(
        self,
        request: RequestId,
        status: int,
        time_s: float,
        result: Result,
        *,
        reused: bool = False,
    ) -> list[RequestId]:
        """Write a settled request down; return the requests that have all their inputs now."""
        if self._users.repeats(request):
            return self._settle(request, status, time_s, result)
        name, index = self._users.written(request)
        fields: dict[str, Any] = {
            "time_s": time_s, "kind": _NAMES[status], "node": name, "request": index
        }  # fmt: skip
        if status == FINISHED:
            valued = not is_call(self.ledger.app, request)
            fields |= fields_of(result, ids=self._keeps_ids(result), value=valued)
            key = self._keys.pop(request, None) if self._keys else None
            if self._reuse is not None and key is not None:
                if reused:
                    fields["reused"] = True
                else:
                    self._reuse.keep(request, key, fields)
                    self._finds = True
                fields["key"] = key.hex()
        elif status == FAILED:
            fields["error"] = result.error
            self._keys.pop(request, None)
            if result.text is not None:
                fields["text"] = result.text
        self._log.add_settled(request, fields)
        complete = self._settle(request, status, time_s, result)
        self._left[name] -= 1
        if not self._left[name]:
            self._log.add(time_s, "node_finished", node=name)
        return complete

    def _settle(
        self, request: RequestId, status: int, time_s: float, result: Result
    ) -> list[RequestId]:
        """Settle a request in the ledger alone: planned repetitions are in no journal."""
        self._asked.forget(request)
        complete = self.ledger.settle(request, status, time_s, result)
        if self.ledger.settled(request[0]):
            self.changed = True
        return complete
