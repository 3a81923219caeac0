"""What the coordinator of a run costs: processor time and memory per request, journal, resume.

Two nodes: each answer is judged. Engines answer at once, up to ``max_num_seqs`` requests a time, so
that all that is measured is the coordinator: prompts, dispatch, journal, what it keeps. The time
inside the executor is taken off. Beside other work processor time is longer by what that drives out
of the caches: the tenth of the steps that took least says what it would be without. Run it from the
checkout that is to be measured:

    python benchmarks/coordinator.py --requests 1000000
    python benchmarks/coordinator.py --requests 100000 --engines 1024
    python benchmarks/coordinator.py --requests 100000 --profile /tmp/coordinator.prof
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from samullm_plugin import (
    Assignment,
    Cluster,
    EngineEvent,
    EngineRequest,
    EngineSpec,
    Executor,
    ParallelConfig,
    Plan,
    RequestOutput,
    RunInfo,
    Stage,
)
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.journal import Journal, JournalReader, read_journal_places
from samullm_plugin.run.ledger import Ledger
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.outputs import write_outputs
from samullm_plugin.run.prompts import A_PROMPT, Prepared, Prompt, PromptBuilder
from samullm_plugin.run.recovery import recover
from samullm_plugin.run.results import RequestId
from samullm_plugin.run.rundir import RunDirectory
from samullm_plugin.run.user_nodes import UserNodes
from samullm_plugin.testing.factories import TestNode, make_problem

T = TypeVar("T")

PROMPT = "Answer question {0} in a few sentences, and say where you are not sure. " * 6
OUTPUT = "This is what a model says of request {0}: as long as a short answer is. " * 6


class Instant(Executor):
    """Engines that answer at once, at most ``max_num_seqs`` requests each between two polls."""

    name = "instant"

    def __init__(self) -> None:
        super().__init__(None)
        self.spent_s = 0.0
        self.most_held = 0
        self.steps_us: list[float] = []
        self._returned_s, self._outputs = 0.0, 0
        self._held: dict[str, deque[int]] = {}
        self._limit: dict[str, int] = {}
        self._events: list[EngineEvent] = []

    def _timed(self, call: Callable[..., T], *arguments: Any) -> T:
        began = time.process_time()
        try:
            return call(*arguments)
        finally:
            self.spent_s += time.process_time() - began

    def open(self, cluster: Cluster, run_dir: Path | None) -> None:
        """Nothing is to be done."""

    def now_s(self) -> float:
        """Return the time."""
        return time.monotonic()

    def start_engine(self, spec: EngineSpec) -> None:
        """Start an engine."""
        self._held[spec.key] = deque()
        self._limit[spec.key] = spec.model.engine.max_num_seqs
        self._events.append(EngineEvent(spec.key, "ready", self.now_s()))

    def submit(self, key: str, requests: Sequence[EngineRequest]) -> None:
        """Take requests."""
        self._timed(self._held[key].extend, [r.request for r in requests])
        self.most_held = max(self.most_held, len(self._held[key]))

    def poll(self, timeout_s: float) -> Sequence[EngineEvent]:
        """Answer what the engines can run at once; note what the coordinator took since then."""
        if self._outputs:
            took_s = time.process_time() - self._returned_s
            self.steps_us.append(1e6 * took_s / self._outputs)
        events = self._timed(self._answers)
        self._outputs = sum(len(e.outputs) for e in events)
        self._returned_s = time.process_time()
        return events

    def _answers(self) -> Sequence[EngineEvent]:
        events, self._events = self._events, []
        for key, held in self._held.items():
            outputs = tuple(
                RequestOutput(r, 90, text=OUTPUT.format(r), finish_reason="stop")
                for r in (held.popleft() for _ in range(min(len(held), self._limit[key])))
            )
            if outputs:
                events.append(EngineEvent(key, "finished", self.now_s(), outputs))
        return events

    def stop_engine(self, key: str) -> Sequence[RequestOutput]:
        """Stop an engine."""
        return [RequestOutput(r, 0) for r in self._held.pop(key)]

    def progress(self, key: str) -> Mapping[int, int]:
        """Nothing is half done."""
        return {}

    def close(self) -> None:
        """Nothing is to be done."""


class Texts(PromptBuilder):
    """Prompts of some 450 characters, and the answer in the judge's."""

    def decide(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Every request is asked."""
        return A_PROMPT

    def prepare(self, request: RequestId, ledger: Ledger) -> Prompt:
        """Return the text of a request."""
        node, r = request
        text = PROMPT.format(r)
        if node:
            text += str(ledger.results[0, r].text)
        return Prompt(100, 200, text=text, sampling={"temperature": 0.0})


def peak_mb() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now_mb() -> float:
    """Return the memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def measure(
    count: int, folder: Path, profile: Path | None = None, engines: int = 2
) -> dict[str, Any]:
    """Run ``count`` requests on so many engines and take the figures."""
    half, one = count // 2, [1] * (count // 2)
    waits = [[(0, r)] for r in range(half)]
    problem = make_problem(
        [TestNode("answer", one, one), TestNode("judge", one, one, waits)], engines, nvlink=1
    )
    del waits
    size, devices = ParallelConfig(data_parallel_size=engines // 2), tuple(range(engines))
    answer = Assignment("answer", size, devices[: engines // 2])
    judge = Assignment("judge", size, devices[engines // 2 :])
    plan = Plan((Stage((answer, judge)),))
    directory = RunDirectory.create(folder / "run", {}, {})
    journal = Journal(directory.journal_path)
    log = RunLog(RunInfo("run", "scale", "instant", folder), journal)
    executor, source = Instant(), Texts()
    gc.collect()
    before_mb = now_mb()
    coordinator = Coordinator(problem, plan, executor, source, log)
    profiler = cProfile.Profile()
    began, began_s = time.process_time(), time.monotonic()
    if profile is not None:
        profiler.enable()
    coordinator.run()
    if profile is not None:
        profiler.disable()
        profiler.dump_stats(profile)
    cpu_s = time.process_time() - began - executor.spent_s
    wall_s, run_mb, after_mb = time.monotonic() - began_s, peak_mb(), now_mb()
    assert coordinator.ledger.all_settled
    began = time.process_time()
    for _, node, part in UserNodes(problem.app):
        write_outputs(directory, node, part, coordinator.ledger, source)
    outputs_s = time.process_time() - began
    texts = 2 * sum(len(OUTPUT.format(r)) for r in range(half))
    size = directory.journal_path.stat().st_size
    journal.close()
    result = {
        "requests": count,
        "engines": engines,
        "cpu_us_per_request": round(1e6 * cpu_s / count, 1),
        "cpu_us_per_request_undisturbed": round(float(np.percentile(executor.steps_us, 10)), 1),
        "wall_s": round(wall_s, 1),
        "most_held_by_an_engine": executor.most_held,
        "mb_before": round(before_mb),
        "mb_after": round(after_mb),
        "bytes_per_request_after": round(1e6 * (after_mb - before_mb) / count),
        "peak_mb": round(run_mb),
        "journal_bytes_per_request_beside_text": round((size - texts) / count),
        "outputs_us_per_request": round(1e6 * outputs_s / count, 1),
        "peak_mb_with_outputs": round(peak_mb()),
    }
    del coordinator, log
    gc.collect()
    began = time.process_time()
    path = directory.journal_path
    reader = JournalReader(path)
    found = recover(problem.app, read_journal_places(path), str(path), reader.read)
    result["resume_s"] = round(time.process_time() - began, 1)
    result["peak_mb_with_resume"] = round(peak_mb())
    assert found.finished
    return result


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--engines", type=int, default=2, help="an even number")
    parser.add_argument("--profile", type=Path, help="write the profiler's figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samullm-coordinator-") as folder:
        result = measure(options.requests, Path(folder), options.profile, options.engines)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
