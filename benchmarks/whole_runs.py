"""Whole real vLLM 0.19 runs against the simulation with latencies from layer profiles.

Reads ``../shared/data/vllm019_runs`` beside the checkout (runs and layer profiles of
casys-kaist/LLMServingSim @ 5daddb21, MIT) and says so where it is absent. Run from the
repository's root::

    python benchmarks/whole_runs.py                        # the table
    python benchmarks/whole_runs.py --plots OUT            # and OUT/<run>.png (extra: report)
    python benchmarks/whole_runs.py --write docs/accuracy-runs.md

Arrivals and lengths are the recorded ones; engine arguments those recorded with the run. Nothing is
fitted to the runs.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from samullm_layers.plugin import LayersLatency, LayersOptions

from samullm_plugin import (
    EngineConfig,
    EngineOptions,
    EngineRun,
    Gpu,
    ModelSpec,
    Workload,
    bundled_model,
    simulate_engine,
)

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "vllm019_runs"

METHOD = """## Method

*Latency*: plugin `layers` on the layer profile of the run's device, model and tensor-parallel size;
all-reduces of several devices from the link speed and latency of the run's `config.json`.
*Workload*: recorded arrival times, prompt and output lengths. *Engine*: arguments recorded with the
run (`vllm/meta.json`); where it does not say, vLLM 0.19's defaults (prefix caching and asynchronous
scheduling on). Prefix caching matters even though no two prompts are alike: a preempted request
finds its own blocks again.

*KV capacity*, run with `kv_cache_pct` above 0: a share of whole blocks was logged, rounded to two
decimals, so the number of usable blocks is the one of which every logged percentage is a whole
number of blocks. Its multiples would do as well; the tokens held tell which: over ticks at which
nothing waits, blocks of the running requests (prompt plus the share of the output between first
and last token) divided by the percentage. One more block is the null block vLLM keeps. Where
`vllm/meta.json` holds the number found at start, it is the check, not the source. Run with
`kv_cache_pct` 0 throughout: nothing to infer from; the capacity is what `layers` predicts from
memory, and it is not what limits that run (`peak` blocks used against `blocks`).

