"""Several simulations at once, and results of identical ones reused."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import groupby

import numpy as np

from samullm_plugin.engine.replicas import is_simple, simulate_replicas
from samullm_plugin.engine.simulate import simulate_engine
from samullm_plugin.engine.workload import EngineRun, Workload
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepLatency, StepModel

_WORTH_A_THREAD_TOKENS = 200_000
"""Output tokens of all jobs from which threads are worth starting (about half a millisecond)."""

_PARTS = 4
"""Parts of jobs in a row per thread: handing over each of a thousand short jobs takes as long as
simulating it."""

_COLUMNS = tuple(f.name for f in fields(Workload))


@dataclass(frozen=True, slots=True, eq=False)
class EngineJob:
    """Arguments of one :func:`simulate_engine` call, named as there."""

    config: EngineConfig
    workload: Workload
    latency: StepModel
    stop_s: float = math.inf
    record_steps: bool = False
    curve_points: int = 0
    release_delay_s: float = 0.0

    def run(self) -> EngineRun:
        """Simulate."""
        return simulate_engine(
            self.config,
            self.workload,
            self.latency,
            stop_s=self.stop_s,
            record_steps=self.record_steps,
            curve_points=self.curve_points,
            release_delay_s=self.release_delay_s,
        )

    def key(self) -> bytes:
        """Return a hash of everything that decides the result.

        A latency model that is not a :class:`StepLatency` counts as itself: two objects are two
        models.
        """
        digest = hashlib.blake2b(digest_size=16)
        options = (self.stop_s, self.record_steps, self.curve_points, self.release_delay_s)
        latency = self.latency if isinstance(self.latency, StepLatency) else id(self.latency)
        digest.update(_described(self.config, latency))
        digest.update(repr(options).encode())
        for column in _COLUMNS:
            value = getattr(self.workload, column)
            if value is None:
                continue
            arrays = value if isinstance(value, tuple) else (value,)
            digest.update(f"{column}:{len(arrays)}".encode())
            for array in arrays:
                content = np.ascontiguousarray(array)
                digest.update(f"{content.dtype.str}{content.shape}".encode())
                digest.update(content.data if content.size else b"")
        return digest.digest()


@lru_cache(maxsize=1024)
def _described(config: EngineConfig, latency: StepLatency | int) -> bytes:
    """Return settings and latencies as text: many jobs share them, and writing them takes long."""
    return repr((config, latency)).encode()


class EngineCache:
    """Results by content of the job; the least recently used ones are dropped. Thread-safe.

    Attributes:
        hits: jobs answered from the cache.
        misses: jobs that had to be simulated.
    """

    def __init__(self, max_requests: int = 2_000_000) -> None:
        """Keep results of up to ``max_requests`` requests (24 bytes each, recorded steps more)."""
        self.hits = 0
        self.misses = 0
        self._max_requests = max_requests
        self._requests = 0
        self._runs: OrderedDict[bytes, tuple[EngineRun, StepModel]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of results kept."""
        return len(self._runs)

    def get(self, key: bytes) -> EngineRun | None:
        """Return the result of the job with this key, if kept."""
        with self._lock:
            entry = self._runs.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self._runs.move_to_end(key)
            return entry[0]

    def put(self, key: bytes, job: EngineJob, run: EngineRun) -> None:
        """Keep a result; its arrays become read-only, as several callers will share them."""
        for array in (run.finish_s, run.first_token_s, run.generated_tokens):
            array.setflags(write=False)
        with self._lock:
            if key not in self._runs:
                self._requests += _weight(run)
            self._runs[key] = (run, job.latency)  # the model is kept alive: its id is in the key
            self._runs.move_to_end(key)
            while self._requests > self._max_requests and len(self._runs) > 1:
                _, (dropped, _) = self._runs.popitem(last=False)
                self._requests -= _weight(dropped)


def _simulated(jobs: Sequence[EngineJob], max_workers: int | None) -> list[EngineRun]:
    """Return the results of different jobs in their order, by several threads if worth it."""
    tokens = sum(int(job.workload.output_tokens.sum()) for job in jobs)
    if len(jobs) > 1 and tokens > _WORTH_A_THREAD_TOKENS:
        workers = min(max_workers or os.cpu_count() or 1, len(jobs))
        if workers > 1:
            size = -(-len(jobs) // (workers * _PARTS))
            parts = [jobs[first : first + size] for first in range(0, len(jobs), size)]
            with ThreadPoolExecutor(workers) as pool:
                return [run for of_part in pool.map(_in_turn, parts) for run in of_part]
    return _in_turn(jobs)


def _in_turn(jobs: Sequence[EngineJob]) -> list[EngineRun]:
    """Return the results of jobs; replicas of one model, in a row, are simulated at once."""
    runs: list[EngineRun] = []
    for alike, group in groupby(jobs, key=_Alike.of):
        part = list(group)
        made: Sequence[EngineRun | None] = [None] * len(part)
        if alike is not None and len(part) > 1:
            made = simulate_replicas(
                alike.config,
                [job.workload for job in part],
                alike.latency,
                stop_s=alike.stop_s,
                curve_points=alike.curve_points,
            )
        runs += [job.run() if run is None else run for job, run in zip(part, made, strict=True)]
    return runs


@dataclass(frozen=True, slots=True)
class _Alike:
    """What jobs have in common that are simulated at once."""

    config: EngineConfig
    latency: StepLatency
    stop_s: float
    curve_points: int
    timed: bool

    @classmethod
    def of(cls, job: EngineJob) -> _Alike | None:
        """Return a job's, or None if it is simulated by itself."""
        simple = is_simple(job.config, job.workload)
        if job.record_steps or job.release_delay_s > 0 or not simple:
            return None
        if not isinstance(job.latency, StepLatency):
            return None
        timed = job.workload.arrival_s is not None
        return cls(job.config, job.latency, job.stop_s, job.curve_points, timed)


def _weight(run: EngineRun) -> int:
    steps = 0 if run.steps is None else len(run.steps.seq_request) // 3
    return len(run.finish_s) + steps + 64


def simulate_engines(
    jobs: Sequence[EngineJob],
    max_workers: int | None = None,
    *,
    cache: EngineCache | None = None,
) -> list[EngineRun]:
    """Simulate independent engines, on all cores where that is worth it.

    Args:
        jobs: what to simulate; identical jobs are simulated once.
        max_workers: most threads; None: one per core.
        cache: where results are looked up and kept.

    Returns:
        The results in the order of the jobs.

    Raises:
        InputError: as :func:`simulate_engine`, of the first job that fails.
    """
    store = EngineCache() if cache is None else cache
    keys = [job.key() for job in jobs]
    found: dict[bytes, EngineRun] = {}
    missing: dict[bytes, EngineJob] = {}
    for key, job in zip(keys, jobs, strict=True):
        if key in found or key in missing:
            continue
        run = store.get(key)
        if run is None:
            missing[key] = job
        else:
            found[key] = run
    runs = _simulated(list(missing.values()), max_workers)
    for (key, job), run in zip(missing.items(), runs, strict=True):
        store.put(key, job, run)
        found[key] = run
    return [found[key] for key in keys]
