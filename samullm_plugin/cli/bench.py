"""``samullm bench``: applications times schedulers; its sub-commands compare the other plugins."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from samullm_plugin.cli import bench_engines
from samullm_plugin.cli.bench_lengths import lengths
from samullm_plugin.cli.bench_policies import policies
from samullm_plugin.cli.options import parsed_options
from samullm_plugin.cli.output import (
    LOSS,
    OutputJson,
    console,
    least_speedup,
    median_speedup,
    percent,
    print_table,
    progress,
    seconds,
    speedup,
    write_json,
)
from samullm_plugin.errors import InputError, PluginError

if TYPE_CHECKING:
    from samullm_plugin.bench.cases import BenchCase
    from samullm_plugin.bench.rows import BenchRow
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.run.pages import Table

SCHEDULERS = "auto,greedy,exact,max-heuristic,min-heuristic"
ENGINES = "On engines"
"""Panel of the help text."""

app = typer.Typer(add_completion=False, invoke_without_command=True)
app.command()(lengths)
app.command()(policies)


@app.callback()
def bench(
    context: typer.Context,
    apps: Annotated[
        str | None,
        typer.Option(
            help="Applications instead of a suite, separated by spaces: "
            "'ensembling:requests=1000,max_tokens=256 routing'."
        ),
    ] = None,
    schedulers: Annotated[
        str | None,
        typer.Option(help="Stage schedulers, comma separated.", show_default=SCHEDULERS),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="default, small, full or cores.", show_default="default; cores on real engines"
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs of the cluster, instead of each application's own.")
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(help="Hidden length draws per application; on engines also rounds.", min=1),
    ] = 3,
    scenarios: Annotated[
        int, typer.Option(help="Length scenarios the schedulers plan for.", min=1)
    ] = 4,
    shifts: Annotated[
        str, typer.Option(help="Shifted hidden lengths, comma separated; empty: none.")
    ] = "longer,sharegpt",
    exact_limit_s: Annotated[
        float, typer.Option(help="Seconds exact may search on each application.")
    ] = 6.0,
    seed: Annotated[int, typer.Option(help="Seed of lengths and schedulers.")] = 0,
    length_estimator: Annotated[
        str | None,
        typer.Option(help="Where the lengths that schedulers see come from.", show_default="ecdf"),
    ] = None,
    latency_model: Annotated[
        str | None,
        typer.Option(
            help="Where iteration, memory and load figures come from.", show_default="linear"
        ),
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(help="Run the plans: vllm, emulated, simulated.", rich_help_panel=ENGINES),
    ] = None,
    executor_option: Annotated[
        list[str] | None,
        typer.Option(
            help="Option of the executor, as key=value; repeatable.", rich_help_panel=ENGINES
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Latency profile of the devices; measured if not given, where engines compute.",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keeps profiles and runs: the same command goes on where it stopped.",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    time_limit_s: Annotated[
        float | None,
        typer.Option(help="Begin no run later than this.", min=0.0, rich_help_panel=ENGINES),
    ] = None,
    replan: Annotated[
        bool,
        typer.Option(
            "--replan", help="Let plans be replaced while they run.", rich_help_panel=ENGINES
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables as one page.")
    ] = None,
    output_json: OutputJson = None,
) -> None:
    """Compare schedulers on the bundled applications.

    Plans are made for sampled output lengths and carried out on others, which no scheduler saw: in
    simulation, or with --executor on engines. The exit code is 1 if a plugin failed; the rows of
    the others appear in any case.
    """
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from samullm_plugin.bench import cases as bench_cases
    from samullm_plugin.bench.rows import run_case, warm_up
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.planning.planner import PlanningOptions

    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus is {gpus}; a plan needs at least one GPU")
    start = perf_counter()
    host = PluginHost.from_settings()
    _check_combination(context, executor)
    wanted = schedulers or (SCHEDULERS if executor is None else bench_engines.SCHEDULERS)
    names = [s.strip() for s in wanted.split(",") if s.strip()]
    if not names:
        raise InputError("--schedulers is empty; write for example greedy,max-heuristic")
    for name in names:
        host.resolve("scheduler", name)
    if suite is None:
        suite = "cores" if executor is not None and _computes(host, executor) else "default"
    texts = apps.split() if apps is not None else list(bench_cases.suite(suite))
    if not texts:
        raise InputError("--apps is empty; write for example 'routing'")
    if executor is not None:
        from samullm_plugin.bench.engine_cases import EngineBenchSettings

        code = bench_engines.bench_engines(
            host,
            texts,
            names,
            EngineBenchSettings(
                executor,
                parsed_options(executor_option),
                rounds=seeds,
                scenarios=scenarios,
                seed=seed,
                gpus=gpus,
                estimator=length_estimator,
                latency_model=latency_model,
                profile=profile,
                replan=replan,
                time_limit_s=exact_limit_s,
            ),
            work_dir=work_dir,
            time_limit_s=time_limit_s,
            output_json=output_json,
        )
        raise typer.Exit(code)
    settings = bench_cases.CaseSettings(
        scenarios=scenarios,
        seeds=seeds,
        shifts=tuple(s.strip() for s in shifts.split(",") if s.strip()),
        seed=seed,
        gpus=gpus,
        estimator=length_estimator or "ecdf",
        latency_model=latency_model or "linear",
    )

    def options(name: str) -> PlanningOptions:
        return bench_cases.planning_options(host, name, seed, exact_limit_s)

    warm_up(host, names)
    cases: list[BenchCase] = []
    rows: list[BenchRow] = []
    failed: dict[str, str] = {}
    with progress("bench", len(texts) * len(names)) as step:
        for text in texts:
            try:
                case = bench_cases.make_case(host, text, settings)
            except PluginError as error:  # the other applications' rows still appear
                failed[text] = str(error)
                console().print(f"{text}: {error}", markup=False, soft_wrap=True)
                continue
            case_rows = run_case(
                host, case, names, options, on_start=partial(_announce, step, text)
            )
            cases.append(case)
            rows += case_rows
            show_case(case, case_rows)
    wall_s = perf_counter() - start
    show_summary(rows, names, wall_s)
    if html is not None:
        from samullm_plugin.run.pages import write_tables

        by_case = [(c, [r for r in rows if r.application == c.application]) for c in cases]
        notes = [
            *dict.fromkeys(
                note for c in cases for note in (f"{m}: {p}" for m, p in c.provenance.items())
            )
        ]
        notes += [f"{name}: {reason}" for name, reason in failed.items()]
        subtitle = f"Seconds on lengths that no plan has seen; {wall_s:.0f} s of computing."
        tables = [case_table(*pair) for pair in by_case]
        write_tables(html, "Schedulers side by side", subtitle, tables, notes=notes)
        console().print(f"page written to {html}", markup=False)
    if output_json is not None:
        write_json(
            {
                "rows": [asdict(r) for r in rows],
                "cases": [
                    {
                        "application": c.application,
                        "num_gpus": c.num_gpus,
                        "assumptions": c.problem.app.notes,
                        "latency": c.provenance,
                    }
                    for c in cases
                ],
                "failed": failed,
                "settings": asdict(settings),
                "wall_s": wall_s,
                "cpu_count": os.cpu_count(),
                "python": sys.version.split()[0],
            },
            output_json,
        )
    if failed or any(r.failed for r in rows):
        raise typer.Exit(1)


def _check_combination(context: typer.Context, executor: str | None) -> None:
    """Refuse options that would have no effect.

    Raises:
        InputError: naming the option.
    """
    without = () if executor is None else ("shifts",)
    needing = (
        ("executor_option", "profile", "work_dir", "time_limit_s", "replan")
        if executor is None
        else ()
    )
    for name in (*without, *needing):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            why = "needs --executor" if name in needing else "has no effect with --executor"
            raise InputError(f"{option} {why}")


def _computes(host: PluginHost, executor: str) -> bool:
    """Return whether an executor's engines generate their own tokens."""
    from samullm_plugin.run.setup import imitates

    return not imitates(host.create("executor", executor))


