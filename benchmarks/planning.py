"""How long planning takes, how that grows, and how good the plans are.

    python benchmarks/planning.py times             # bundled applications at full size on 8 GPUs
    python benchmarks/planning.py growth [--plot F] # nodes, GPUs, requests per node; matplotlib
    python benchmarks/planning.py quality [--seeds 30] [--gpus 8,4] [APPLICATION ...]

Times are the least of several runs in one process, after one that compiles; published search times
of the first implementation stand beside them. Quality is the realised time on hidden lengths (other
draws of the planner's distribution, the same for all schedulers), the processor seconds of
planning included, so that the machine's load is not in them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np

from samullm_plugin import Application, Cluster, Problem
from samullm_plugin.bench.cases import BenchCase, CaseSettings, make_case
from samullm_plugin.bench.rows import warm_up
from samullm_plugin.errors import SamullmError
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.building import build_problem
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.rules.bounds import lower_bound
from samullm_plugin.simulator import PlanSimulator

TARGETS = (
    ("ensembling:requests=10000,max_tokens=256", 2.0, "22-69 s"),
    ("routing:known=false", 0.5, "<= 15 s"),
    ("chain-summary:documents=300,judges=6", 2.0, "up to 142-191 s"),
    ("mixed:documents=300,requests=5000", 3.0, "<= 68 s"),
)
"""Application, target of greedy with one scenario, published search time (all of the planner)."""

APPLICATIONS = (
    "ensembling:requests=1000,max_tokens=256",
    "ensembling:requests=5000,max_tokens=256",
    "ensembling:requests=10000,max_tokens=256",
    "ensembling:requests=1000,max_tokens=512",
    "ensembling:requests=10000,max_tokens=512",
    "routing:known=false",
    "routing:known=true",
    "chain-summary:documents=100,judges=1",
    "chain-summary:documents=100,judges=4",
    "chain-summary:documents=300,judges=6",
    "chain-summary:documents=300,judges=6,summariser=mixtral",
    "chain-summary:documents=500,judges=8",
    "mixed:documents=100,requests=5000",
    "mixed:documents=300,requests=5000",
    "map-reduce",
    "vote",
    "filter-vote",
    "document-questions",
)
PUBLISHED = {
    "ensembling": "1.1-2.4x, 1.0-1.6x",
    "routing": "1.4-1.8x, 1.0-1.1x",
    "chain-summary": "1.0-1.3x, 1.0-1.4x",
    "mixed": "1.2-1.4x, 1.2-1.4x",
}
"""Speedups of the published planner over its max- and min-heuristic, by application."""

SCHEDULERS = ("max-heuristic", "min-heuristic", "greedy", "auto")


def planning_s(
    host: PluginHost, problem: Problem, scheduler: str, options: Mapping[str, object], repeats: int
) -> tuple[float, float]:
    """Return the least wall and processor seconds of several runs without kept results."""
    wall_s, processor_s = [], []
    for _ in range(repeats):
        began_s = time.process_time()
        result = make_plan(host, problem, scheduler, PlanningOptions(options=options))
        processor_s.append(time.process_time() - began_s)
        wall_s.append(result.planning_s)
    return min(wall_s), min(processor_s)


def times(host: PluginHost, repeats: int) -> None:
    """Print planning times of the bundled applications."""
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    print("seconds, in brackets those of the processor (all threads); least of several runs")
    head = f"{'1 scenario':>17}{'8 scenarios':>17}{'target':>8}  published"
    print(f"{'application':44}{'scheduler':30}{head}")
    variants: tuple[tuple[str, dict[str, object]], ...] = (
        ("greedy", {}),
        ("greedy", {"preemption": False}),
        ("greedy", {"objective": "corrected"}),
        ("max-heuristic", {}),
        ("min-heuristic", {}),
        ("auto", {}),
    )
    for text, target_s, published in TARGETS:
        cases = [
            make_case(host, text, CaseSettings(scenarios=n, seeds=0, shifts=())).problem
            for n in (1, 8)
        ]
        for name, options in variants:
            one, eight = (planning_s(host, p, name, options, repeats) for p in cases)
            label = " ".join([name, *(f"{k}={v}" for k, v in options.items())])
            goal_s = 5.0 if name == "auto" else target_s if label == "greedy" else None
            goal = "" if goal_s is None else f"{goal_s:.1f}"
            columns = "".join(f"{wall_s:9.2f} ({cpu_s:5.2f})" for wall_s, cpu_s in (one, eight))
            print(f"{text:44}{label:30}{columns}{goal:>8}  {published}")
        plan = make_plan(host, cases[0], "min-heuristic").plan
        fresh = PlanSimulator(cases[0])
        began_s = time.perf_counter()
        fresh.simulate(plan)
        once_s = time.perf_counter() - began_s
        print(f"{text:44}{'(simulating one plan once)':30}{once_s:11.3f}")


def scaled(host: PluginHost, nodes: int, gpus: int, requests: int) -> Problem:
    """Return an ensembling of so many models, the bundled ones again and again."""
    text = f"ensembling:requests={requests},max_tokens=256"
    case = make_case(host, text, CaseSettings(seeds=0, shifts=(), gpus=gpus))
    bundled = case.problem.app.nodes
    copies = tuple(replace(bundled[i % len(bundled)], name=f"model-{i}") for i in range(nodes))
    app = Application(f"ensembling of {nodes}", copies)
    cluster = Cluster.uniform(case.problem.cluster.gpus[0], gpus, nvlink=2)
    return build_problem(
        app,
        cluster,
        host.create("length-estimator", "ecdf"),
        host.create("latency-model", "linear"),
        scenarios=1,
        rng=np.random.default_rng(0),
    )


def growth(host: PluginHost, repeats: int, plot: str | None) -> None:
    """Print how planning times grow with nodes, GPUs and requests, one at a time."""
    series: dict[str, list[tuple[int, dict[str, float]]]] = {
        "nodes": [],
        "GPUs": [],
        "requests": [],
    }
    steps = (
        ("nodes", (4, 8, 16, 32, 64), lambda n: (n, 8, 1000)),
        ("GPUs", (4, 8, 16, 32, 64), lambda n: (8, n, 1000)),
        ("requests", (1000, 3000, 10_000, 30_000, 100_000), lambda n: (8, 8, n)),
    )
    print("others: 8 nodes, 8 GPUs, 1000 requests per node; seconds")
    print(f"{'':12}{'':>8}" + "".join(f"{s:>16}" for s in SCHEDULERS))
    for what, values, sizes in steps:
        for value in values:
            problem = scaled(host, *sizes(value))
            taken = {s: planning_s(host, problem, s, {}, repeats)[0] for s in SCHEDULERS}
            series[what].append((value, taken))
            print(f"{what:12}{value:8}" + "".join(f"{taken[s]:16.2f}" for s in SCHEDULERS))
    if plot is not None:
        draw(series, plot)


def draw(series: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]], path: str) -> None:
    """Write a plot of the growth, doubly logarithmic."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(1, len(series), figsize=(11, 3.4), sharey=True)
    for ax, (what, rows) in zip(axes, series.items(), strict=True):
        for name in SCHEDULERS:
            ax.loglog([v for v, _ in rows], [t[name] for _, t in rows], marker="o", label=name)
        ax.set_xlabel("requests per node" if what == "requests" else what)
        ax.set_xticks([v for v, _ in rows], [f"{v:,}" for v, _ in rows], fontsize=8)
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.grid(visible=True, which="major", alpha=0.3)
    axes[0].set_ylabel("planning time (s)")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


