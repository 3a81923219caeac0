"""Runs an application: from its problem and plan to a run directory with everything in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from samullm_plugin.errors import InputError, RunError
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.planning.artifacts import StoredPlan, read_plan, write_plan
from samullm_plugin.records import to_record
from samullm_plugin.rules.verify import require_valid, verify
from samullm_plugin.run.calibrating import Calibrator
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.forecast import FORECAST_FILE, forecast_record, forecast_run
from samullm_plugin.run.identity import identity_of
from samullm_plugin.run.journal import Journal, read_journal_places
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.metrics import (
    measured_slices,
    planned_slices,
    run_metrics,
)
from samullm_plugin.run.outputs import OutputWriter
from samullm_plugin.run.prompts import PromptBuilder
from samullm_plugin.run.recovery import ResumePoint, recover
from samullm_plugin.run.reuse import opened_reuse
from samullm_plugin.run.rows import write_layout
from samullm_plugin.run.rundir import RunDirectory, read_facts, require_begun
from samullm_plugin.run.samples import write_samples
from samullm_plugin.run.setup import (
    RunSetup,
    imitates,
    open_log,
    planned_trace,
    policy_of,
    prepare,
)
from samullm_plugin.run.signals import defer_signals
from samullm_plugin.run.table_files import TableError, live_table
from samullm_plugin.run.trace import trace_json
from samullm_plugin.run.user_nodes import UserNodes


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What became of a run.

    Attributes:
        metrics: as in ``metrics.json``.
        drained: it was interrupted and can be resumed.
        failed: requests that failed, as (node, id, reason).
        directory: its files.
    """

    metrics: Mapping[str, Any]
    drained: bool
    failed: tuple[tuple[str, str, str], ...]
    directory: Path


def start_run(setup: RunSetup, plan: Plan, scheduler: str = "") -> RunOutcome:
    """Run an application from its beginning.

    Args:
        setup: the run.
        plan: a plan of its problem.
        scheduler: who made it.

    Raises:
        InputError: if the input is wrong; nothing was started then.
        PlanError: if the plan is not valid for the problem.
        RunError: if the run failed after it had started.
    """
    problem = setup.instance.problem
    require_valid(problem, plan, scheduler or "the given plan")
    executor, source = prepare(setup)
    planned = planned_trace(setup, plan)
    facts = {
        "application": setup.loaded.app.name,
        "executor": setup.executor,
        "scheduler": scheduler,
        "num_devices": problem.cluster.num_gpus,
        "machines": problem.cluster.machines_if_several,
        "cards": problem.cluster.cards_if_shared,
        "app_file": None if setup.loaded.path is None else str(setup.loaded.path.resolve()),
    }
    directory = RunDirectory.create(setup.directory, identity_of(setup.loaded), facts)
    try:
        write_layout(setup.directory, setup.loaded)
        if setup.loaded.path is not None and setup.loaded.path.is_file():
            shutil.copyfile(setup.loaded.path, setup.directory / "app.yaml")
        stored = StoredPlan.of(
            plan,
            problem,
            scheduler,
            makespan_s=[planned.makespan_s],
            request_policy=setup.instance.policy_name,
        )
        write_plan(setup.directory / "plan.json", stored)
        given = setup.loaded.output_tokens is not None
        estimator = None if given else setup.instance.estimator
        foreseen = forecast_run(problem, planned, executor, estimator)
        directory.write_json(FORECAST_FILE, forecast_record(foreseen))
        journal = Journal(directory.journal_path)
        try:
            log = open_log(setup, journal)
            log.add(0.0, "plan", plan=to_record(plan), scheduler=scheduler)
            log.flush()
            resume = ResumePoint(Ledger(problem.app))
            with _opened(setup, executor, directory) as open_s:
                run, unwritten = _run(setup, plan, executor, source, log, directory, resume)
            figures = executor.figures()
            done = _outcome(setup, run, source, log, directory, planned, open_s, figures)
            if unwritten is not None:
                raise unwritten
            return done
        finally:
            journal.close()
    finally:
        directory.close()


def resume_run(
    setup: RunSetup, plan: StoredPlan | None = None, *, retry_failed: bool = False
) -> RunOutcome:
    """Go on with an interrupted run: what its journal holds is not done again.

    Args:
        setup: the run.
        plan: a new plan, where the run's own does not fit the cluster or models any more.
        retry_failed: ask the requests again that have failed, and those that waited for them.

    Raises:
        InputError: if the directory holds no run of this application, or another process runs it.
        RunError: if the run failed.
    """
    problem = setup.instance.problem
    directory = RunDirectory.reopen(setup.directory, identity_of(setup.loaded))
    try:
        journal = Journal(directory.journal_path)
        try:
            path = directory.journal_path
            found = recover(problem.app, read_journal_places(path), str(path), journal.read)
            if plan is not None:
                write_plan(setup.directory / "plan.json", plan)
            first = read_plan(setup.directory / "plan.json").plan
            require_valid(problem, first, str(setup.directory / "plan.json"))
            note = {}
            if found.plan is not None and not _can_be_carried_out(problem, found.plan):
                found.begin_plan(None)  # made for a cluster or models that are others now
                note = {"note": "its last plan does not fit the devices or models: from its first"}
            if found.resume.stage >= len((found.plan or first).stages):
                raise InputError(f"{path}: tells of a stage that the run's plan does not have")
            executor, source = prepare(setup)
            log = open_log(setup, journal)
            log.records.extend(found.records)
            interrupted_s = found.resume.clock_s
            log.add(interrupted_s, "resumed", interrupted_s=interrupted_s, **note)
            if retry_failed and (count := found.reopen_failed()):
                log.add(interrupted_s, "retry", requests=count)
            if plan is not None:
                log.add(interrupted_s, "plan", plan=to_record(first), scheduler=plan.scheduler)
                found.begin_plan(None)  # nor does a policy hold that was chosen during the run
                found.begin_plan(first)
            planned = planned_trace(setup, first)
            if found.policy is not None:
                setup = _with_policy(setup, found.policy)
            with _opened(setup, executor) as open_s:
                run, unwritten = _run(
                    setup, found.plan or first, executor, source, log, directory, found.resume
                )
            figures = executor.figures()
            done = _outcome(setup, run, source, log, directory, planned, open_s, figures)
            if unwritten is not None:
                raise unwritten
            return done
        finally:
            journal.close()
    finally:
        directory.close()


