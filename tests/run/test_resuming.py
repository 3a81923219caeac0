"""Runs that are interrupted anywhere and go on: nothing lost, nothing done twice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samullm_simulated.plugin import SimulatedExecutor

from samullm_plugin.errors import InputError, RunError
from samullm_plugin.host.interfaces.executor import EngineEvent, EngineRequest
from samullm_plugin.model.problem import Problem
from samullm_plugin.records import to_record
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.run import RunOutcome, resume_run, start_run
from tests.run.worlds import setup_run, small_plan, small_problem

SETTLED = ("finished", "failed", "skipped")


def journal(directory: Path) -> list[dict[str, Any]]:
    return list(read_journal(directory / "events.jsonl"))


def outputs(directory: Path) -> dict[str, list[dict[str, Any]]]:
    files = sorted((directory / "outputs").glob("*.jsonl"))
    return {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in files}


def check_complete(directory: Path, problem: Problem, outcome: RunOutcome) -> None:
    """Every request settled exactly once, with its own tokens, and in the outputs in order."""
    counts = Counter((r["node"], r["request"]) for r in journal(directory) if r["kind"] in SETTLED)
    assert set(counts.values()) == {1}
    assert len(counts) == problem.app.num_requests
    found = outputs(directory)
    for i, node in enumerate(problem.app.nodes):
        lines = found[node.name]
        expected = problem.scenarios[0].output_tokens[i]
        assert [line["custom_id"] for line in lines] == [
            f"request-{r}" for r in np.flatnonzero(expected)
        ]
        tokens = [line["response"]["body"]["usage"]["completion_tokens"] for line in lines]
        assert tokens == expected[expected > 0].tolist()
    assert outcome.metrics["requests"]["finished"] == problem.app.num_requests
    assert not outcome.drained
    assert not outcome.failed


def test_a_whole_run_leaves_everything(tmp_path: Path) -> None:
    problem = small_problem()
    outcome = start_run(setup_run(problem, tmp_path / "run"), small_plan(), "by hand")
    check_complete(tmp_path / "run", problem, outcome)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    # the plan knew all lengths, and nothing failed: it was carried out to the letter
    assert metrics["makespan_s"]["measured"] == pytest.approx(metrics["makespan_s"]["planned"])
    for stage in metrics["stages"]:
        assert stage["start_s"]["measured"] == pytest.approx(stage["start_s"]["planned"])
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            track = spans.setdefault((event["pid"], event["tid"]), [])
            track.append((event["ts"], event["ts"] + event["dur"]))
    assert {pid for pid, _ in spans} == {1, 2}
    for track in spans.values():
        track.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(track))
    planned = [s for (pid, _), t in spans.items() for s in t if pid == 1]
    measured = [s for (pid, _), t in spans.items() for s in t if pid == 2]
    assert sum(b - a for a, b in planned) == pytest.approx(
        sum(b - a for a, b in measured), rel=1e-4
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_journal_cut_anywhere_goes_on(tmp_path: Path, seed: int) -> None:
    """As after kill -9 at any moment, in the middle of a write too."""
    problem = small_problem(seed)
    whole = tmp_path / "whole"
    start_run(setup_run(problem, whole), small_plan())
    data = (whole / "events.jsonl").read_bytes()
    rng = np.random.default_rng(seed)
    for k, size in enumerate([0, 5, *rng.integers(0, len(data), 12).tolist(), len(data)]):
        cut = tmp_path / f"cut{k}"
        shutil.copytree(whole, cut)
        for name in ("metrics.json", "trace.json", "outputs/a.jsonl"):
            (cut / name).unlink()
        (cut / "events.jsonl").write_bytes(data[:size])
        kept = data[:size].count(b'"kind":"finished"')
        before = [r for r in journal(cut) if r["kind"] == "finished"]
        assert kept - len(before) in (0, 1)
        outcome = resume_run(setup_run(problem, cut))
        check_complete(cut, problem, outcome)
        after = [r for r in journal(cut) if r["kind"] == "finished"]
        assert after[: len(before)] == before  # what was journaled stands
        assert outcome.metrics["interruptions"] == 1


class Interrupting(SimulatedExecutor):
    """Has something happen before a poll."""

    name = "simulated"
    at_poll = 0
    act: Any = None
    submitted: list[tuple[int, int, int]]

    def poll(self, timeout_s: float) -> Sequence[EngineEvent]:
        self.polls = getattr(self, "polls", 0) + 1
        if self.polls == self.at_poll:
            self.act()
        return super().poll(timeout_s)

    def submit(self, key: str, requests: Sequence[EngineRequest]) -> None:
        node = self._cluster.engine(key).spec.node
        self.submitted += [(node, r.request, r.num_generated) for r in requests]
        super().submit(key, requests)


def interrupted(
    problem: Problem, directory: Path, at_poll: int, *, resume: bool = False
) -> tuple[RunOutcome, Interrupting]:
    """Run until a poll, then drain."""
    executor = Interrupting()
    executor.submitted, executor.at_poll = [], at_poll
    setup = setup_run(problem, directory)
    coordinators: list[Coordinator] = []

    def drain() -> None:
        coordinators[0].request_drain()

    executor.act = drain
    setup = setup_run(problem, directory, on_start=coordinators.append)
    setup.host.create = lambda *a, **k: executor  # type: ignore[method-assign]
    outcome = resume_run(setup) if resume else start_run(setup, small_plan())
    return outcome, executor


def test_draining_keeps_what_was_generated(tmp_path: Path) -> None:
    problem = small_problem()
    directory = tmp_path / "run"
    first, _ = interrupted(problem, directory, 25)
    assert first.drained
    moved = {(r["node"], r["request"]): r["num_tokens"] for r in journal(directory) if
             r["kind"] == "moved"}  # fmt: skip
    assert moved
    finished = {(r["node"], r["request"]) for r in journal(directory) if r["kind"] == "finished"}
    second, executor = interrupted(problem, directory, 30, resume=True)
    assert second.drained
    names = [n.name for n in problem.app.nodes]
    for node, request, _ in executor.submitted:
        key = (names[node], request)
        assert key not in finished, "a finished request was run again"
    first_time = {}
    for node, request, generated in executor.submitted:
        first_time.setdefault((names[node], request), generated)
    assert {k: v for k, v in first_time.items() if v} == {
        k: v for k, v in moved.items() if k in first_time and k not in finished
    }
    outcome = resume_run(setup_run(problem, directory))
    check_complete(directory, problem, outcome)
    assert outcome.metrics["interruptions"] == 2
    times = [r["time_s"] for r in journal(directory)]
    assert times == sorted(times)


def test_a_crash_at_any_poll(tmp_path: Path) -> None:
    """The coordinator ends with an exception, its journal unclosed; engines are gone."""
    problem = small_problem(2)

    class CrashError(Exception):
        pass

    def crash() -> None:
        raise CrashError

    for at_poll in (1, 3, 9, 20, 40):
        directory = tmp_path / f"run{at_poll}"
        executor = Interrupting()
        executor.submitted, executor.at_poll, executor.act = [], at_poll, crash
        setup = setup_run(problem, directory)
        setup.host.create = lambda *a, made=executor, **k: made  # type: ignore[method-assign]
        with pytest.raises(CrashError):
            start_run(setup, small_plan())
        outcome = resume_run(setup_run(problem, directory))
        check_complete(directory, problem, outcome)


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    problem = small_problem()
    start_run(setup_run(problem, tmp_path / "run"), small_plan())
    size = (tmp_path / "run" / "events.jsonl").stat().st_size
    outcome = resume_run(setup_run(problem, tmp_path / "run"))
    check_complete(tmp_path / "run", problem, outcome)
    assert (tmp_path / "run" / "events.jsonl").stat().st_size < size + 200


def test_failed_requests_are_asked_again_when_that_is_wanted(tmp_path: Path) -> None:
    """With those that waited for them; the journal stays readable, and counts each once."""
    problem = small_problem()
    directory = tmp_path / "run"
    start_run(setup_run(problem, directory), small_plan())
    path, broken = directory / "events.jsonl", {("a", 3), ("a", 7), ("judge", 3), ("judge", 7)}
    records = journal(directory)
    for record in records:
        if record["kind"] == "finished" and (record["node"], record["request"]) in broken:
            for name in [n for n in record if n not in ("time_s", "node", "request")]:
                del record[name]
            record |= {"kind": "failed", "error": "an engine died"}
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    shutil.rmtree(directory / "outputs")
    outcome = resume_run(setup_run(problem, directory))
    assert len(outcome.failed) == 4
    assert sum(line["error"] is not None for line in outputs(directory)["a"]) == 2
    for _ in range(2):
        outcome = resume_run(setup_run(problem, directory), retry_failed=True)
        assert not outcome.failed
        assert outcome.metrics["requests"] == {
            "finished": problem.app.num_requests, "skipped": 0, "failed": 0,
        }  # fmt: skip
        found = outputs(directory)
        for i, node in enumerate(problem.app.nodes):
            assert len(found[node.name]) == len(problem.scenarios[0].output_tokens[i])
            assert not any(line["error"] for line in found[node.name])
    kinds = Counter(r["kind"] for r in journal(directory))
    assert kinds["retry"] == 1
    assert kinds["failed"] == 4
    assert kinds["finished"] == problem.app.num_requests


def test_how_requests_are_served_may_be_repaired(tmp_path: Path) -> None:
    """Other engine arguments and another path are no other run; another model is."""
    problem = small_problem()
    directory = tmp_path / "run"
    start_run(setup_run(problem, directory), small_plan())

    def changed(**fields: Any) -> Problem:
        first = problem.app.nodes[0]
        node = replace(first, model=replace(first.model, **fields))
        return replace(problem, app=replace(problem.app, nodes=(node, *problem.app.nodes[1:])))

    engine = replace(problem.app.nodes[0].model.engine, max_num_seqs=3)
    repaired = changed(path="/elsewhere", engine=engine)
    check_complete(directory, problem, resume_run(setup_run(repaired, directory)))
    with pytest.raises(InputError, match=r"has changed since in nodes\.a: model\. Engine"):
        resume_run(setup_run(changed(name="another"), directory))


def test_wrong_directories_are_refused(tmp_path: Path) -> None:
    problem = small_problem()
    directory = tmp_path / "run"
    start_run(setup_run(problem, directory), small_plan())
    with pytest.raises(InputError, match="holds a run already; continue it with --resume"):
        start_run(setup_run(problem, directory), small_plan())
    other = small_problem(seed=5, n=21)
    with pytest.raises(
        InputError, match=r"is a run of test, which has changed since in nodes\.a: .*requests"
    ):
        resume_run(setup_run(other, directory))
    with pytest.raises(InputError, match=r"holds no run \(there is no run.json\)"):
        resume_run(setup_run(problem, tmp_path / "nothing"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        start_run(setup_run(problem, tmp_path / "full"), small_plan())


@pytest.mark.parametrize(
    "at", ["rundir.RunDirectory.write_json", "run.write_layout", "run.write_plan", "run.Journal"]
)
def test_a_run_stopped_before_it_began_is_begun_anew(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is then as good as an empty one, and nothing is said that leads nowhere."""
    problem, directory = small_problem(), tmp_path / "run"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"samullm_plugin.run.{at}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start_run(setup_run(problem, directory), small_plan())
    if at in ("run.write_layout", "run.write_plan"):
        with pytest.raises(InputError, match="stopped before it began; start it anew with --out"):
            resume_run(setup_run(problem, directory))
    check_complete(directory, problem, start_run(setup_run(problem, directory), small_plan()))
    (tmp_path / "other" / "outputs").mkdir(parents=True)
    (tmp_path / "other" / "outputs" / "a.jsonl").write_text("{}")
    with pytest.raises(InputError, match="is not empty"):
        start_run(setup_run(problem, tmp_path / "other"), small_plan())


