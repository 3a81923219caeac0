"""Outputs that are rejected: asked again from the beginning, and given up after the last try."""

from __future__ import annotations

from pathlib import Path

from samullm_plugin.host.interfaces.executor import RequestOutput
from samullm_plugin.host.interfaces.observer import RunEvent, RunInfo
from samullm_plugin.model.logprobs import TokenLogprob
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.length_prompts import LengthPrompts
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.prompts import Prompt
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.run.results import RequestId, Result
from tests.run.worlds import small_problem


class Picky(LengthPrompts):
    """Rejects outputs of one request; it is asked again twice."""

    def judge(self, request: RequestId, result: Result, ledger: Ledger) -> str | None:
        return "no number" if request == (0, 0) else None

    def again(self, request: RequestId, prompt: Prompt, attempt: int) -> Prompt | None:
        return prompt if attempt <= 2 else None


def admitted(source: type[LengthPrompts]) -> tuple[RequestQueue, RunLog, list[RunEvent]]:
    """Return a queue of a small problem's first requests, its log, and what the log tells."""
    problem = small_problem()
    log = RunLog(RunInfo("r", "a", "", Path()))
    events: list[RunEvent] = []
    log.add_listener(events.append)
    queue = RequestQueue(Ledger(problem.app), source(problem.scenarios[0]), log, {})
    queue.admit_first(0.0)
    return queue, log, events


def test_a_rejected_output_is_asked_for_again_and_given_up_in_the_end() -> None:
    queue, log, events = admitted(Picky)
    ledger = queue.ledger
    assert len(queue.take_given(0, 0.0)) == 20
    output = RequestOutput(0, 7, text="seven", finish_reason="stop")
    for attempt in (1, 2):
        queue.finish((0, 0), output, float(attempt))
        assert ledger.status[0][0] == Status.READY
        assert int(ledger.generated[0][0]) == 0  # nothing of what was rejected is left to plan with
        assert [r.num_generated for r in queue.take_given(0, 0.0)] == [0]
    queue.finish((0, 0), output, 3.0)
    assert ledger.status[0][0] == Status.FAILED
    assert ledger.results[0, 0].error == "rejected (3 times): no number"
    log.flush()
    kinds = [(e.kind, e.fields.get("attempt")) for e in events]
    assert kinds == [("rejected", 1), ("rejected", 2), ("failed", None)]


def test_tokens_before_a_move_are_rejected_with_the_rest() -> None:
    queue, _, _ = admitted(Picky)
    given = queue.take_given(0, 0.0)[0]
    queue.take_back(0, given, RequestOutput(0, 5), 1.0)
    queue.take_given(0, 0.0)
    assert int(queue.ledger.generated[0][0]) == 5
    queue.finish((0, 0), RequestOutput(0, 3, text="six", finish_reason="stop"), 2.0)
    assert queue.ledger.status[0][0] == Status.READY
    assert int(queue.ledger.generated[0][0]) == 0
    assert [r.num_generated for r in queue.take_given(0, 0.0)] == [0]


def test_tokens_before_a_move_count() -> None:
    """A request that generated 5 tokens on one engine and 3 on the next has 8."""
    queue, log, events = admitted(LengthPrompts)
    ledger = queue.ledger
    given = queue.take_given(0, 0.0)[1]
    queue.take_back(0, given, RequestOutput(1, 5), 1.0)
    assert int(ledger.generated[0][1]) == 5
    (again,) = queue.take_given(0, 0.0)
    assert again.num_generated == 5
    queue.finish((0, 1), RequestOutput(1, 3, finish_reason="stop"), 2.0)
    assert ledger.results[0, 1].num_tokens == 8
    assert int(ledger.generated[0][1]) == 8
    log.flush()
    finished = [e.fields for e in events if e.kind == "finished"]
    assert finished[0]["num_tokens"] == 8
    assert finished[0]["prompt_tokens"] == 8  # the prompt as it was, not what was moved


def test_requests_are_dealt_in_the_order_of_the_table() -> None:
    problem = small_problem()
    log = RunLog(RunInfo("r", "a", "", Path()))
    queue = RequestQueue(Ledger(problem.app), LengthPrompts(problem.scenarios[0]), log, {})
    queue.admit_first(0.0)
    first = queue.take_given(0, 0.0)
    for given in reversed(first[3:7]):
        queue.take_back(0, given, RequestOutput(given.request, 1), 1.0)
    assert [r.request for r in queue.take_given(0, 0.0)] == [3, 4, 5, 6]


def test_log_probabilities_before_a_move_count() -> None:
    """An engine that stops before it has generated anything takes nothing away."""
    queue, _, _ = admitted(LengthPrompts)
    tokens = [(TokenLogprob(k, f"w{k}", -0.5),) for k in range(4)]
    given = queue.take_given(0, 0.0)[1]
    queue.take_back(0, given, RequestOutput(1, 2, logprobs=tuple(tokens[:2])), 1.0)
    (again,) = queue.take_given(0, 1.0)
    queue.take_back(0, again, RequestOutput(1, 0), 2.0)
    (last,) = queue.take_given(0, 2.0)
    assert last.num_generated == 2
    done = RequestOutput(1, 2, finish_reason="stop", text="four", logprobs=tuple(tokens[2:]))
    queue.finish((0, 1), done, 3.0)
    assert queue.ledger.results[0, 1].logprobs == tuple(tokens)
