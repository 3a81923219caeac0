"""What adjusting a plan at run time is worth when lengths or latencies were mis-estimated.

The plan is made for the planner's own lengths and latencies, and carried out where something else
is true: lengths that the planner estimated at half or at twice their size, or iterations 1.5 times
as long. Three times are compared: with the fixed plan, with planning again while the run goes on,
and with a plan made by one who knew. Every one of these plans is the better of greedy's and
min-heuristic's, so that what is saved is not the difference between schedulers.

    python benchmarks/adjusting.py [--seeds 3] [APPLICATION ...]

On real engines latencies cannot be changed; there the planner is told iterations of two thirds of
what was measured. Runs are kept in the work directory, and not repeated:

    python benchmarks/adjusting.py --executor vllm --work-dir DIR [--time-limit-s 400]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from samullm_plugin.app.spec import Component
from samullm_plugin.bench.engine_cases import CaseBuilder, EngineBenchSettings, EngineCase
from samullm_plugin.engine import StepLatency
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.planning.building import sample_scenarios
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.run.journal import Journal, read_appended
from samullm_plugin.run.replanning import Replanner
from samullm_plugin.run.run import start_run
from samullm_plugin.run.setup import RunSetup

APPLICATIONS = {
    "simulated": (
        "ensembling:requests=1000,max_tokens=256",
        "routing",
        "chain-summary:documents=100,judges=4",
        "mixed:documents=100,judges=4,requests=1000",
    ),
    "vllm": ("cores-mixed",),
}
WORLDS = {
    "as estimated": (1.0, 1.0),
    "lengths estimated at 0.5x": (2.0, 1.0),
    "lengths estimated at 2x": (0.5, 1.0),
    "latencies 1.5x": (1.0, 1.5),
}
"""By name, the true lengths and the true iteration latencies, as factors of the estimates."""

WAYS = ("fixed", "again", "known")


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        application: as on the command line.
        world: what is true.
        way: ``fixed`` plan, planned ``again``, or plan of one who ``known``.
        seed: of the true lengths.
        seconds: makespan.
        planning_s: of each proposal, whether or not it was adopted.
        adopted: plans after the first.
    """

    application: str
    world: str
    way: str
    seed: int
    seconds: float
    planning_s: tuple[float, ...] = ()
    adopted: int = 0


def with_latencies(problem: Problem, factor: float) -> Problem:
    """Return the problem with other iteration latencies."""
    costs = tuple(
        {
            key: replace(mode, latency=mode.latency.scaled(factor))
            for key, mode in modes.items()
            if isinstance(mode.latency, StepLatency)
        }
        for modes in problem.costs
    )
    return Problem(problem.app, problem.cluster, problem.scenarios, costs, problem.page_cache)


def believed_and_true(
    host: PluginHost, problem: Problem, world: str, seed: int, *, real: bool
) -> tuple[Problem, Problem]:
    """Return what the planner believes, and one draw of what is true."""
    lengths, latencies = WORLDS[world]
    estimator = host.create("length-estimator", "ecdf", {"scale": lengths})
    rng = np.random.default_rng([seed, 5])
    truth = problem.with_scenarios(sample_scenarios(problem.app, estimator, rng, 1))
    if real:
        return with_latencies(problem, 1 / latencies), truth
    return problem, with_latencies(truth, latencies)


def best_plan(host: PluginHost, problem: Problem) -> Plan:
    """Return the better of both schedulers' plans."""
    results = [make_plan(host, problem, name) for name in ("greedy", "min-heuristic")]
    return min(results, key=lambda r: r.mean_makespan_s).plan