def test_one_process_at_a_time(tmp_path: Path) -> None:
    problem = small_problem()
    directory = tmp_path / "run"
    refusals = []

    def second() -> None:
        with pytest.raises(InputError, match="another process runs in this directory") as refusal:
            resume_run(setup_run(problem, directory))
        refusals.append(refusal)

    executor = Interrupting()
    executor.submitted, executor.at_poll, executor.act = [], 5, second
    setup = setup_run(problem, directory)
    setup.host.create = lambda *a, **k: executor  # type: ignore[method-assign]
    outcome = start_run(setup, small_plan())
    assert len(refusals) == 1
    check_complete(directory, problem, outcome)


def test_a_full_disk_loses_nothing_journaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    problem = small_problem()
    directory = tmp_path / "run"
    real = os.write
    room = 6000

    def write(fd: int, data: bytes) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[:room]
        room -= len(part)
        return real(fd, part)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(RunError, match=r"make room and continue with --resume") as error:
        start_run(setup_run(problem, directory), small_plan())
    assert error.value.exit_code == 1
    monkeypatch.undo()
    before = [r for r in journal(directory) if r["kind"] == "finished"]
    assert before
    outcome = resume_run(setup_run(problem, directory))
    check_complete(directory, problem, outcome)
    assert [r for r in journal(directory) if r["kind"] == "finished"][: len(before)] == before


def test_a_plan_that_cannot_be_carried_out_any_more_is_told(tmp_path: Path) -> None:
    """One that was made during the run, with a replica more than it has devices."""
    problem = small_problem()
    directory = tmp_path / "run"
    interrupted(problem, directory, 25)
    plan = to_record(small_plan())
    plan["stages"][0]["assignments"][0]["parallel"]["data_parallel_size"] += 1
    with (directory / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time_s": 1e3, "kind": "plan", "plan": plan}) + "\n")
    outcome = resume_run(setup_run(problem, directory))
    check_complete(directory, problem, outcome)
    (resumed,) = [r for r in journal(directory) if r["kind"] == "resumed"]
    assert resumed["note"] == "its last plan does not fit the devices or models: from its first"