def _announce(step: Callable[[str], None], text: str, name: str) -> None:
    step(f"{text} {name}")


def case_table(case: BenchCase, rows: Sequence[BenchRow]) -> Table:
    """Return one application's table."""
    from samullm_plugin.run.pages import Table

    shifts = sorted({s for r in rows for s in r.shifted_s})
    numbers = (
        "planned s", "realised s", *shifts, "planning s", "total s", "idle", "bound s", "gap",
        "vs max", "vs min",
    )  # fmt: skip
    requests = case.problem.app.num_requests
    title = (
        f"{case.application} on {case.num_gpus} GPUs: "
        f"{len(case.problem.app.nodes)} models, {requests:,} requests"
    )
    table = []
    for r in rows:
        table.append(
            (
                r.scheduler,
                _status(r),
                seconds(r.simulated_s),
                seconds(r.realised_s),
                *(seconds(r.shifted_s.get(s)) for s in shifts),
                seconds(r.planning_s),
                seconds(r.total_s),
                percent(r.idle_share),
                seconds(r.bound_s),
                percent(r.gap),
                speedup(r.speedup_max),
                speedup(r.speedup_min),
            )
        )
    return Table(title, ("scheduler", "status", *numbers), table, numbers)


def show_case(case: BenchCase, rows: Sequence[BenchRow]) -> None:
    """Print one application's table."""
    table = case_table(case, rows)
    print_table(table.columns, table.rows, title=table.title, numbers=table.numbers)
    for r in rows:
        if r.note:
            console().print(f"  {r.scheduler}: {r.note}", markup=False, soft_wrap=True)
        elif r.structure_bound_s is not None:
            console().print(
                f"  {r.scheduler}: proven {r.structure_bound_s:.1f} s at least, its plan "
                f"{_or_dash(r.structure_objective_s)} s, for {r.structure}",
                markup=False,
                soft_wrap=True,
            )