def carry_out(
    host: PluginHost, case: EngineCase, executor: str, world: str, way: str, seed: int
) -> Run:
    """Run one plan in one world."""
    real = executor == "vllm"
    believed, truth = believed_and_true(host, case.instance.problem, world, seed, real=real)
    planner = case.instance.planner.model_copy(update={"scheduler": Component(type="greedy")})
    instance = replace(case.instance, problem=believed, planner=planner)
    plan = best_plan(host, truth if way == "known" else believed)
    adjusting = Replanner(host, instance) if way == "again" else None
    with tempfile.TemporaryDirectory() as folder:
        setup = RunSetup(
            host,
            case.loaded,
            instance,
            executor,
            Path(folder) / "run",
            replanner=adjusting,
            truth=truth,
        )
        metrics = start_run(setup, plan).metrics
    proposals = adjusting.proposals if adjusting else ()
    return Run(
        case.application,
        world,
        way,
        seed,
        metrics["makespan_s"]["measured"],
        tuple(p.planning_s for p in proposals),
        sum(p.plan is not None for p in proposals),
    )


def row(application: str, world: str, runs: list[Run]) -> str | None:
    """Return a line of the table, or None as long as a run is missing."""
    mine = [r for r in runs if (r.application, r.world) == (application, world)]
    times = {way: np.array([r.seconds for r in mine if r.way == way]) for way in WAYS}
    if not all(len(t) for t in times.values()):
        return None
    fixed, again, known = (float(np.mean(times[way])) for way in WAYS)
    closed = (fixed - again) / (fixed - known) if fixed - known > 0.01 * fixed else np.nan
    planning = [s for r in mine for s in r.planning_s]
    adopted = [r.adopted for r in mine if r.way == "again"]
    return (
        f"| {application} | {world} | {fixed:.1f} | {again:.1f} | {known:.1f} | "
        f"{100 * (1 - again / fixed):+.1f} % | "
        f"{'-' if np.isnan(closed) else f'{100 * closed:.0f} %'} | "
        f"{np.mean(adopted):.1f} of {len(planning) / len(adopted):.1f} | "
        f"{np.median(planning) if planning else 0:.2f} | {max(planning, default=0):.2f} |"
    )


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """Return the work directory, or one that goes afterwards."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    """Run the experiment and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("applications", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--executor", choices=tuple(APPLICATIONS), default="simulated")
    parser.add_argument("--profile", type=Path, help="latency profile of the devices")
    parser.add_argument("--work-dir", type=Path, help="keeps profiles and runs")
    parser.add_argument("--time-limit-s", type=float, default=float("inf"))
    arguments = parser.parse_args()
    host = PluginHost.from_settings()
    started = time.perf_counter()
    texts = arguments.applications or APPLICATIONS[arguments.executor]
    settings = EngineBenchSettings(
        arguments.executor, rounds=0, scenarios=1, profile=arguments.profile
    )
    engines = host.resolve("executor", arguments.executor).value
    with work_folder(arguments.work_dir) as folder, engines.kept_warm():
        builder = CaseBuilder(host, settings, folder, "this machine", print_line)
        cases = [builder.build(text) for text in texts]
        path = folder / "adjusting.jsonl"
        runs = [Run(**r) for r in read_appended(path)] if path.exists() else []
        known = {(r.application, r.world, r.way, r.seed) for r in runs}
        journal = Journal(path)
        for seed in range(arguments.seeds):
            for case in cases:
                for world in WORLDS:
                    for turn in range(len(WAYS)):
                        way = WAYS[(turn + seed) % len(WAYS)]
                        late = time.perf_counter() - started > arguments.time_limit_s
                        if late or (case.application, world, way, seed) in known:
                            continue
                        done = carry_out(host, case, arguments.executor, world, way, seed)
                        runs.append(done)
                        journal.append([asdict(done)])
                        journal.sync()
                        print_line(json.dumps(asdict(done)))
        journal.close()
    print(
        "| application | world | fixed plan s | planned again s | known s | saved | gap closed | "
        "plans adopted | planning median s | max s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for text in texts:
        for world in WORLDS:
            if (line := row(text, world, runs)) is not None:
                print(line)
    left = len(texts) * len(WORLDS) * len(WAYS) * arguments.seeds - len(runs)
    seconds = time.perf_counter() - started
    print(f"\n{arguments.seeds} draws each, {seconds:.0f} s in all, {left} runs left")


def print_line(text: str) -> None:
    """Tell what happens, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
