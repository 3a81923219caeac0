"""Where an interrupted run was, from its journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.executor import RequestOutput
from samullm_plugin.model.application import Application
from samullm_plugin.model.plan import Plan
from samullm_plugin.records import read_record
from samullm_plugin.run.journal import FinishedRecord, Placed
from samullm_plugin.run.ledger import Ledger, Status, is_call
from samullm_plugin.run.log import BULKY
from samullm_plugin.run.results import RequestId, Result, logprobs_of, result_of
from samullm_plugin.run.user_nodes import UserNodes

_SETTLED = {s.name.lower(): s for s in (Status.FINISHED, Status.SKIPPED, Status.FAILED)}


@dataclass(slots=True)
class ResumePoint:
    """Where a run starts: at its beginning, or where an interrupted one was.

    Attributes:
        ledger: what is settled.
        moved: tokens that unfinished requests have generated, with their prompts.
        clock_s: the run's clock.
        stage: index of the current stage of the plan; -1 before the first.
        finished_before: nodes that had finished when that stage began.
        stages_run: stages that have ended, over all plans.
        rejected: how often outputs of requests were rejected.
    """

    ledger: Ledger
    moved: Mapping[RequestId, RequestOutput] = field(default_factory=dict)
    clock_s: float = 0.0
    stage: int = -1
    finished_before: frozenset[str] = frozenset()
    stages_run: int = 0
    rejected: dict[RequestId, int] = field(default_factory=dict)


@dataclass(slots=True)
class Recovered:
    """What a journal says.

    Attributes:
        resume: what is settled and generated, and where the plan was.
        plan: the plan the run went by; None if it was interrupted before there was one.
        policy: name of the request policy that was chosen with that plan (``fcfs``: none), if it
            was made during the run; None: that of the run's first plan holds.
        records: its events, without the contents of outputs.
        finished: nothing was left to do.
    """

    resume: ResumePoint
    plan: Plan | None = None
    policy: str | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def begin_plan(self, plan: Plan | None, policy: str | None = None) -> None:
        """Go on at the first stage of a plan; None: of the run's first one."""
        self.plan = plan
        if plan is None or policy is not None:
            self.policy = policy
        self.resume.stage, self.resume.finished_before = -1, frozenset()

    def reopen_failed(self) -> int:
        """Make the failed requests be asked again, by the run's first plan; return how many."""
        count = self.resume.ledger.reopen_failed()
        if count:
            self.begin_plan(None)
            self.finished = False
        return count


