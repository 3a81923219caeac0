"""Compiles what numba compiles, once, before several processes would each do so.

``python -m tests.compiling PART`` compiles one part; two of them side by side use two cores.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PARTS = ("loop", "queue")


def compile_everything() -> None:
    """Compile all parts, each in a process of its own; what is compiled already costs seconds."""
    command = [sys.executable, "-m", "tests.compiling"]
    root = Path(__file__).parents[1]
    for process in [subprocess.Popen([*command, part], cwd=root) for part in PARTS]:
        process.wait()


def _compile(part: str) -> None:
    import numpy as np

    from samullm_plugin.engine import Curve, EngineConfig, StepLatency, Workload, simulate_engine

    one = np.array([4])
    latency = StepLatency(Curve.line(0.004, 1e-5))
    stages = 2 if part == "queue" else 1
    config = EngineConfig(max_num_seqs=1, num_blocks=9, pipeline_parallel_size=stages)
    simulate_engine(config, Workload(one, one), latency)
    if part == "loop":
        from samullm_auto.neighbourhood import compile_ahead

        compile_ahead()


if __name__ == "__main__":
    _compile(sys.argv[1])
