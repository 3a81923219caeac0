"""1,024 simulated engines, one part of ``docs/scale.md`` at a time.

    python -m benchmarks.scale

``engines``: one coordinator of the product with 2 and with 1,024 engines that answer at once.
``groups``: the same plan of four models, simulated whole on 1,024 devices and as 128 groups of
eight, each with its share of the rows.
``feeding``: engines that are given requests by coordinators which need so many microseconds of
processor time for each: how much of the engines' room stays empty.
``shards``: 100 million rows in shards that groups take one after another, one of them lost halfway.

Only the first two run code of the product. ``feeding`` and ``shards`` are models: an engine takes a
request for a drawn time whatever else it has, and a group a shard.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.coordinator import measure
from samullm_plugin import Assignment, EngineOptions, ParallelConfig, Plan, Stage
from samullm_plugin.simulator import PlanSimulator
from samullm_plugin.testing.factories import TestNode, make_problem

ENGINES, PER_GROUP = 1024, 8
REQUEST_US = 43.0
"""Processor time of the coordinator per request, of docs/running.md."""
SLOTS, WINDOW = 256, 3 * 256
"""Requests that an engine runs at once, and those it is given at most."""


def engines() -> None:
    """What a request costs one coordinator of so many engines."""
    for count in (2, ENGINES):
        with tempfile.TemporaryDirectory(prefix="samullm-scale-") as folder:
            found = measure(50_000, Path(folder), engines=count)
        print(
            f"engines: {count:5} engines, {found['requests']:,} requests: "
            f"{found['cpu_us_per_request']:.0f} us of processor time per request, "
            f"{found['journal_bytes_per_request_beside_text']} bytes of journal, "
            f"resumed in {found['resume_s']:.1f} s",
            flush=True,
        )


def makespan_s(lengths: list[list[int]], devices: int) -> float:
    """Return what models side by side take that share the devices evenly."""
    engine = EngineOptions(max_num_seqs=16)
    nodes = [TestNode(f"n{i}", [64] * len(of), of, engine=engine) for i, of in enumerate(lengths)]
    problem = make_problem(nodes, devices, nvlink=1)
    each = devices // len(nodes)
    size = ParallelConfig(data_parallel_size=each)
    stage = Stage(
        tuple(
            Assignment(n.name, size, tuple(range(i * each, (i + 1) * each)))
            for i, n in enumerate(nodes)
        )
    )
    return PlanSimulator(problem).simulate_scenario(Plan((stage,)), 0).makespan_s


def groups(rows: int = 128 * 256, models: int = 4) -> None:
    """What it costs that each group has rows of its own."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(100), 0.8, (models, rows)), 1, 512).astype(int)
    whole_s = makespan_s([list(map(int, of)) for of in lengths], ENGINES)
    count = ENGINES // PER_GROUP
    shares = np.split(lengths, count, axis=1)  # rows that follow one another, as in shards
    own_s = [makespan_s([list(map(int, of)) for of in share], PER_GROUP) for share in shares]
    print(
        f"groups: {rows:,} rows through {models} models: {count} groups of {PER_GROUP} take "
        f"{np.mean(own_s) / whole_s:.1%} of what the whole takes on average, the last "
        f"{max(own_s) / whole_s:.1%}",
        flush=True,
    )