def show_summary(rows: Sequence[BenchRow], names: Sequence[str], wall_s: float) -> None:
    """Print how often each scheduler wins and loses, and what the figures mean."""
    table = []
    for name in names:
        mine = [r for r in rows if r.scheduler == name]
        done = [r for r in mine if r.total_s is not None]
        over_max = [r.speedup_max for r in done if r.speedup_max is not None]
        over_min = [r.speedup_min for r in done if r.speedup_min is not None]
        lost = [min(r.speedup_max or LOSS, r.speedup_min or LOSS) < LOSS for r in done]
        table.append(
            (
                name,
                f"{len(done)}/{len(mine)}",
                sum(1 for r in done if r.status is not None and r.status.value == "optimal"),
                median_speedup(over_max),
                median_speedup(over_min),
                least_speedup(over_max),
                least_speedup(over_min),
                sum(lost) if over_max or over_min else None,
            )
        )
    columns = (
        "scheduler", "plans", "proven optimal", "median vs max", "median vs min", "worst vs max",
        "worst vs min", "losses",
    )  # fmt: skip
    print_table(columns, table, title="summary", numbers=columns[1:])
    console().print(
        "planned: mean makespan on the lengths the scheduler saw. realised: on hidden draws of the "
        "same distribution. total: realised plus planning; vs max, vs min: total of the heuristic "
        "over this total, a loss is marked with !. bound: no plan takes less on the lengths seen; "
        "gap: planned over bound. All times are simulated, planning excepted.",
        style="dim",
    )
    console().print(f"computed in {wall_s:.1f} s", style="dim")


def _status(row: BenchRow) -> str:
    return "-" if row.status is None else row.status.value


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
