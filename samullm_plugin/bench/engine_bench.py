"""Applications times schedulers on engines: every plan is run by the coordinator, and timed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from samullm_plugin.bench.cases import planning_options
from samullm_plugin.bench.engine_cases import (
    CaseBuilder,
    EngineCase,
    digest,
)
from samullm_plugin.bench.engine_profiles import Measurement
from samullm_plugin.bench.engine_rows import BenchRun, PlannedCase
from samullm_plugin.bench.rows import try_plan
from samullm_plugin.errors import PluginError
from samullm_plugin.records import read_record, to_record
from samullm_plugin.run.journal import Journal, read_appended
from samullm_plugin.run.replanning import Replanner
from samullm_plugin.run.run import start_run
from samullm_plugin.run.setup import RunSetup

RUNS_FILE = "bench.jsonl"


@dataclass(frozen=True, slots=True)
class EngineBenchResult:
    """Everything that is known after a call.

    Attributes:
        plans: of every case and scheduler.
        runs: that are there, those of earlier calls included.
        left: runs that are still missing.
        measurements: how latency profiles were measured.
        failed: applications that could not be built, with the reason.
    """

    plans: Sequence[PlannedCase]
    runs: Sequence[BenchRun]
    left: int
    measurements: Sequence[Measurement] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


class EngineBench:
    """Runs plans of applications on engines and keeps what came of them in a work directory.

    A run that is there already is not repeated, so that a call can go on where another stopped.
    """

    def __init__(self, cases: CaseBuilder) -> None:
        """Prepare.

        Args:
            cases: makes the cases; runs and their results are kept in its work directory.
        """
        self._cases, self._host, self._settings = cases, cases.host, cases.settings
        self._dir = cases.work_dir

    def run(
        self, texts: Sequence[str], schedulers: Sequence[str], time_limit_s: float = float("inf")
    ) -> EngineBenchResult:
        """Plan and run what is missing.

        Args:
            texts: applications, as on the command line.
            schedulers: names.
            time_limit_s: no run is begun later than this.

        Raises:
            InputError: for unknown names or wrong options.
            RunError: if a run fails as a whole.
        """
        began_s = time.monotonic()
        failed: dict[str, str] = {}
        cases: list[EngineCase] = []
        with self._host.resolve("executor", self._settings.executor).value.kept_warm():
            for text in texts:
                try:
                    cases.append(self._cases.build(text))
                except PluginError as error:  # the others' rows still appear
                    failed[text] = str(error)
            journal = Journal(self._dir / RUNS_FILE)
            try:
                plans = {
                    (c.key, name): self._plan(journal, c, name)
                    for c in cases
                    for name in schedulers
                }
                runs = self._known_runs()
                cells = self._cells(cases, schedulers, plans)
                missing = [cell for cell in cells if _key(*cell) not in runs]
                left = len(missing)
                for case, scheduler, number in missing:
                    if time.monotonic() - began_s > time_limit_s:
                        break
                    plan = plans[case.key, scheduler]
                    self._cases.tell(f"{case.application} {scheduler} round {number + 1}")
                    done = self._run(case, plan, number)
                    key = _key(case, scheduler, number)
                    journal.append([{"kind": "run", "key": key, **asdict(done)}])
                    journal.sync()
                    runs[key] = done
                    left -= 1
            finally:
                journal.close()
        wanted = [_key(*cell) for cell in cells]
        return EngineBenchResult(
            tuple(plans.values()),
            tuple(runs[k] for k in wanted if k in runs),
            left,
            tuple(self._cases.measurements.values()),
            failed,
        )

    def _cells(
        self,
        cases: Sequence[EngineCase],
        schedulers: Sequence[str],
        plans: Mapping[tuple[str, str], PlannedCase],
    ) -> list[tuple[EngineCase, str, int]]:
        """Return all runs in the order in which they take turns."""
        cells = []
        for number in range(self._settings.rounds):
            for case in cases:
                first = number % max(len(schedulers), 1)
                for name in (*schedulers[first:], *schedulers[:first]):
                    if plans[case.key, name].plan is not None:
                        cells.append((case, name, number))
        return cells

    def _plan(self, journal: Journal, case: EngineCase, scheduler: str) -> PlannedCase:
        """Return a scheduler's plan, that of an earlier call if there is one."""
        key = digest(case.key, scheduler)
        known = self._known_plan(key)
        if known is not None:
            return known
        how = planning_options(
            self._host, scheduler, self._settings.seed, self._settings.time_limit_s
        )
        simulator = case.instance.simulator(self._host)
        tried = try_plan(self._host, case.instance.problem, scheduler, how, simulator)
        if tried.result is None:
            return PlannedCase(case.application, scheduler, note=tried.note, failed=tried.failed)
        made = tried.result
        planned = PlannedCase(
            case.application,
            scheduler,
            made.plan,
            float(made.mean_makespan_s),
            made.planning_s,
        )
        journal.append([{"kind": "plan", "key": key, **to_record(planned)}])
        return planned

    def _known_plan(self, key: str) -> PlannedCase | None:
        for record in self._records("plan"):
            if record.pop("key") == key:
                return read_record(PlannedCase, record, str(self._dir / RUNS_FILE))
        return None

    def _known_runs(self) -> dict[str, BenchRun]:
        return {r.pop("key"): BenchRun(**r) for r in self._records("run")}

    def _records(self, kind: str) -> list[dict[str, Any]]:
        path = self._dir / RUNS_FILE
        found = [r for r in read_appended(path) if r["kind"] == kind] if path.exists() else []
        for record in found:
            del record["kind"]
        return found

    def _run(self, case: EngineCase, planned: PlannedCase, number: int) -> BenchRun:
        """Carry a plan out."""
        assert planned.plan is not None
        name = f"{case.loaded.app.name}-{planned.scheduler}-{number}-{case.key[:8]}"
        directory = self._dir / "runs" / name.replace("/", "_")
        shutil.rmtree(directory, ignore_errors=True)  # of a call that was interrupted
        truth = case.truths[number]
        setup = RunSetup(
            self._host,
            case.loaded,
            case.instance,
            self._settings.executor,
            directory,
            self._settings.executor_options,
            replanner=Replanner(self._host, case.instance) if self._settings.replan else None,
            truth=truth,
        )
        foreseen = None
        if truth is not None:
            simulator = case.instance.simulator(self._host, truth)
            foreseen = simulator.simulate(planned.plan)[0].makespan_s
        began_at, load = time.time(), os.getloadavg()[0]
        metrics = start_run(setup, planned.plan, planned.scheduler).metrics
        return BenchRun(
            case.application,
            planned.scheduler,
            number,
            metrics["makespan_s"]["measured"],
            foreseen,
            metrics["engine_starts"],
            metrics["engine_failures"],
            metrics["load_s"],
            metrics["open_s"],
            metrics["requests"],
            metrics["completion_tokens"],
            metrics["idle_share"]["measured"],
            metrics["plans_adopted"],
            metrics["executor"],
            str(directory.relative_to(self._dir)),
            began_at,
            load,
        )


def _key(case: EngineCase, scheduler: str, number: int) -> str:
    return digest(case.key, scheduler, number)
