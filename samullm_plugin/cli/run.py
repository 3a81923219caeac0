"""``samullm run``: carry a plan out on real, emulated or simulated engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samullm_plugin.cli.options import (
    PlanningGroup,
    RequestsGroup,
    Scheduler,
    Target,
    parsed_options,
    with_groups,
)
from samullm_plugin.cli.output import OutputJson, console, print_table, write_json
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.app.loaded import LoadedApplication
    from samullm_plugin.model.plan import Plan
    from samullm_plugin.model.problem import Problem
    from samullm_plugin.model.result import PlanTrace
    from samullm_plugin.planning.artifacts import StoredPlan
    from samullm_plugin.run.coordinator import Coordinator
    from samullm_plugin.run.run import RunOutcome

INTERRUPTED = 130
"""Exit code of a run that was interrupted and can be resumed."""

SHOWN_FAILURES = 10


@with_groups
def run(
    context: typer.Context,
    target: Target,
    *,
    executor: Annotated[
        str | None, typer.Option(help="vllm, ray, emulated, simulated, or a plugin's.")
    ] = None,
    executor_option: Annotated[
        list[str] | None, typer.Option(help="Option of the executor, as key=value; repeatable.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="New directory of the run: journal, outputs, metrics.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the interrupted run in this directory.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option(help="With --resume: ask the requests again that have failed.")
    ] = False,
    scheduler: Scheduler = None,
    plan: Annotated[Path | None, typer.Option(help="Carry out this plan.json.")] = None,
    replan: Annotated[
        bool, typer.Option(help="Plan again when lengths or latencies are not as expected.")
    ] = True,
    planning: PlanningGroup,
    requests: RequestsGroup,
    output_json: OutputJson = None,
) -> int:
    """Run an application; Ctrl-C once stops it so that it can be resumed, twice at once."""
    from samullm_plugin.cli.streams import is_quiet
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.planning.applications import find_application
    from samullm_plugin.planning.artifacts import StoredPlan, read_plan
    from samullm_plugin.planning.instances import cluster_of, make_instance
    from samullm_plugin.planning.planner import make_plan
    from samullm_plugin.planning.this_machine import check_stages, usual_executor
    from samullm_plugin.run.display import RunDisplay
    from samullm_plugin.run.known import known_outputs, known_text
    from samullm_plugin.run.progress import RunProgress
    from samullm_plugin.run.replanning import Replanner
    from samullm_plugin.run.run import require_resumable, resume_run, start_run
    from samullm_plugin.run.setup import RunSetup, require_able
    from samullm_plugin.run.signals import draining

    if (output_dir is None) == (resume is None):
        raise InputError("give --output-dir DIR for a new run, or --resume DIR for an old one")
    if resume is not None and (plan is not None or scheduler is not None):
        raise InputError(
            "--resume goes on with the run's own plan; leave out --plan and --scheduler"
        )
    if retry_failed and resume is None:
        raise InputError("--retry-failed goes with --resume DIR")
    directory = resume if resume is not None else output_dir
    assert directory is not None
    before = require_resumable(resume) if resume is not None else ""
    host = PluginHost.from_settings()
    loaded = find_application(host, target, limit=requests.limit)
    planner = planning.over(loaded.planner)
    traces: tuple[PlanTrace, ...] = ()
    found: Plan | None = None
    chosen = scheduler or planner.scheduler.type
    stored = None
    if plan is not None:
        stored = _plan_for(loaded, plan)
        found, chosen = stored.plan, stored.scheduler
    elif resume is not None:
        stored = _plan_for(loaded, resume / "plan.json")
    name = executor or before or usual_executor(host, loaded)
    options: dict[str, object] = {}
    if name == loaded.executor.type:
        options |= loaded.executor.options
    options |= parsed_options(executor_option)
    engines = host.create("executor", name, options)
    named = None if loaded.cluster is None else cluster_of(loaded, planning.gpus)
    require_able(engines, planner, named)
    context.with_resource(engines.kept_warm())
    engines.begin_opening()
    fused = None if stored is None else stored.fused
    instance = make_instance(host, loaded, planner, gpus=planning.gpus, fused=fused)
    check_stages(engines, instance.problem, planner)
    if stored is not None:
        path = plan or directory / "plan.json"
        instance = instance.with_stored_policy(host, stored.request_policy, path)
    problem = instance.problem
    if plan is not None and stored is not None and (why := _misfit(problem, stored)):
        raise InputError(
            f"{plan}: the plan does not fit {loaded.app.name} on {problem.cluster.size_text}: "
            f"{why}; give the cluster that it was made for, or leave --plan out"
        )
    reused = requests.reused()
    known = None
    if resume is None:
        known = known_outputs(reused, engines.engine_version(), loaded, problem)
    remaining = problem if known is None else known.problem
    if (text := known_text(known, problem)) is not None:
        console().print(f"{text}; they are not asked again", markup=False)
    simulator = instance.simulator(host, remaining)
    replaced = stored is not None and resume is not None and _misfit(problem, stored)
    if replaced:
        console().print(f"the plan of the run does not fit any more ({replaced}): planning again")
    if found is None and (resume is None or replaced):
        given = planner.scheduler.options if chosen == planner.scheduler.type else {}
        how = instance.planning_options(host, given)
        result = make_plan(host, remaining, chosen, how, simulator=simulator)
        found, traces = result.plan, result.traces
        instance, remaining = instance.as_planned(result), result.problem
        problem, simulator = instance.problem, instance.simulator(host, remaining)
    progress = RunProgress(problem.app, traces)
    with RunDisplay(progress, quiet=is_quiet()) as display, draining() as interruptible:

        def on_start(coordinator: Coordinator) -> None:
            interruptible(coordinator.request_drain)
            if not traces:
                first = read_plan(directory / "plan.json").plan
                progress.expect(simulator.simulate(first))
            progress.take_up(coordinator.ledger, coordinator.now_s)

        setup = RunSetup(
            host,
            loaded,
            instance,
            name,
            directory,
            options,
            replanner=Replanner(host, instance) if replan else None,
            listener=display.take,
            on_start=on_start,
            reuse=reused,
            remaining=remaining,
        )
        if resume is None:
            assert found is not None
            outcome = start_run(setup, found, chosen)
        else:
            new = None
            if found is not None:
                policy = instance.policy_name
                new = StoredPlan.of(found, problem, chosen, request_policy=policy)
            outcome = resume_run(setup, new, retry_failed=retry_failed)
    _report(outcome)
    if output_json is not None:
        write_json(outcome.metrics, output_json)
    if outcome.drained:
        return INTERRUPTED
    return 1 if outcome.failed else 0


def _plan_for(loaded: LoadedApplication, path: Path) -> StoredPlan:
    """Return a stored plan.

    Raises:
        InputError: if the file is wrong, or fuses nodes that the application does not have.
    """
    from samullm_plugin.planning.artifacts import read_plan

    stored, nodes = read_plan(path), {n.name for n in loaded.app.nodes}
    for name, parts in stored.fused.items():
        if missing := [p for p in parts if p not in nodes]:
            raise InputError(
                f"{path}: fused.{name} names {missing[0]}, which application {loaded.app.name} "
                "does not have: the plan was made for another one; plan again"
            )
    return stored


def _misfit(problem: Problem, stored: StoredPlan) -> str:
    """Return why a run's plan cannot be carried out any more; empty if it can."""
    from samullm_plugin.rules.verify import verify

    return "; ".join(str(v) for v in verify(problem, stored.plan)[:1])