class _Batch:
    """Finished requests that follow one another in a journal, to be settled together."""

    ROWS = 8192

    def __init__(self, resume: ResumePoint, users: UserNodes) -> None:
        self._resume, self._ledger = resume, resume.ledger
        models = len(resume.ledger.app.nodes)
        self._parts = {name: (node, part) for name, node, part in users if node < models}
        self._rows: list[tuple[int, int, float, int, int, bool, int]] = []

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._rows)

    def add(self, place: int, record: FinishedRecord) -> bool:
        """Add a request; return False if it is no request of a model's node."""
        found = self._parts.get(record.node)
        if found is None or not 0 <= record.request < len(found[1]):
            return False
        node, part = found
        self._rows.append(
            (
                node,
                part.place(record.request),
                record.time_s,
                record.num_tokens,
                record.prompt_tokens,
                record.finish_reason == "length",
                place,
            )
        )
        return True

    def settle(self, moved: dict[RequestId, RequestOutput]) -> int | None:
        """Settle them and be empty.

        Args:
            moved: unfinished requests; those that are not any more are taken out.

        Returns:
            Which of them had been settled before, with nothing changed; None: none had.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return None
        ledger = self._resume.ledger
        node, request, time_s, tokens, prompts, cut, place = map(np.array, zip(*rows, strict=True))
        nodes = [(i, node == i) for i in np.unique(node).tolist()]
        for i, mine in nodes:
            known = ledger.status[i][request[mine]] >= Status.FINISHED
            if known.any() or len(np.unique(request[mine])) < len(known):
                return _first_known(ledger, [row[:2] for row in rows])
        for i, mine in nodes:
            ledger.mark_finished(
                i, request[mine], time_s[mine], tokens[mine], prompts[mine], cut[mine]
            )
            ledger.results.all_written(i, request[mine], place[mine])
        self._resume.clock_s = max(self._resume.clock_s, float(time_s.max()))
        for row in rows if moved else ():
            moved.pop(row[:2], None)
        return None


def _first_known(ledger: Ledger, requests: Iterable[RequestId]) -> int | None:
    """Return which of some requests is the first that is settled, or there twice."""
    seen: set[RequestId] = set()
    for k, at in enumerate(requests):
        if at in seen or ledger.states[at[0]][at[1]] >= Status.FINISHED:
            return k
        seen.add(at)
    return None


def recover(
    app: Application,
    journal: Iterable[Placed | tuple[int, Mapping[str, Any]]],
    where: str,
    read: Callable[[int], Mapping[str, Any]],
) -> Recovered:
    """Replay a journal.

    Args:
        app: the application it is of.
        journal: its records in order, and the place of each.
        where: the file, for messages.
        read: returns the record at a place; contents of outputs are read when they are needed.

    Raises:
        InputError: if it tells of requests the application does not have, or of one twice.
    """
    ledger = Ledger(app)
    moved: dict[RequestId, RequestOutput] = {}
    resume = ResumePoint(ledger, moved)
    found = Recovered(resume)
    users = UserNodes(app)
    calls: dict[RequestId, tuple[float, int, Result]] = {}
    ledger.results.read = read
    batch = _Batch(resume, users)

    def settle(before: int) -> None:
        count = len(batch)
        if (k := batch.settle(moved)) is not None:
            at = before - count + k
            raise InputError(f"{where} line {at}: the request was settled before")

    number = 0
    for number, (place, found_there) in enumerate(journal, 1):
        if isinstance(found_there, FinishedRecord) and batch.add(place, found_there):
            if len(batch) == _Batch.ROWS:
                settle(number + 1)
            continue
        settle(number)
        record = read(place) if isinstance(found_there, FinishedRecord) else found_there
        try:
            resume.clock_s = max(resume.clock_s, float(record["time_s"]))
            kind = record["kind"]
            if kind not in _SETTLED:
                found.records.append({k: v for k, v in record.items() if k not in BULKY})
            if kind in _SETTLED or kind in ("moved", "rejected"):
                request = users.planned(record["node"], int(record["request"]))
                if request is None:
                    raise InputError(f"{where} line {number}: there is no such request")
                if kind == "rejected":
                    resume.rejected[request] = int(record["attempt"])
                    moved.pop(request, None)
                    continue
                if kind == "moved":
                    moved[request] = _moved(record, request[1])
                    continue
                if ledger.status[request[0]][request[1]] >= Status.FINISHED:
                    raise InputError(f"{where} line {number}: the request was settled before")
                if is_call(app, request) and kind == "finished":
                    calls[request] = float(record["time_s"]), place, result_of(record)
                    continue
                ledger.mark(
                    request,
                    _SETTLED[kind],
                    float(record["time_s"]),
                    int(record.get("num_tokens", 0)),
                    int(record.get("prompt_tokens", 0)),
                    cut=kind == "finished" and record.get("finish_reason") == "length",
                )
                ledger.results.written(request, place)
                if record.get("seconds") is not None:
                    ledger.note_call(request[0], float(record["seconds"]))
                moved.pop(request, None)
            elif kind == "plan":
                plan = read_record(Plan, record["plan"], f"{where} line {number}: plan")
                found.begin_plan(plan, record.get("request_policy"))
            elif kind == "retry":
                found.reopen_failed()
                resume.rejected.clear()
            elif kind == "stage":
                resume.stage, resume.stages_run = int(record["stage"]), int(record["number"])
                resume.finished_before = frozenset(
                    n.name for i, n in enumerate(app.nodes) if ledger.settled(i)
                )
        except (KeyError, TypeError, ValueError, OverflowError, IndexError) as error:
            raise InputError(f"{where} line {number}: is damaged: {error!r}") from error
    settle(number + 1)
    for request, (time_s, place, result) in calls.items():
        if ledger.rows_settled(request):  # else it is called again: its values were not written
            ledger.settle(request, Status.FINISHED, time_s, result)
            ledger.results.written(request, place)
    found.finished = ledger.all_settled
    return found


def _moved(record: Mapping[str, Any], request: int) -> RequestOutput:
    ids, prompt = record.get("token_ids"), record.get("prompt_token_ids")
    return RequestOutput(
        request,
        int(record["num_tokens"]),
        None if ids is None else tuple(ids),
        prompt_token_ids=None if prompt is None else tuple(prompt),
        logprobs=logprobs_of(record.get("logprobs")),
    )
