"""Applications times schedulers on engines: every plan is run and timed; a row for each."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from samullm_plugin.bench.cases import planning_options
from samullm_plugin.bench.engine_cases import (
    CaseBuilder,
    EngineCase,
    digest,
)
from samullm_plugin.bench.engine_profiles import Measurement
from samullm_plugin.bench.rows import BASELINES, Baselines, Spread, speedups, try_plan
from samullm_plugin.errors import PluginError
from samullm_plugin.model.plan import Plan
from samullm_plugin.records import read_record, to_record
from samullm_plugin.run.journal import Journal, read_appended
from samullm_plugin.run.replanning import Replanner
from samullm_plugin.run.run import start_run
from samullm_plugin.run.setup import RunSetup


@dataclass(frozen=True, slots=True)
class PlannedCase:
    """One scheduler's plan for a case.

    Attributes:
        application: of the case.
        scheduler: its name.
        plan: the plan; None if there is none.
        planned_s: its simulated makespan, mean over the length scenarios it was made for.
        planning_s: what the scheduler took.
        note: why there is no plan.
        failed: a plugin is to blame for that.
    """

    application: str
    scheduler: str
    plan: Plan | None = None
    planned_s: float = 0.0
    planning_s: float = 0.0
    note: str = ""
    failed: bool = False


@dataclass(frozen=True, slots=True)
class BenchRun:
    """One run; times in seconds.

    Attributes:
        application: of the case.
        scheduler: whose plan was run.
        round: which hidden draw.
        measured_s: until the last request finished, engine starts included.
        foreseen_s: the plan simulated on the lengths that were true; None: nobody knows them.
        engine_starts: engines started.
        engine_failures: engines that died.
        load_s: seconds of all engine starts together.
        open_s: seconds before the run's clock began (importing vLLM, unless that was done before).
        requests: requests finished, skipped and failed.
        completion_tokens: tokens generated.
        idle_share: device time without a request.
        plans_adopted: plans, the first included.
        figures: what the executor measured of itself.
        directory: of the run, in the work directory.
        began_at: seconds since the epoch.
        load_average: of the machine, when it began.
    """

    application: str
    scheduler: str
    round: int
    measured_s: float
    foreseen_s: float | None
    engine_starts: int
    engine_failures: int
    load_s: float
    open_s: float
    requests: Mapping[str, int]
    completion_tokens: int
    idle_share: float | None
    plans_adopted: int
    figures: Mapping[str, float]
    directory: str
    began_at: float
    load_average: float


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One scheduler on one application; times in seconds, errors in percent of what was measured.

    Attributes:
        application: of the case.
        scheduler: its name.
        runs: how many there are.
        planned_s: what its plan was to take, on the lengths that the scheduler saw.
        planning_s: what the scheduler took.
        measured_s: makespan.
        planned_error_pct: of ``planned_s``, per round.
        foreseen_error_pct: of the plan simulated on the true lengths, per round.
        engine_starts: per run.
        load_s: of all engine starts of a run together.
        idle_share: of device time.
        speedup_max: measured time of the max-heuristic over this one's, round by round.
        speedup_min: the same of the min-heuristic.
        failed_requests: of all runs.
        figures: what the executor measured of itself, by name.
        note: why there is no plan.
        failed: a plugin is to blame for that.
    """

    application: str
    scheduler: str
    runs: int
    planned_s: float
    planning_s: float
    measured_s: Spread | None
    planned_error_pct: tuple[float, ...]
    foreseen_error_pct: tuple[float, ...]
    engine_starts: Spread | None
    load_s: Spread | None
    idle_share: Spread | None
    speedup_max: Spread | None
    speedup_min: Spread | None
    failed_requests: int
    figures: Mapping[str, Spread]
    note: str = ""
    failed: bool = False


def engine_rows(
    plans: Sequence[PlannedCase], runs: Sequence[BenchRun], baselines: Baselines = BASELINES
) -> list[EngineRow]:
    """Return a row per application and scheduler, in the order of the plans."""
    return [_measured_row(planned, runs, baselines) for planned in plans]


def _measured_row(
    planned: PlannedCase, every: Sequence[BenchRun], baselines: Baselines
) -> EngineRow:
    runs_of: dict[str, list[BenchRun]] = {planned.scheduler: []}
    for run in every:
        if run.application == planned.application:
            runs_of.setdefault(run.scheduler, []).append(run)
    runs = runs_of[planned.scheduler]
    measured = {s: {r.round: r.measured_s for r in mine} for s, mine in runs_of.items()}
    over = speedups(measured, planned.scheduler, baselines)
    return EngineRow(
        planned.application,
        planned.scheduler,
        len(runs),
        planned.planned_s,
        planned.planning_s,
        Spread.of([r.measured_s for r in runs]),
        tuple(100 * (planned.planned_s / r.measured_s - 1) for r in runs),
        tuple(100 * (r.foreseen_s / r.measured_s - 1) for r in runs if r.foreseen_s is not None),
        Spread.of([r.engine_starts for r in runs]),
        Spread.of([r.load_s for r in runs]),
        Spread.of([r.idle_share for r in runs if r.idle_share is not None]),
        over.get("speedup_max"),
        over.get("speedup_min"),
        sum(r.requests.get("failed", 0) for r in runs),
        {
            name: spread
            for name in dict.fromkeys(n for r in runs for n in r.figures)
            if (spread := Spread.of([r.figures[name] for r in runs if name in r.figures]))
        },
        planned.note,
        planned.failed,
    )


def mean_error_pct(rows: Sequence[EngineRow], *, foreseen: bool = False) -> float | None:
    """Return the mean absolute error over all runs; None without runs."""
    errors = [
        abs(e) for r in rows for e in (r.foreseen_error_pct if foreseen else r.planned_error_pct)
    ]
    return float(np.mean(errors)) if errors else None


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