def empty_share(
    coordinators: int, rate_per_s: float, request_us: float, seconds: float, tick_s: float = 0.05
) -> float:
    """Return the share of all engines' places that stays empty, after the first seconds.

    Args:
        coordinators: with as many engines each.
        rate_per_s: requests that an engine with all places taken finishes.
        request_us: processor time of a coordinator per request.
        seconds: to simulate.
        tick_s: how often a coordinator looks.
    """
    rng = np.random.default_rng(0)
    mean_s = SLOTS / rate_per_s
    ends = rng.exponential(mean_s, (ENGINES, SLOTS))
    waiting = np.full(ENGINES, WINDOW - SLOTS)
    settled = np.zeros(ENGINES, dtype=np.int64)  # finished, and not yet handled by the coordinator
    empty_s = counted_s = now_s = 0.0
    credit = np.zeros(coordinators)
    while now_s < seconds:
        now_s += tick_s
        over = ends <= now_s  # a place that is empty has no end
        while over.any():
            settled += over.sum(axis=1)
            nth = np.cumsum(over, axis=1)
            served = over & (nth <= waiting[:, None])
            waiting -= served.sum(axis=1)
            ends[served] += rng.exponential(mean_s, int(served.sum()))
            ends[over & ~served] = np.inf
            over = served & (ends <= now_s)
        credit = np.minimum(credit + tick_s * 1e6 / request_us, ENGINES * WINDOW)
        for c, of in enumerate(np.split(np.arange(ENGINES), coordinators)):
            todo = settled[of]
            share = min(1.0, credit[c] / max(1, todo.sum()))
            handled = np.floor(todo * share).astype(np.int64)
            credit[c] = 0.0 if share == 1.0 else credit[c] - handled.sum()
            settled[of] -= handled
            waiting[of] += handled
        free = np.isinf(ends)
        filled = free & (np.cumsum(free, axis=1) <= waiting[:, None])
        waiting -= filled.sum(axis=1)
        ends[filled] = now_s + rng.exponential(mean_s, int(filled.sum()))
        if now_s > seconds / 2:
            empty_s += tick_s * float(np.isinf(ends).mean())
            counted_s += tick_s
    return empty_s / counted_s


def feeding() -> None:
    """How many coordinators keep the engines busy."""
    for rate_per_s in (10.0, 100.0):
        for count in (1, 8, ENGINES // PER_GROUP):
            load = ENGINES / count * rate_per_s * REQUEST_US / 1e6
            seconds = min(60.0, 8 * SLOTS / rate_per_s)
            share = empty_share(count, rate_per_s, REQUEST_US, seconds, seconds / 400)
            print(
                f"feeding: {rate_per_s:5.0f} requests/s an engine, {count:3} coordinators, each "
                f"asked for {load:.2f} of a processor: {share:.1%} of the places empty",
                flush=True,
            )


def shards() -> None:
    """How even the end is, by the size of shards."""
    rows, count, rate_per_s = 100_000_000, ENGINES // PER_GROUP, 10.0 * PER_GROUP
    ideal_s = rows / (count * rate_per_s)
    for size in (rows // count, 200_000, 50_000, 10_000):
        rng = np.random.default_rng(0)
        left = rows // size
        speed = rng.normal(1.0, 0.03, count)  # of groups: machines differ a little
        lost = 0.5 * ideal_s  # when the first group's machine goes
        free = [(0.0, g) for g in range(count)]
        heapq.heapify(free)
        last_s, again = 0.0, 0
        while left:
            at_s, g = heapq.heappop(free)
            if g == 0 and at_s >= lost:
                continue
            took_s = size / (rate_per_s * speed[g]) * rng.lognormal(0.0, 0.05)
            if g == 0 and at_s + took_s > lost:  # what it had begun is done anew elsewhere
                again += 1
                continue
            left -= 1
            last_s = max(last_s, at_s + took_s)
            heapq.heappush(free, (at_s + took_s, g))
        print(
            f"shards: of {size:,} rows: {rows // size:,} shards, {last_s / ideal_s - 1:.1%} longer "
            f"than {count} groups that never fail and end together; {again} done anew",
            flush=True,
        )


PARTS: dict[str, Callable[[], None]] = {
    "engines": engines, "groups": groups, "feeding": feeding, "shards": shards
}  # fmt: skip


def main() -> None:
    """Check the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    for name in parser.parse_args().parts or PARTS:
        began_s = time.process_time()
        PARTS[name]()
        print(f"{name}: {time.process_time() - began_s:.0f} s of processor time", flush=True)


if __name__ == "__main__":
    main()
