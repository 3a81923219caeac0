"""Compiles, once, what several processes would each compile otherwise.

``python -m tests.compiling`` compiles what numba compiles and the modules of vLLM;
``python -m tests.compiling PART`` one part of it. Parts side by side use two cores.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NUMBA_PARTS = ("loop", "queue")


def compile_parts(parts: Sequence[str] = NUMBA_PARTS) -> None:
    """Compile parts, each in a process of its own; what is compiled already costs seconds."""
    command = [sys.executable, "-m", "tests.compiling"]
    root = Path(__file__).parents[1]
    for process in [subprocess.Popen([*command, part], cwd=root) for part in parts]:
        process.wait()


def _compile(part: str) -> None:
    if part == "vllm":
        if find_spec("vllm") is not None:
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")  # what vLLM's libraries say of each other
            from samullm_vllm.engine import preload

            preload("cpu")  # Python keeps each module that it compiles
        return
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
    if len(sys.argv) > 1:
        _compile(sys.argv[1])
    else:
        compile_parts((*NUMBA_PARTS, "vllm"))