*Compute*: seconds to read the profile, compose it and simulate the run, the compiled loop loaded.
"""


@dataclass(frozen=True)
class Recorded:
    """One recorded run.

    Attributes:
        name: of its folder.
        arrival_s, queued_s, scheduled_s, first_s, last_s: seconds after the first arrival (by the
            caller's clock) or the first queuing (by the engine's).
        prompt_tokens, output_tokens: lengths.
        ticks: time, running, waiting and share of KV blocks in use, shape ``(m, 4)``.
        about: ``meta.json``.
        instance: the engine's section of ``config.json``.
        link: bytes per second and seconds of the link between devices.
    """

    name: str
    arrival_s: np.ndarray
    queued_s: np.ndarray
    scheduled_s: np.ndarray
    first_s: np.ndarray
    last_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    ticks: np.ndarray
    about: dict[str, Any]
    instance: dict[str, Any]
    link: tuple[float, float]

    @property
    def makespan_s(self) -> float:
        """Return the seconds from the first queuing to the last token."""
        return float(self.last_s.max())

    @property
    def mean_latency_s(self) -> float:
        """Return the mean seconds from queuing to the last token."""
        return float((self.last_s - self.queued_s).mean())


def read_run(folder: Path) -> Recorded:
    """Return a recorded run, requests in order of arrival."""
    with gzip.open(folder / "vllm" / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        requests = sorted((json.loads(line) for line in file), key=lambda r: r["arrival_time"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with (folder / "vllm" / "timeseries.csv").open(encoding="utf-8") as file:
        ticks = [
            [float(r[c]) for c in ("t", "running", "waiting", "kv_cache_pct")]
            for r in csv.DictReader(file)
        ]

    def column(name: str) -> np.ndarray:
        return np.array([r[name] for r in requests])

    start = column("queued_ts").min()
    return Recorded(
        folder.name,
        column("arrival_time") - column("arrival_time").min(),
        *(column(c) - start for c in ("queued_ts", "scheduled_ts", "first_token_ts")),
        column("last_token_ts") - start,
        column("input_toks"),
        column("output_toks"),
        np.array(ticks),
        json.loads((folder / "vllm" / "meta.json").read_text(encoding="utf-8")),
        config["nodes"][0]["instances"][0],
        (config["link_bw"] * 1e9, config["link_latency"] * 1e-9),
    )


def usable_blocks(run: Recorded, block_size: int = 16) -> int | None:
    """Return the KV blocks that requests can use, inferred as ``METHOD`` says.

    None where the run logged no use, or no number of blocks explains every percentage.
    """
    percent = run.ticks[:, 3]
    coarse = []
    for t, running, waiting, share in run.ticks:
        if waiting or not running or share < 5:
            continue
        held = (run.scheduled_s <= t) & (t < run.last_s)
        if held.sum() != running:
            continue
        done = np.clip((t - run.first_s) / (run.last_s - run.first_s), 0, 1) * run.output_tokens
        blocks = np.ceil((run.prompt_tokens + done)[held] / block_size).sum()
        coarse.append(100 * blocks / share)
    if not coarse:
        return None
    about = float(np.median(coarse))
    candidates = np.arange(int(about / 1.4), int(about * 1.4) + 1)
    whole = np.round(percent[:, None] * candidates / 100)
    explained = (np.abs(whole / candidates * 100 - percent[:, None]) <= 0.005001).all(axis=0)
    found = candidates[explained]
    return int(found[0]) if len(found) == 1 else None


@dataclass(frozen=True)
class Outcome:
    """A recorded run and its simulation.

    Attributes:
        recorded: the run.
        simulated: its simulation.
        blocks: KV blocks of the engine, the null block included.
        origin: where that number comes from.
        compute_s: seconds of computing.
    """

    recorded: Recorded
    simulated: EngineRun
    blocks: int
    origin: str
    compute_s: float

    @property
    def makespan_error_pct(self) -> float:
        """Return the error of the makespan."""
        return 100 * (self.simulated.makespan_s / self.recorded.makespan_s - 1)

    @property
    def latency_error_pct(self) -> float:
        """Return the error of the mean request latency."""
        latency_s = float((self.simulated.finish_s - self.recorded.arrival_s).mean())
        return 100 * (latency_s / self.recorded.mean_latency_s - 1)

    @property
    def first_token_error_pct(self) -> float:
        """Return the error of the mean time to the first token."""
        simulated = float((self.simulated.first_token_s - self.recorded.arrival_s).mean())
        measured = float((self.recorded.first_s - self.recorded.queued_s).mean())
        return 100 * (simulated / measured - 1)

    def counts(self, times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the simulated running and waiting requests at moments."""
        steps = self.simulated.steps
        assert steps is not None
        step = np.searchsorted(steps.start_s, times_s, side="right") - 1
        going = (step >= 0) & (times_s < self.simulated.makespan_s)
        running = np.where(going, steps.table.num_seqs[np.maximum(step, 0)], 0)
        arrived = np.searchsorted(np.sort(self.recorded.arrival_s), times_s, side="right")
        finished = np.searchsorted(np.sort(self.simulated.finish_s), times_s, side="right")
        return running, np.maximum(arrived - finished - running, 0)


def simulate(run: Recorded) -> Outcome:
    """Simulate a recorded run."""
    arguments = run.about["engine_kwargs"]
    resolved = run.about.get("resolved_config", {})
    name, size = run.instance["model_name"], int(run.instance["tp_size"])
    bundled = bundled_model(name)
    model = ModelSpec(
        name,
        arguments["max_model_len"] or bundled.max_model_len,
        bundled.architecture,
        engine=EngineOptions(
            max_num_seqs=arguments["max_num_seqs"],
            max_num_batched_tokens=arguments["max_num_batched_tokens"],
            enable_prefix_caching=resolved.get("cache_config", {}).get(
                "enable_prefix_caching", True
            ),
            async_scheduling=resolved.get("scheduler_config", {}).get("async_scheduling", True),
        ),
    )
    memory = run.about.get("hardware", {}).get("device_total_memory_bytes")
    gpu = Gpu(run.instance["hardware"], memory or int(run.instance["npu_mem"]["mem_size"] * 2**30))
    options = LayersOptions(
        profiles=DATA / "profiles", link_bytes_per_s=run.link[0], link_latency_s=run.link[1]
    )
    usable = usable_blocks(run)
    workload = Workload(run.prompt_tokens, run.output_tokens, arrival_s=run.arrival_s)
    began = time.perf_counter()
    layers = LayersLatency(options)
    latency = layers.step_latency(model, gpu, size)
    if usable is None:
        blocks, origin = layers.kv_cache_tokens(model, gpu, size) // 16, "predicted from memory"
    else:
        blocks, origin = usable + 1, "from kv_cache_pct"
    config = EngineConfig(
        max_num_seqs=model.engine.max_num_seqs,
        max_num_batched_tokens=model.engine.max_num_batched_tokens,
        max_model_len=model.max_model_len,
        num_blocks=blocks,
        enable_prefix_caching=model.engine.enable_prefix_caching,
        async_scheduling=model.engine.async_scheduling,
    )
    simulated = simulate_engine(config, workload, latency)
    compute_s = time.perf_counter() - began
    recorded = simulate_engine(config, workload, latency, record_steps=True)
    simulated = replace(simulated, steps=recorded.steps)
    return Outcome(run, simulated, blocks, origin, compute_s)