@contextmanager
def _opened(
    setup: RunSetup, executor: Executor, new: RunDirectory | None = None
) -> Iterator[float]:
    """Have an executor open, and closed afterwards whatever happens.

    Args:
        setup: the run.
        executor: its executor.
        new: the directory, if the run begins: it goes if the executor cannot be opened here.

    Yields:
        The seconds that opening took; the executor's clock starts then.
    """
    began_s = time.monotonic()
    try:
        try:
            executor.open(setup.instance.problem.cluster, setup.directory)
        except InputError:
            if new is not None:
                new.discard()
            raise
        yield time.monotonic() - began_s
    finally:
        with defer_signals():
            executor.close()


def _run(
    setup: RunSetup,
    plan: Plan,
    executor: Executor,
    source: PromptBuilder,
    log: RunLog,
    directory: RunDirectory,
    resume: ResumePoint,
) -> tuple[Coordinator, TableError | None]:
    """Run on an open executor; return the coordinator after the run, and why it has no table."""
    app = setup.instance.problem.app
    # Engines that only imitate would teach the next plan what the last one believed.
    real = not (imitates(executor) or executor.virtual_clock)
    calibrator = Calibrator(setup.instance.problem) if real else None
    with opened_reuse(setup.reuse, executor.engine_version(), setup.loaded, app) as reuse:
        coordinator = Coordinator(
            setup.instance.problem,
            plan,
            executor,
            source,
            log,
            resume=resume,
            replanner=setup.replanner,
            options=setup.options,
            policy=policy_of(setup),
            reuse=reuse,
            calibrator=calibrator,
        )
        writer = OutputWriter(directory, coordinator.ledger, source)
        log.add_listener(writer.take)
        if setup.on_start is not None:
            setup.on_start(coordinator)
        unwritten: TableError | None = None
        try:
            with live_table(setup.loaded, setup.directory) as table:
                coordinator.run()
                if table is not None and not coordinator.drained:
                    table.complete = True
        except TableError as error:
            unwritten = error
    if calibrator is not None:
        calibrator.keep(coordinator.ledger)
    writer.write_rest()
    return coordinator, unwritten


def _outcome(
    setup: RunSetup,
    coordinator: Coordinator,
    source: PromptBuilder,
    log: RunLog,
    directory: RunDirectory,
    planned: PlanTrace,
    open_s: float,
    figures: Mapping[str, float],
) -> RunOutcome:
    """Write what came of a run, and return it."""
    problem = setup.instance.problem
    users, ledger = UserNodes(problem.app), coordinator.ledger
    write_samples(directory, ledger, source)
    metrics = run_metrics(ledger, log.records, problem.cluster.num_gpus, planned)
    metrics |= {"open_s": open_s, "executor": figures}
    directory.write_json("metrics.json", metrics)
    tracks = {"planned": planned_slices(planned), "measured": measured_slices(log.records)}
    marks = [
        (float(r["time_s"]), r["kind"])
        for r in log.records
        if r["kind"] in ("plan", "resumed", "drained", "engine_failed")
    ]
    directory.write_json("trace.json", trace_json(tracks, marks))
    failed = tuple(
        (name, source.custom_id(name, index), str(ledger.results[i, r].error))
        for i, status in enumerate(ledger.status)
        for r in np.flatnonzero(status == Status.FAILED).tolist()
        for name, index in (users.written((i, r)),)
    )
    if coordinator.stopped is not None:
        raise RunError(
            f"{coordinator.stopped}. Nothing is lost: correct the cause and continue with "
            f"--resume {setup.directory}"
        )
    return RunOutcome(metrics, coordinator.drained, failed, setup.directory)


def _with_policy(setup: RunSetup, name: str) -> RunSetup:
    """Return a run under a request policy that was chosen during it, unless one is asked for."""
    if not setup.instance.policy_free:
        return setup
    if setup.replanner is not None:
        setup.replanner.start_with_policy(name)
    return replace(setup, instance=setup.instance.with_policy(name))


def _can_be_carried_out(problem: Problem, plan: Plan) -> bool:
    """Return whether a plan's engines fit on devices that there are.

    One that was made during the run has only the nodes that were left.
    """
    left = ("completeness", "precedence")
    return all(v.rule in left for v in verify(problem, plan))


def require_resumable(directory: Path) -> str:
    """Return the executor of a run that is to go on.

    Raises:
        InputError: if the folder holds no run, or one that was stopped before it began.
    """
    require_begun(directory)
    return str(read_facts(directory).get("executor", ""))
