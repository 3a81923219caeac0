"""Measure how much longer iterations take while another engine computes on the same device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from samullm_plugin.errors import InputError, RunError
from samullm_plugin.host.interfaces.executor import EngineRequest, EngineSpec, Executor
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.shared_gpus import Sharing, share_gpus
from samullm_plugin.model.types import Floats
from samullm_plugin.profiling.probes import Limits, ProbeWorkload

WORKS = ("decode", "prefill")
_DECODING = 32
_SHORT = 8
_PROMPT_TOKENS = 16
_SILENT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Slowdown:
    """An engine's iterations, alone and beside another engine's on the same device.

    Attributes:
        model: of the engine.
        work: what it does: ``decode`` or ``prefill``.
        beside: model of the other engine.
        beside_work: what that does.
        iterations: that were compared, the same ones alone and beside the other.
        alone_s: mean seconds of one; of two runs, before and after everything else.
        together_s: the same beside the other.
        drift: by how much the two runs alone differ, as a share of the mean.
    """

    model: str
    work: str
    beside: str
    beside_work: str
    iterations: int
    alone_s: float
    together_s: float
    drift: float

    @property
    def factor(self) -> float:
        """Return how many times longer iterations take beside the other engine."""
        return self.together_s / self.alone_s


def measure_slowdown(
    executor: Executor,
    models: tuple[ModelSpec, ModelSpec],
    *,
    kv_cache_tokens: Sequence[int],
    seconds: float,
    run_dir: Path | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[Slowdown]:
    """Start two engines on one device, and let them compute in turn and at once.

    Args:
        executor: not open; it is opened and closed here.
        models: of the two engines, with their architectures.
        kv_cache_tokens: their capacities.
        seconds: how long each kind of work takes alone.
        run_dir: engine logs go there.
        report: called with lines of progress.

    Returns:
        Of each engine, doing each kind of work beside each of the other.

    Raises:
        InputError: if the executor records no iterations, or has one engine on a device.
        RunError: if an engine fails.
    """
    executor.check(models)
    executor.open(share_gpus(Cluster.uniform(Gpu("shared", 1 << 40), 1), [Sharing(2)]), run_dir)
    try:
        pair = _Pair(executor)
        for k, (model, tokens) in enumerate(zip(models, kv_cache_tokens, strict=True)):
            pair.start(EngineSpec(f"engine-{k}", 0, model, (k,), 1, 1, tokens))
        report("two engines are ready")
        work, before = {}, {}
        for key, kind in product(pair.specs, WORKS):
            short = _work(pair.specs[key], kind, _SHORT)
            pair.run({key: short})  # what first batches compile and allocate is not counted
            pair.run({key: short})
            iteration_s = float(pair.run({key: short})[key].mean())
            work[key, kind] = _work(pair.specs[key], kind, max(_SHORT, int(seconds / iteration_s)))
            before[key, kind] = pair.run({key: work[key, kind]})[key]
            report(f"{pair.specs[key].model.name}: {kind} alone, {1e3 * iteration_s:.2f} ms")
        one, other = pair.specs
        together = {}
        for kinds in product(WORKS, WORKS):
            doing = dict(zip((one, other), kinds, strict=True))
            together[kinds] = pair.run({key: work[key, kind] for key, kind in doing.items()})
            report(f"{' beside '.join(kinds)}: done")
        after = {size: pair.run({size[0]: workload})[size[0]] for size, workload in work.items()}
        return [
            _compared(
                pair,
                key,
                beside,
                dict(zip((one, other), kinds, strict=True)),
                (before[key, kinds[k]], now[key], after[key, kinds[k]]),
            )
            for kinds, now in together.items()
            for k, (key, beside) in enumerate(((one, other), (other, one)))
        ]
    finally:
        executor.close()


def _compared(
    pair: _Pair, key: str, beside: str, doing: Mapping[str, str], runs: tuple[Floats, ...]
) -> Slowdown:
    """Return what an engine's iterations took.

    Args:
        pair: the engines.
        key: the engine.
        beside: the other one.
        doing: what each does.
        runs: seconds of the engine's iterations before, beside the other, and after.

    Raises:
        RunError: if it finished no iteration while the other computed.
    """
    count = min(map(len, runs))
    names = {k: s.model.name for k, s in pair.specs.items()}
    if not count:
        raise RunError(
            f"{names[key]} did not finish an iteration beside the other engine; give more --seconds"
        )
    before_s, together_s, after_s = (float(run[:count].mean()) for run in runs)
    alone_s = (before_s + after_s) / 2
    drift = abs(after_s - before_s) / alone_s
    return Slowdown(
        names[key], doing[key], names[beside], doing[beside], count, alone_s, together_s, drift
    )


def _work(spec: EngineSpec, kind: str, iterations: int) -> ProbeWorkload:
    """Return requests of about so many iterations, all of one kind but for the first prompts."""
    engine, model = spec.model.engine, spec.model
    limits = Limits(
        engine.max_num_seqs,
        engine.max_num_batched_tokens,
        model.max_model_len,
        spec.kv_cache_tokens,
    )
    if kind == "prefill":
        tokens = min(limits.longest, limits.max_num_batched_tokens)
        return ProbeWorkload((tokens,) * iterations, (1,) * iterations)
    outputs = min(iterations, limits.longest - _PROMPT_TOKENS)
    rounds = -(-iterations // outputs)
    count = rounds * min(limits.most(_PROMPT_TOKENS + outputs), _DECODING)
    return ProbeWorkload((_PROMPT_TOKENS,) * count, (outputs,) * count)


class _Pair:
    """Engines on one device.

    Attributes:
        specs: by key.
    """

    def __init__(self, executor: Executor) -> None:
        self.specs: dict[str, EngineSpec] = {}
        self._executor = executor
        self._rng = np.random.default_rng(0)

    def start(self, spec: EngineSpec) -> None:
        """Start an engine and wait for it."""
        self.specs[spec.key] = spec
        self._executor.start_engine(spec)
        self._await({spec.key: 1}, "ready")

    def run(self, work: Mapping[str, ProbeWorkload]) -> dict[str, Floats]:
        """Return the seconds of the engines' iterations until the first has done its work.

        Args:
            work: by engine.

        Raises:
            InputError: if the executor records no iterations.
            RunError: if an engine fails.
        """
        for key in self.specs:
            self._executor.take_steps(key)
        for key, workload in work.items():
            self._executor.submit(key, self._requests(key, workload))
        left = {key: len(workload.prompt_tokens) for key, workload in work.items()}
        self._await(left, "finished", first=True)
        found = {}
        for key in work:
            taken = self._executor.take_steps(key)
            if taken is None:
                raise InputError(
                    f"--executor {self._executor.name}: it records no iterations; take vllm"
                )
            found[key] = taken[1]
        self._await({key: count for key, count in left.items() if count}, "finished")
        return found

    def _requests(self, key: str, workload: ProbeWorkload) -> list[EngineRequest]:
        """Return requests of prompts that no others share a block with."""
        architecture = self.specs[key].model.architecture
        assert architecture is not None
        sampling = {"temperature": 0.0, "ignore_eos": True}
        return [
            EngineRequest(
                i,
                tuple(self._rng.integers(3, architecture.vocab_size, p).tolist()),
                p,
                o,
                sampling=sampling,
            )
            for i, (p, o) in enumerate(
                zip(workload.prompt_tokens, workload.output_tokens, strict=True)
            )
        ]

    def _await(self, left: dict[str, int], kind: str, *, first: bool = False) -> None:
        """Wait for events of engines.

        Args:
            left: how many outputs, or engines that are ready, are still to come by engine.
            kind: of event.
            first: wait until one of them has all.

        Raises:
            RunError: if an engine or a request fails, or nothing happens for long.
        """
        heard_s = time.monotonic()
        while any(left.values()) and not (first and not all(left.values())):
            for event in self._executor.poll(1.0):
                heard_s = time.monotonic()
                if event.kind == "failed":
                    raise RunError(f"engine {event.key} failed: {event.reason}")
                wrong = next((o.error for o in event.outputs if o.error is not None), None)
                if wrong is not None:
                    raise RunError(f"engine {event.key}: {wrong}")
                if event.kind == kind:
                    left[event.key] -= len(event.outputs) or 1
            if time.monotonic() - heard_s > _SILENT_S:
                raise RunError(f"engines {', '.join(left)}: nothing for {_SILENT_S:.0f} s")