def table(outcomes: list[Outcome]) -> str:
    """Return the figures of the runs as a Markdown table."""
    head = (
        "| run | requests | blocks | peak | preempted | makespan s | measured | error | "
        "mean latency s | measured | error | first token error | running | waiting | compute s |"
    )
    lines = [head, "|---|" + "---:|" * 14]
    for o in outcomes:
        run = o.recorded
        running, waiting = o.counts(run.ticks[:, 0])
        apart = [np.abs(a - b).mean() for a, b in
                 ((running, run.ticks[:, 1]), (waiting, run.ticks[:, 2]))]  # fmt: skip
        latency_s = float((o.simulated.finish_s - run.arrival_s).mean())
        lines.append(
            f"| {run.name} | {len(run.arrival_s)} | {o.blocks:,} {o.origin} | "
            f"{o.simulated.peak_blocks:,} | {o.simulated.num_preemptions} | "
            f"{o.simulated.makespan_s:.2f} | {run.makespan_s:.2f} | "
            f"{o.makespan_error_pct:+.1f} % | {latency_s:.2f} | {run.mean_latency_s:.2f} | "
            f"{o.latency_error_pct:+.1f} % | {o.first_token_error_pct:+.1f} % | "
            f"{apart[0]:.1f} | {apart[1]:.1f} | "
            f"{o.compute_s:.2f} |"
        )
    return "\n".join(lines)


def plot(outcome: Outcome, folder: Path) -> Path:
    """Draw running and waiting counts over time, measured and simulated; return the file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    run = outcome.recorded
    times_s = np.linspace(0, max(run.makespan_s, outcome.simulated.makespan_s), 1200)
    running, waiting = outcome.counts(times_s)
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, what, column, found in (
        (axes[0], "running", 1, running),
        (axes[1], "waiting", 2, waiting),
    ):
        axis.plot(run.ticks[:, 0], run.ticks[:, column], "o", ms=2.5, label="vLLM 0.19, measured")
        axis.plot(times_s, found, lw=1, label="simulated from layer profile")
        axis.set_ylabel(f"requests {what}")
        axis.grid(alpha=0.3)
    axes[0].set_title(
        f"{run.name}: makespan {outcome.makespan_error_pct:+.1f} %, "
        f"mean latency {outcome.latency_error_pct:+.1f} %"
    )
    axes[0].legend()
    axes[1].set_xlabel("seconds")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{run.name}.png"
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return file


def main(arguments: list[str] | None = None) -> int:
    """Print the table; write plots and page if asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write a PNG per run there")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the page there")
    chosen = parser.parse_args(arguments)
    folders = sorted(f.parent for f in DATA.glob("*/config.json"))
    if not folders:
        print(f"no recorded runs: {DATA} is absent", file=sys.stderr)
        return 2
    runs = [read_run(f) for f in folders]
    simulate(runs[0])  # loads the compiled loop
    outcomes = [simulate(run) for run in runs]
    text = table(outcomes)
    print(text)
    if chosen.plots is not None:
        for outcome in outcomes:
            print(plot(outcome, chosen.plots))
    if chosen.write is not None:
        chosen.write.write_text(
            "# Whole recorded runs\n\n"
            "Written by `python benchmarks/whole_runs.py --write docs/accuracy-runs.md`. Runs and "
            "profiles: casys-kaist/LLMServingSim @ 5daddb21 (MIT), vLLM 0.19. Its own simulator "
            "has -4.3 to +1.5 % on the makespan of four such runs, in 157-396 s each.\n\n"
            f"{text}\n\n`running`, `waiting`: mean distance to the counts logged every second.\n\n"
            f"{METHOD}",
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
