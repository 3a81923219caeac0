"""The simulator compiled ahead, beside something else that takes long."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from samullm_plugin.engine.jit import compiled
from samullm_plugin.engine.loop import advance
from samullm_plugin.engine.simulate import simulate_engine
from samullm_plugin.engine.workload import Workload
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import Curve, StepLatency

COMMAND = "from samullm_plugin.engine.ahead import compile_loop; compile_loop()"


def compile_loop() -> None:
    """Have the loop compiled, or read from the cache, by simulating one request."""
    one = np.array([1])
    simulate_engine(EngineConfig(), Workload(one, one), StepLatency(Curve.constant(0.01)))


@contextmanager
def loop_compiled_beside() -> Iterator[None]:
    """Have another process compile the loop meanwhile, if it must be and there is a core for it.

    If that process fails, whoever needs the loop compiles it. It never outlives the block.
    """
    if compiled.has(advance) or len(os.sched_getaffinity(0)) < 2:
        yield
        return
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", COMMAND],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
        process.wait()
    finally:
        process.kill()
        process.wait()