def _report(outcome: RunOutcome) -> None:
    """Print what came of a run."""
    metrics = outcome.metrics
    rows = [
        (
            name,
            node["requests"]["finished"],
            node["requests"]["skipped"],
            node["requests"]["failed"],
            node["completion_tokens"],
            None if node["tokens_per_s"] is None else f"{node['tokens_per_s']:,.0f}",
            _seconds(node["finish_s"].get("planned")),
            _seconds(node["finish_s"]["measured"]),
        )
        for name, node in metrics["nodes"].items()
    ]
    columns = ("Node", "Done", "Skipped", "Failed", "Tokens", "Tokens/s", "Planned s", "Measured s")
    print_table(columns, rows, numbers=columns[1:])
    out = console()
    makespan = metrics["makespan_s"]
    text = f"makespan {makespan['measured']:.1f} s"
    if makespan.get("planned") is not None:
        text += f" (planned {makespan['planned']:.1f} s)"
    out.print(f"{text}; files in {outcome.directory}", markup=False)
    alike: dict[tuple[str, str], list[str]] = {}
    for node, request, reason in outcome.failed:
        alike.setdefault((node, reason), []).append(request)
    for (node, reason), requests in list(alike.items())[:SHOWN_FAILURES]:
        who = requests[0] if len(requests) == 1 else f"{len(requests)} requests from {requests[0]}"
        out.print(f"failed: {node} {who}: {reason}", markup=False, soft_wrap=True)
    if len(alike) > SHOWN_FAILURES:
        more = sum(len(r) for r in list(alike.values())[SHOWN_FAILURES:])
        out.print(f"... and {more} more failed requests")
    if outcome.drained:
        out.print(f"interrupted; go on with --resume {outcome.directory}", markup=False)


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"