@dataclass(frozen=True)
class Realised:
    """What one scheduler's plan takes on the hidden draws.

    Attributes:
        planning_s: processor seconds of planning, of all threads.
        makespan_s: without planning, one per draw.
    """

    planning_s: float
    makespan_s: np.ndarray

    @property
    def total_s(self) -> np.ndarray:
        """Return the makespans with planning."""
        return self.makespan_s + self.planning_s


def realise(host: PluginHost, case: BenchCase, scenarios: int) -> dict[str, Realised]:
    """Return what every scheduler's plan takes on the hidden draws.

    ``auto`` and ``exact`` see ``scenarios`` length scenarios, the others the first of them: their
    plans are no better with more, and planning is quicker.
    """
    problem = case.problem
    first = problem.with_scenarios(problem.scenarios[:1])
    hidden = next(h for h in case.hidden if h.label == "same")
    simulator = PlanSimulator(hidden.problem)
    found = {}
    for scheduler in (*SCHEDULERS, "exact"):
        seen = problem if scheduler in ("auto", "exact") else first
        began_s = time.process_time()
        try:
            result = make_plan(host, seen, scheduler)
        except SamullmError as error:  # reported, and the others go on
            print(f"{case.application}, {scheduler}: {error}", file=sys.stderr)
            continue
        planning_s = time.process_time() - began_s
        makespans = [t.makespan_s for t in simulator.simulate(result.plan)]
        found[scheduler] = Realised(planning_s, np.array(makespans))
    return found


