"""Speed of the engine simulator in every mode, on one core: to compare two commits with.

    python -m benchmarks.simulator [--requests 10000] [--largest 1000000]

Everything runs in this one thread on one core, and its processor time is what is measured, so that
other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from samullm_plugin.engine import (
    Curve,
    EngineConfig,
    EngineRun,
    StepLatency,
    StepTable,
    Workload,
    simulate_engine,
)

LATENCY = StepLatency(
    Curve((1.0, 128.0, 129.0, 8192.0), (0.006, 0.006, 0.007, 0.2)),
    Curve.line(0.0, 2e-5),
    prefill_pair_s=1e-10,
    context_token_s=1e-8,
    longest_token_s=1e-7,
    host_by_seqs=Curve.line(0.002, 1e-5),
)
ROOMY = EngineConfig(max_num_seqs=256, num_blocks=20_000)
TIGHT = replace(ROOMY, num_blocks=3_000)
CACHED = {"enable_prefix_caching": True}
SYNC_AND_ASYNC = (("sync", {}), ("async", {"async_scheduling": True}))


class Outside:
    """The same latency as a model the compiled loop does not know."""

    def __init__(self) -> None:
        self.calls = 0

    def step_seconds(self, steps: StepTable) -> np.ndarray:
        """Return the seconds of each iteration."""
        self.calls += 1
        return LATENCY.step_seconds(steps)


def requests(n: int, seed: int = 0) -> Workload:
    """Return ``n`` requests of about 308 prompt and 240 output tokens."""
    rng = np.random.default_rng(seed)
    return Workload(rng.integers(16, 600, n), rng.integers(80, 400, n))


def best(function: Callable[[], EngineRun], repeats: int = 5) -> tuple[float, EngineRun]:
    """Return the least CPU seconds of several runs, and a result."""
    least, result = float("inf"), function()
    for _ in range(repeats):
        started = time.process_time()
        result = function()
        least = min(least, time.process_time() - started)
    return least, result


def print_row(*cells: object, widths: tuple[int, ...]) -> None:
    """Print one line of a table, the first column to the left."""
    first, *rest = zip(cells, widths, strict=True)
    print("  ".join((f"{first[0]!s:<{first[1]}}", *(f"{c!s:>{w}}" for c, w in rest))))


def shared_prefixes(workload: Workload) -> Workload:
    """Return the requests with one of 50 common beginnings of 200 tokens each."""
    rng = np.random.default_rng(2)
    n = len(workload)
    return replace(workload, prefix_id=rng.integers(0, 50, n), prefix_tokens=np.full(n, 200))


def modes() -> list[tuple[str, EngineConfig]]:
    """Return the settings that are timed; those named ``shared`` with shared prefixes."""
    result = []
    for name, asynchronous in SYNC_AND_ASYNC:
        for label, config in (
            ("plenty of blocks", ROOMY),
            ("few blocks", TIGHT),
            ("few blocks, priority", replace(TIGHT, scheduling_policy="priority")),
            ("plenty of blocks, prefix caching", replace(ROOMY, **CACHED)),
            ("few blocks, prefix caching", replace(TIGHT, **CACHED)),
            ("plenty of blocks, shared prefixes", replace(ROOMY, **CACHED)),
            ("few blocks, shared prefixes", replace(TIGHT, **CACHED)),
        ):
            result.append((f"{name}, {label}", replace(config, **asynchronous)))
    return result


def time_modes(n: int) -> None:
    """Time every mode, with and without recorded steps."""
    w = requests(n)
    print(f"\n{n} requests, {int(w.output_tokens.sum())} output tokens, max_num_seqs 256 (warm)")
    widths = (40, 9, 9, 8, 12, 12)
    print_row("mode", "plain ms", "steps ms", "steps", "seq-steps", "preemptions", widths=widths)
    shared = shared_prefixes(w)
    for name, config in modes():
        given = shared if "shared" in name else w
        plain, run = best(lambda c=config, g=given: simulate_engine(c, g, LATENCY))
        recorded, logged = best(
            lambda c=config, g=given: simulate_engine(c, g, LATENCY, record_steps=True), repeats=3
        )
        assert np.allclose(run.finish_s, logged.finish_s, rtol=1e-9)
        assert logged.steps is not None
        print_row(
            name,
            f"{plain * 1e3:.2f}",
            f"{recorded * 1e3:.2f}",
            run.num_steps,
            len(logged.steps.seq_request),
            run.num_preemptions,
            widths=widths,
        )


def time_growth(largest: int) -> None:
    """Time growing numbers of requests."""
    print("\ngrowth (sync, plenty of blocks)")
    widths = (12, 10, 16, 12)
    print_row("requests", "ms", "us per request", "peak MB", widths=widths)
    n = 1000
    while n <= largest:
        w = requests(n)
        seconds, _ = best(lambda w=w: simulate_engine(ROOMY, w, LATENCY), repeats=2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print_row(
            n, f"{seconds * 1e3:.2f}", f"{seconds / n * 1e6:.3f}", f"{peak:.0f}", widths=widths
        )
        n *= 10


def time_outside(n: int) -> None:
    """Time a latency model outside the compiled loop."""
    print(f"\nany vectorised latency model, {n} requests, against the compiled one")
    widths = (40, 12, 12, 8, 8, 8)
    print_row("arrivals", "compiled ms", "outside ms", "ratio", "steps", "calls", widths=widths)
    w = requests(n)
    rng = np.random.default_rng(1)
    span = simulate_engine(ROOMY, w, LATENCY).makespan_s
    for name, arrival_s in (
        ("all at once", None),
        ("20 bursts", np.sort(rng.integers(0, 20, n)) * span / 20),
        ("one by one, as fast as served", np.sort(rng.uniform(0, span, n))),
        ("one by one, ten times as slow", np.sort(rng.uniform(0, 10 * span, n))),
    ):
        case = replace(w, arrival_s=arrival_s)
        inside, run = best(lambda c=case: simulate_engine(ROOMY, c, LATENCY), repeats=2)
        model = Outside()
        outside, same = best(lambda c=case, m=model: simulate_engine(ROOMY, c, m), repeats=1)
        assert np.allclose(run.finish_s, same.finish_s, rtol=1e-9)
        print_row(
            name,
            f"{inside * 1e3:.2f}",
            f"{outside * 1e3:.1f}",
            f"{outside / inside:.1f}",
            run.num_steps,
            model.calls // 2,
            widths=widths,
        )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--largest", type=int, default=1_000_000)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    simulate_engine(ROOMY, requests(10), LATENCY)
    time_modes(options.requests)
    time_growth(options.largest)
    time_outside(options.requests)


if __name__ == "__main__":
    main()
