"""Measure the iterations of live engines, for a latency profile of one's own machine."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from samullm_plugin.core.application import ModelSpec
from samullm_plugin.core.cluster import Cluster, Gpu
from samullm_plugin.core.engine.latency import Floats, StepTable
from samullm_plugin.core.profile.iterations import Iterations
from samullm_plugin.core.profile.probes import Limits, Workload, held_out, probes
from samullm_plugin.errors import InputError, RunError
from samullm_plugin.interfaces.executor import EngineRequest, EngineSpec, Executor

_COLUMNS = (
    "device", "model", "tp", "phase", "batch_size", "context_tokens", "max_seq_len", "new_tokens",
    "shape", "iter_s", "prefill_seqs", "prefill_tokens", "prefill_pairs",
)  # fmt: skip
_READY_S = 1800.0
_ITERATION_S = 600.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one model at one size.

    Attributes:
        rows: iterations to fit.
        unseen: iterations of a workload to check the fit on.
        start_s: seconds until the engine was ready, its files in the page cache.
        seconds: seconds the measuring took.
    """

    rows: Iterations
    unseen: Iterations
    start_s: float
    seconds: float


def measure(
    executor: Executor,
    model: ModelSpec,
    sizes: Sequence[int],
    *,
    device: str,
    kv_cache_tokens: int,
    vocab_size: int,
    run_dir: Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[Measured]:
    """Start an engine of each tensor-parallel size in turn and record its iterations.

    Args:
        executor: not open; it is opened and closed here.
        model: what to measure.
        sizes: tensor-parallel sizes.
        device: what the rows call the device.
        kv_cache_tokens: capacity of the engines.
        vocab_size: prompts are random tokens below it.
        run_dir: engine logs go there.
        report: is told what happens.

    Raises:
        InputError: if the executor records no iterations or the sizes do not fit this machine.
        RunError: if an engine fails.
    """
    executor.check([model])
    cluster = Cluster.uniform(Gpu(device, 1 << 40), max(sizes), nvlink=max(sizes))
    executor.open(cluster, run_dir)
    try:
        return [
            _measure(executor, model, size, device, kv_cache_tokens, vocab_size, report)
            for size in sizes
        ]
    finally:
        executor.close()


def _measure(
    executor: Executor,
    model: ModelSpec,
    size: int,
    device: str,
    kv_cache_tokens: int,
    vocab_size: int,
    report: Callable[[str], None],
) -> Measured:
    began_s = time.monotonic()
    key = f"profile.{size}"
    spec = EngineSpec(key, 0, model, tuple(range(size)), size, 1, kv_cache_tokens)
    executor.start_engine(spec)
    _wait(executor, key, 0, _READY_S)
    executor.stop_engine(key)  # the first start also reads files and imports libraries
    second_s = executor.now_s()
    executor.start_engine(replace(spec, key=f"{key}.again"))
    key = f"{key}.again"
    _wait(executor, key, 0, _READY_S)
    start_s = executor.now_s() - second_s
    report(f"tp {size}: engine ready after {start_s:.1f} s")
    limits = Limits(
        model.engine.max_num_seqs,
        model.engine.max_num_batched_tokens,
        model.max_model_len,
        kv_cache_tokens,
    )
    rng = np.random.default_rng(0)
    _run(executor, key, Workload((16,) * 4, (8,) * 4), vocab_size, rng)  # first iterations warm up
    tables = []
    planned = probes(limits)
    for number, workload in enumerate(planned, start=1):
        tables.append((workload.shape, *_run(executor, key, workload, vocab_size, rng)))
        report(f"tp {size}: {number} of {len(planned)} workloads, {len(tables[-1][2])} iterations")
    check = held_out(limits, rng)
    unseen = [(check.shape, *_run(executor, key, check, vocab_size, rng))]
    executor.stop_engine(key)
    seconds = time.monotonic() - began_s
    return Measured(
        _iterations(tables, model.name, size, device),
        _iterations(unseen, model.name, size, device),
        start_s,
        seconds,
    )


def _wait(executor: Executor, key: str, outputs: int, timeout_s: float) -> None:
    """Wait until an engine is ready (no outputs expected) or has finished so many requests.

    Raises:
        RunError: if it fails, or a request does.
    """
    deadline_s = time.monotonic() + timeout_s
    done = 0
    while time.monotonic() < deadline_s:
        for event in executor.poll(1.0):
            if event.kind == "failed":
                raise RunError(f"engine {event.key} failed: {event.reason}")
            if event.kind == "ready" and not outputs:
                return
            for output in event.outputs:
                if output.error is not None:
                    raise RunError(f"engine {event.key}: {output.error}")
                done += 1
        if outputs and done >= outputs:
            return
    raise RunError(f"engine {key}: nothing for {timeout_s:.0f} s")


def _run(
    executor: Executor,
    key: str,
    workload: Workload,
    vocab_size: int,
    rng: np.random.Generator,
) -> tuple[StepTable, Floats]:
    """Run a workload and return its iterations."""
    executor.take_steps(key)
    sampling = {"temperature": 0.0, "ignore_eos": True}
    pairs = zip(workload.prompt_tokens, workload.output_tokens, strict=True)
    requests = [
        EngineRequest(i, tuple(rng.integers(3, vocab_size, p).tolist()), p, o, sampling=sampling)
        for i, (p, o) in enumerate(pairs)
    ]
    executor.submit(key, requests)
    _wait(executor, key, len(requests), _ITERATION_S * 10)
    taken = executor.take_steps(key)
    if taken is None:
        raise InputError(f"executor {executor.name} records no iterations; profile with vllm")
    return taken


def _iterations(
    tables: Sequence[tuple[str, StepTable, Floats]], model: str, size: int, device: str
) -> Iterations:
    """Return the rows of several workloads as one table."""

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(steps, name) for _, steps, _ in tables])

    steps = StepTable(
        column("num_seqs"),
        column("num_tokens"),
        column("prefill_seqs"),
        column("prefill_tokens"),
        column("prefill_pairs"),
        column("context_tokens"),
        column("longest_tokens"),
    )
    seconds = np.concatenate([s for _, _, s in tables])
    phase = np.where(
        steps.prefill_seqs == 0,
        "decode",
        np.where(steps.prefill_seqs == steps.num_seqs, "prefill", "mixed"),
    )
    shape = np.concatenate([np.full(len(s), name) for name, _, s in tables])
    return Iterations(
        model, size, device, phase, shape, steps.num_seqs, steps, seconds,
        np.full(len(seconds), np.nan),
    )  # fmt: skip


def write_iterations(path: Path, groups: Sequence[Iterations]) -> None:
    """Write rows in the columns that ``read_iterations`` reads."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for rows in groups:
            steps = rows.steps
            for i in range(len(rows)):
                prefill = rows.phase[i] == "prefill"
                context = steps.prefill_tokens[i] if prefill else steps.context_tokens[i]
                longest = steps.prefill_tokens[i] if prefill else steps.longest_tokens[i]
                writer.writerow(
                    (
                        rows.device, rows.model, rows.tensor_parallel_size, rows.phase[i],
                        rows.batch_size[i], int(context), int(longest), steps.num_tokens[i],
                        rows.shape[i], f"{rows.seconds[i]:.9f}", steps.prefill_seqs[i],
                        steps.prefill_tokens[i], f"{steps.prefill_pairs[i]:.1f}",
                    )
                )  # fmt: skip