def quality(
    host: PluginHost, names: Sequence[str], seeds: int, gpus: Sequence[int], scenarios: int
) -> None:
    """Print realised times on hidden lengths, planning included, paired over the draws."""
    print(
        f"Mean of {seeds} hidden draws, seconds, the processor seconds of planning included "
        f"(auto's and exact's in brackets; both see {scenarios} length scenarios, the others one). "
        "Against the better heuristic: mean of the paired differences and its standard error. "
        "Room: how far the bound lies below the better heuristic.\n"
    )
    columns = "application, GPUs", "auto", "greedy", "exact", "max", "min"
    head = (*columns, "auto vs better", "room", "speedup over max, min", "published")
    print("| " + " | ".join(head) + " |")
    print("|---|" + "--:|" * 9)
    for count in gpus:
        for text in names:
            given = CaseSettings(scenarios=scenarios, seeds=seeds, shifts=(), gpus=count)
            case = make_case(host, text, given)
            hidden = next(h for h in case.hidden if h.label == "same").problem
            found = realise(host, case, scenarios)
            total_s = {name: r.total_s.mean() for name, r in found.items()}
            better = min(("max-heuristic", "min-heuristic"), key=total_s.__getitem__)
            ratio = 100 * (found["auto"].total_s / found[better].total_s - 1)
            error = ratio.std(ddof=1) / np.sqrt(len(ratio)) if len(ratio) > 1 else 0.0
            bound_s = np.mean([lower_bound(hidden, s).value_s for s in hidden.scenarios])
            cells = [f"`{text}`, {count}"]
            for name in ("auto", "greedy", "exact", "max-heuristic", "min-heuristic"):
                cell = f"{total_s[name]:,.1f}" if name in total_s else "-"
                if name in ("auto", "exact") and name in found:
                    cell += f" ({found[name].planning_s:.1f})"
                cells.append(cell)
            over = [total_s[h] / total_s["auto"] for h in ("max-heuristic", "min-heuristic")]
            cells += [
                f"{ratio.mean():+.2f} ± {error:.2f} %",
                f"{100 * (1 - bound_s / total_s[better]):.0f} %",
                f"{over[0]:.2f}x, {over[1]:.2f}x",
                PUBLISHED.get(text.partition(":")[0], "-"),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("times", "growth", "quality"))
    parser.add_argument("applications", nargs="*", default=list(APPLICATIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--gpus", default="8,4")
    parser.add_argument("--scenarios", type=int, default=8)
    parser.add_argument("--plot")
    given = parser.parse_intermixed_args()
    host = PluginHost()
    warm_up(host, (*SCHEDULERS, "exact"))
    if given.plot and find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed; pip install matplotlib")
    if given.part == "times":
        times(host, given.repeats)
    elif given.part == "growth":
        growth(host, given.repeats, given.plot)
    else:
        gpus = [int(g) for g in given.gpus.split(",")]
        quality(host, given.applications, given.seeds, gpus, given.scenarios)


if __name__ == "__main__":
    main()
