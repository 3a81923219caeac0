"""auto against the schedulers it starts from, on random problems of every kind.

Run from the repository root::

    python benchmarks/random_quality.py run FILE [--first 0] [--last 500] [--only 18,42]
    python benchmarks/random_quality.py table FILE

``run`` plans the problems of ``random_problems.py``, the quick ones first, and appends a line to
``FILE`` for each; what is there already is not planned again. ``table`` prints, by size class, how
far auto lies behind (or ahead of) the best of the others, and every problem on which it is behind
by more than ``NOTABLE``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from random_problems import COUNT, Described, make

from samullm_plugin.bench.rows import warm_up
from samullm_plugin.errors import InputError
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.rules.bounds import lower_bound
from samullm_plugin.simulator import PlanSimulator

OTHERS: tuple[tuple[str, dict[str, object]], ...] = (
    ("max-heuristic", {}),
    ("min-heuristic", {}),
    ("greedy", {}),
    (
        "exact",
        {"workers": 1, "branch_nodes": 4_000_000, "deterministic_limit": 4.0, "time_limit_s": 1e6},
    ),
)
"""The schedulers that auto is compared with, and their options: ``exact`` is limited by its work,
so that the table does not depend on the machine's load."""

NOTABLE = 0.001
"""Share by which auto is behind where the table names the problem."""


def measured(host: PluginHost, described: Described) -> dict[str, Any]:
    """Return what every scheduler's plan takes, and how long planning took.

    auto comes first, with nothing kept from others; the others use what it has simulated, so only
    auto's planning time and the first figures of the others' are those of a fresh start.
    """
    problem = described.problem
    simulator = PlanSimulator(problem)
    makespans, seconds, notes = {}, {}, []
    for name, options in (("auto", {}), *OTHERS):
        try:
            how = PlanningOptions(options=options)
            result = make_plan(host, problem, name, how, simulator=simulator)
        except InputError:  # beyond the scheduler
            continue
        makespans[name] = float(result.makespan_s[0])
        seconds[name] = round(result.planning_s, 2)
        if name == "auto":
            notes = list(result.notes)
    return {
        "number": described.number,
        "label": described.label,
        "size": described.size,
        "makespan_s": makespans,
        "planning_s": seconds,
        "notes": notes,
    }


def run(file: Path, numbers: Sequence[int]) -> None:
    """Plan problems, those with least to simulate first, and append what came of each."""
    known = {row["number"] for row in read(file)} if file.exists() else set()
    host = PluginHost()
    warm_up(host, ("auto", *(name for name, _ in OTHERS)))

    def work(number: int) -> float:
        problem = make(number).problem
        sizes = sum(len(problem.parallel_configs(i)) for i in range(len(problem.app.nodes)))
        return float(sizes * problem.app.num_requests + 1e4 * sizes)

    for number in sorted(set(numbers) - known, key=work):
        row = measured(host, make(number))
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{row['label']}: {behind(row):+.2%}", flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows written so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def behind(row: dict[str, Any]) -> float:
    """Return by which share auto is behind the best of the others."""
    makespans = row["makespan_s"]
    best_s = min(v for name, v in makespans.items() if name != "auto")
    return float(makespans["auto"] / best_s - 1)


@cache
def bound_s(number: int) -> float:
    """Return the lower bound of a problem."""
    problem = make(number).problem
    return lower_bound(problem, problem.scenarios[0]).value_s


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the figures by size class, and the losses by name."""
    columns = (
        "size",
        "problems",
        "auto against the best, mean",
        "worst",
        "behind by > 1 %",
        "gap to the bound, mean",
        "planning, median s",
        "longest s",
    )
    print("| " + " | ".join(columns) + " |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for size in [*sorted({r["size"] for r in rows}), "all"]:
        part = [r for r in rows if size in (r["size"], "all")]
        losses = np.array([behind(r) for r in part])
        gaps = np.array([r["makespan_s"]["auto"] / bound_s(r["number"]) - 1 for r in part])
        took = np.array([r["planning_s"]["auto"] for r in part])
        print(
            f"| {size} | {len(part)} | {losses.mean():+.2%} | {losses.max():+.2%} "
            f"| {(losses > 0.01).sum()} | {gaps.mean():.1%} | {np.median(took):.2f} "
            f"| {took.max():.1f} |"
        )
    print()
    for r in sorted(rows, key=behind, reverse=True):
        if behind(r) > NOTABLE:
            values = ", ".join(f"{n} {v:,.1f}" for n, v in r["makespan_s"].items())
            print(f"{r['label']}: {behind(r):+.2%} ({values}); {'; '.join(r['notes'])}")


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("run", "table"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=COUNT)
    parser.add_argument("--only", default="", help="numbers of problems")
    given = parser.parse_args()
    if given.part == "table":
        table(read(given.file))
        return
    only = [int(n) for n in given.only.split(",") if n]
    run(given.file, only or range(given.first, given.last))


if __name__ == "__main__":
    main()
