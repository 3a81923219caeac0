"""Measure the iterations of live engines, for a latency profile of one's own machine."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from samullm_plugin.errors import InputError, RunError
from samullm_plugin.host.interfaces.executor import EngineRequest, EngineSpec, Executor
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.latency import StepTable
from samullm_plugin.model.types import Floats
from samullm_plugin.profiling.iterations import Iterations
from samullm_plugin.profiling.memory import assumed_pool_tokens
from samullm_plugin.profiling.probes import Limits, ProbeWorkload, probes, unseen, warm_up
from samullm_plugin.profiling.profile_files import EngineStart

_COLUMNS = (
    "device", "model", "tp", "phase", "batch_size", "context_tokens", "max_seq_len", "new_tokens",
    "shape", "iter_s", "prefill_seqs", "prefill_tokens", "prefill_pairs",
)  # fmt: skip
_READY_S = 1800.0
_ITERATION_S = 600.0
_MOST_PASSES = 5
_LONG_ENOUGH = 1.5
PROCESS = "process and imports"
REPEAT_S = 20.0
"""Small models are disturbed more, and cost little to run again."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A workload that ran on an engine.

    Attributes:
        name: of the kind of workload.
        workload: its requests.
        steps: its iterations.
        step_s: seconds of each.
        wall_s: seconds from its submission until its last output had come back.
    """

    name: str
    workload: ProbeWorkload
    steps: StepTable
    step_s: Floats
    wall_s: float


@dataclass(frozen=True, slots=True)
class EngineStarts:
    """Starts of an engine, one after another.

    Attributes:
        first_s: seconds of the first, which also reads files, imports and compiles.
        ready_s: seconds of the second.
        prepared_ready_s: seconds of a third, all that needs no device having been done before.
        parts: seconds of the second by part, as the executor tells; what it does not tell of is
            the process with its imports. On the kind of device that was measured only.
    """

    first_s: float
    ready_s: float
    prepared_ready_s: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """What was measured of one model at one size.

    Attributes:
        rows: iterations to fit.
        unseen: runs of other workloads, to check the fit on; the first kind ran twice, before and
            after everything that is fitted, so that its two runs tell how much the machine drifts
            (with prompts one token longer, lest the second be faster for having been seen).
        start: what was measured of its starts.
        first_use_s: seconds that its first iterations took longer than the same later on.
        seconds: seconds the measuring took, that of ``unseen`` not counted.
        check_s: seconds that ``unseen`` took.
    """

    rows: Iterations
    unseen: tuple[Run, ...]
    start: EngineStarts
    first_use_s: float
    seconds: float
    check_s: float

    @property
    def start_s(self) -> float:
        """Return seconds of a start as plans count it: until iterations take their usual time."""
        return self.start.ready_s + self.first_use_s

    @property
    def prepare_s(self) -> float:
        """Return seconds of that which need no device."""
        return max(0.0, self.start.ready_s - self.start.prepared_ready_s)

    def engine_start(self, model: str, size: int, kv_cache_tokens: int) -> EngineStart:
        """Return its starts as a profile holds them.

        Args:
            model: name of the model in the profile.
            size: tensor-parallel size.
            kv_cache_tokens: capacity that the engines were given.
        """
        return EngineStart(
            model=model,
            tensor_parallel_size=size,
            kv_cache_tokens=kv_cache_tokens,
            warm_s=round(self.start_s, 3),
            prepare_s=round(self.prepare_s, 3),
            first_s=round(self.start.first_s, 3),
            parts={part: round(s, 3) for part, s in self.start.parts.items()},
        )


class _Engine:
    """An engine that runs workloads one after another.

    Args:
        executor: open.
        spec: of the engine, which is ready.
        vocab_size: prompts are random tokens below it.
        temperature: of sampling.
    """

    def __init__(
        self, executor: Executor, spec: EngineSpec, vocab_size: int, temperature: float
    ) -> None:
        self._executor = executor
        self._key = spec.key
        self._vocab_size = vocab_size
        self._sampling = {"temperature": temperature, "ignore_eos": True}
        self._rng = np.random.default_rng(0)

    def run(self, workload: ProbeWorkload, name: str = "") -> Run:
        """Run a workload and return its iterations.

        Raises:
            InputError: if the executor records no iterations.
            RunError: if the engine fails.
        """
        self._executor.take_steps(self._key)
        pairs = zip(workload.prompt_tokens, workload.output_tokens, strict=True)
        requests = [
            EngineRequest(i, self._prompt(p), p, o, sampling=self._sampling)
            for i, (p, o) in enumerate(pairs)
        ]
        began_s = self._executor.now_s()
        self._executor.submit(self._key, requests)
        _wait(self._executor, self._key, len(requests), _ITERATION_S * 10)
        wall_s = self._executor.now_s() - began_s
        taken = self._executor.take_steps(self._key)
        if taken is None or not len(taken[0]):
            raise InputError(
                f"--executor {self._executor.name}: it records no iterations; profile with vllm"
            )
        return Run(name, workload, *taken, wall_s)

    def _prompt(self, tokens: int) -> tuple[int, ...]:
        """Return a prompt that no other shares a block with."""
        return tuple(self._rng.integers(3, self._vocab_size, tokens).tolist())


def capacities(
    executor: Executor, model: ModelSpec, gpu: Gpu | None, sizes: Sequence[int], sequences: int
) -> list[int]:
    """Return the KV-cache capacity for an engine of each size, in tokens.

    Plans take what engines were measured with. On a GPU that is what its memory is assumed to have
    room for beside the weights; elsewhere room for a number of longest sequences.

    Args:
        executor: runs the engines.
        model: with its architecture.
        gpu: the device; None if it is not known.
        sizes: tensor-parallel sizes.
        sequences: so many longest ones, where there is no GPU to be filled.

    Raises:
        InputError: if the weights and one longest sequence do not fit on a GPU.
    """
    if executor.devices_are != "gpu" or gpu is None or model.architecture is None:
        return [sequences * model.max_model_len] * len(sizes)
    found = [assumed_pool_tokens(model, model.architecture, gpu, size) for size in sizes]
    for size, tokens in zip(sizes, found, strict=True):
        if not tokens:
            raise InputError(
                f"model {model.name}: at tensor-parallel size {size} its weights and one sequence "
                f"of {model.max_model_len} tokens are not assumed to fit on {gpu.name} "
                f"({gpu.memory_bytes / 2**30:.0f} GiB); measure larger sizes or shorter sequences, "
                "or say the KV cache's capacity (profile latency --kv-cache-tokens)"
            )
    return found


def measure(
    executor: Executor,
    model: ModelSpec,
    sizes: Sequence[int],
    *,
    device: str,
    kv_cache_tokens: Sequence[int],
    vocab_size: int,
    temperature: float = 0.0,
    repeat_s: float = REPEAT_S,
    run_dir: Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[MeasuredModel]:
    """Start an engine of each tensor-parallel size in turn and record its iterations.

    Args:
        executor: not open; it is opened and closed here.
        model: what to measure.
        sizes: tensor-parallel sizes.
        device: what the rows call the device.
        kv_cache_tokens: capacity of an engine of each size; see :func:`capacities`.
        vocab_size: prompts are random tokens below it.
        temperature: of sampling; drawing at random takes longer than taking the likeliest.
        repeat_s: all workloads run again while that has taken less, up to five times.
        run_dir: engine logs go there.
        report: called with lines of progress.

    Raises:
        InputError: if the executor records no iterations or the sizes do not fit this machine.
        RunError: if an engine fails.
    """
    executor.check([model])
    cluster = Cluster.uniform(Gpu(device, 1 << 40), max(sizes), nvlink=max(sizes))
    executor.open(cluster, run_dir)
    try:
        found = []
        for size, capacity in zip(sizes, kv_cache_tokens, strict=True):
            began_s = time.monotonic()
            spec = EngineSpec(f"tp{size}", 0, model, tuple(range(size)), size, 1, capacity)
            start = _start(executor, spec)
            report(
                f"tp {size}: engine ready after {start.ready_s:.1f} s, prepared ahead "
                f"{start.prepared_ready_s:.1f} s"
            )
            engine = _Engine(executor, spec, vocab_size, temperature)
            found.append(_measure(engine, spec, device, start, began_s, repeat_s, report))
            executor.stop_engine(spec.key)
        return found
    finally:
        executor.close()


def _start(executor: Executor, spec: EngineSpec) -> EngineStarts:
    """Start an engine three times; the third stays."""

    def ready_after(key: str) -> float:
        began_s = executor.now_s()
        executor.start_engine(replace(spec, key=key))
        _wait(executor, key, 0, _READY_S)
        return executor.now_s() - began_s

    first, second = f"{spec.key}.first", f"{spec.key}.second"
    first_s = ready_after(first)
    executor.stop_engine(first)
    ready_s = ready_after(second)
    parts = executor.start_parts(second)
    if parts:
        parts = {PROCESS: max(0.0, ready_s - sum(parts.values())), **parts}
    executor.stop_engine(second)
    if executor.can_prepare and executor.prepare_engine(spec):
        for event in executor.poll(_LONG_ENOUGH * ready_s):  # as a rule nothing but time comes
            raise RunError(f"engine {event.key} failed: {event.reason}")
    return EngineStarts(first_s, ready_s, ready_after(spec.key), parts)


def _measure(
    engine: _Engine,
    spec: EngineSpec,
    device: str,
    start: EngineStarts,
    began_s: float,
    repeat_s: float,
    report: Callable[[str], None],
) -> MeasuredModel:
    """Run everything on an engine that is ready."""
    size, model = spec.tensor_parallel_size, spec.model
    limits = Limits(
        model.engine.max_num_seqs,
        model.engine.max_num_batched_tokens,
        model.max_model_len,
        spec.kv_cache_tokens,
    )
    # What first batches compile, allocate and import belongs to the start, not to iterations.
    first_s, second_s = (float(engine.run(warm_up(limits)).step_s.sum()) for _ in range(2))
    checks = list(unseen(limits, np.random.default_rng(0)).items())
    before = engine.run(checks[0][1].longer(1), checks[0][0])
    runs: list[Run] = []
    passes = 0
    probing_s = time.monotonic()
    while passes < _MOST_PASSES and (not passes or time.monotonic() - probing_s < repeat_s):
        runs += [engine.run(workload) for workload in probes(limits, passes)]
        passes += 1
        report(f"tp {size}: pass {passes}, {sum(len(r.steps) for r in runs)} iterations")
    seconds = time.monotonic() - began_s - before.wall_s
    after = [engine.run(workload, name) for name, workload in checks]
    check_s = before.wall_s + sum(r.wall_s for r in after)
    report(f"tp {size}: {len(after)} other workloads, to check on, took {check_s:.1f} s")
    return MeasuredModel(
        iterations_of(runs, model.name, size, device),
        (before, *after),
        start,
        max(0.0, first_s - second_s),
        seconds,
        check_s,
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


def iterations_of(runs: Sequence[Run], model: str, size: int, device: str) -> Iterations:
    """Return the rows of several workloads as one table."""

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(r.steps, name) for r in runs])

    steps = StepTable(
        column("num_seqs"),
        column("num_tokens"),
        column("prefill_seqs"),
        column("prefill_tokens"),
        column("prefill_pairs"),
        column("context_tokens"),
        column("longest_tokens"),
    )
    seconds = np.concatenate([r.step_s for r in runs])
    phase = np.where(
        steps.prefill_seqs == 0,
        "decode",
        np.where(steps.prefill_seqs == steps.num_seqs, "prefill", "mixed"),
    )
    shape = np.concatenate([np.full(len(r.steps), r.workload.shape) for r in runs])
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
