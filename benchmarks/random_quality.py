"""auto against the schedulers it starts from, on random problems of every kind.

Run from the repository root::

    python benchmarks/random_quality.py run FILE [--sample 150] [--only 18,42]
    python benchmarks/random_quality.py table FILE
    python benchmarks/random_quality.py again FILE [--sample 10] [--only 18,42]
    python benchmarks/random_quality.py shared [--sample 150] [--only 18,42]

``run`` plans the problems of ``random_problems.py`` and appends a line to ``FILE`` for each; what
is there already is not planned again. They come in a fixed random order in which all size classes
advance alike, so that the first ones are a sample of all. ``table`` prints, by size class, how far
auto lies behind (or ahead of) the best of the others and above the lower bound, every problem on
which it is behind by more than ``NOTABLE``, and every plan that is shorter than the bound.
``again`` plans problems of ``FILE`` once more with auto and says which plans are not as long as
they were: none, whatever else the machine does. ``shared`` compares auto's plans with those in
which nodes of one model may share engines at one moment (as ``plan`` and ``run`` let them; the
others here do not), on the problems that have such nodes.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from random_problems import COUNT, Described, make

from samullm_plugin.bench.rows import warm_up
from samullm_plugin.errors import InputError
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.rules.sharing import sharing_choices
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

MAY_REFUSE = ("greedy", "exact")
"""Schedulers that some problems are beyond; the others must plan every one."""

NOTABLE = 0.001
"""Share by which auto is behind where the table names the problem."""

ROUNDING = 1e-9
"""Share by which a plan may be shorter than the bound by rounding alone."""

ORDER_SEED = 2212
"""Of the order in which problems are planned."""


def measured(host: PluginHost, described: Described) -> dict[str, Any]:
    """Return the lower bound, what every scheduler's plan takes, and how long planning took.

    Processor seconds. The bound and auto come with nothing kept from others; the others use what
    auto has simulated, so theirs are not those of a fresh start.
    """
    problem = described.problem
    start_s = process_time()
    bound_s = float(PlanSimulator(problem).lower_bounds_s()[0])
    bounding_s = process_time() - start_s
    simulator = PlanSimulator(problem)
    makespans, seconds, notes = {}, {}, []
    for name, options in (("auto", {}), *OTHERS):
        start_s = process_time()
        try:
            how = PlanningOptions(options=options)
            result = make_plan(host, problem, name, how, simulator=simulator)
        except InputError:
            if name in MAY_REFUSE:
                continue
            raise
        makespans[name] = float(result.makespan_s[0])
        seconds[name] = round(process_time() - start_s, 2)
        if name == "auto":
            notes = list(result.notes)
    return {
        "number": described.number,
        "label": described.label,
        "size": described.size,
        "bound_s": bound_s,
        "bounding_s": round(bounding_s, 3),
        "makespan_s": makespans,
        "planning_s": seconds,
        "notes": notes,
    }


def in_order(numbers: Sequence[int]) -> list[int]:
    """Return numbers of problems in a random order in which all size classes advance alike."""
    classes: dict[str, list[int]] = defaultdict(list)
    for number in numbers:
        classes[make(number).size].append(number)
    rng = np.random.default_rng(ORDER_SEED)
    place = {
        number: (rank + 0.5) / len(classes[size])
        for size in sorted(classes)
        for rank, number in enumerate(rng.permutation(classes[size]).tolist())
    }
    return sorted(numbers, key=place.__getitem__)


def run(file: Path, numbers: Sequence[int]) -> None:
    """Plan problems, and append what came of each."""
    known = {row["number"] for row in read(file)} if file.exists() else set()
    host = PluginHost()
    warm_up(host, ("auto", *(name for name, _ in OTHERS)))
    for number in numbers:
        if number in known:
            continue
        row = measured(host, make(number))
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{row['label']}: {behind(row):+.2%}", flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows written so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def again(rows: Sequence[dict[str, Any]]) -> None:
    """Plan the problems of these rows once more with auto, and print what differs."""
    host = PluginHost()
    differ = 0
    for row in rows:
        before_s = row["makespan_s"]["auto"]
        now_s = float(make_plan(host, make(row["number"]).problem, "auto").makespan_s[0])
        if now_s != before_s:
            differ += 1
            print(f"{row['label']}: {before_s!r} s before, {now_s!r} s now", flush=True)
    print(f"{differ} of {len(rows)} plans differ")


def shared(numbers: Sequence[int]) -> None:
    """Plan problems with auto without and with shared engines, and print what that saves."""
    host, gains = PluginHost(), []
    sharing = PlanningOptions(simulator_of=PlanSimulator)
    for number in numbers:
        described = make(number)
        if not sharing_choices(described.problem):
            continue
        apart = make_plan(host, described.problem, "auto")
        found = make_plan(host, described.problem, "auto", sharing)
        gains.append(float(found.makespan_s[0] / apart.makespan_s[0] - 1))
        print(f"{described.label}: {gains[-1]:+.2%}", flush=True)
    all_gains = np.array(gains)
    print(
        f"{len(gains)} problems: {all_gains.mean():+.1%} in mean, {all_gains.min():+.1%} to "
        f"{all_gains.max():+.1%}; shorter on {(all_gains < -NOTABLE).sum()}"
    )


def behind(row: dict[str, Any]) -> float:
    """Return by which share auto is behind the best of the others."""
    makespans = row["makespan_s"]
    best_s = min(v for name, v in makespans.items() if name != "auto")
    return float(makespans["auto"] / best_s - 1)


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
        "bound, median s",
        "longest s",
    )
    print("| " + " | ".join(columns) + " |")
    print("|---" + "|--:" * (len(columns) - 1) + "|")
    for size in [*sorted({r["size"] for r in rows}), "all"]:
        part = [r for r in rows if size in (r["size"], "all")]
        losses = np.array([behind(r) for r in part])
        gaps = np.array([min(r["makespan_s"].values()) / r["bound_s"] - 1 for r in part])
        took = np.array([r["planning_s"]["auto"] for r in part])
        bounding = np.array([r["bounding_s"] for r in part])
        print(
            f"| {size} | {len(part)} | {losses.mean():+.2%} | {losses.max():+.2%} "
            f"| {(losses > 0.01).sum()} | {gaps.mean():.1%} | {np.median(took):.2f} "
            f"| {took.max():.1f} | {np.median(bounding):.2f} | {bounding.max():.1f} |"
        )
    print()
    for r in sorted(rows, key=behind, reverse=True):
        if behind(r) > NOTABLE:
            values = ", ".join(f"{n} {v:,.1f}" for n, v in r["makespan_s"].items())
            print(f"{r['label']}: {behind(r):+.2%} ({values}); {'; '.join(r['notes'])}")
    plans = [(r, name, s) for r in rows for name, s in r["makespan_s"].items()]
    shorter = [p for p in plans if p[2] < p[0]["bound_s"] * (1 - ROUNDING)]
    print(f"{len(shorter)} of {len(plans)} plans are shorter than the bound")
    for r, name, value_s in shorter:
        print(f"{r['label']}: {name} {value_s:,.2f} s, bound {r['bound_s']:,.2f} s")


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("run", "table", "again", "shared"))
    parser.add_argument("file", type=Path, nargs="?", help="for all but ``shared``")
    parser.add_argument("--sample", type=int, default=COUNT, help="how many problems")
    parser.add_argument("--only", default="", help="numbers of problems")
    given = parser.parse_args()
    only = [int(n) for n in given.only.split(",") if n]
    if given.part == "shared":
        shared(only or in_order(range(COUNT))[: given.sample])
        return
    if given.file is None:
        parser.error("which FILE?")
    if given.part == "table":
        table(read(given.file))
        return
    if given.part == "again":
        rows = [r for r in read(given.file) if not only or r["number"] in only]
        again(rows[: given.sample])
        return
    run(given.file, only or in_order(range(COUNT))[: given.sample])


if __name__ == "__main__":
    main()
