"""Batches of real engines on the CPU, with a model, are those of the simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samullm_plugin.engine import EngineConfig, Workload
from tests.conformance.compare import Case, simulate, simulated_rows
from tests.models import make_tiny_llama

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),
]

ROOMY = EngineConfig(
    max_num_seqs=16,
    max_num_batched_tokens=128,
    max_model_len=512,
    block_size=32,
    num_blocks=400,
)


def _cases() -> list[Case]:
    rng = np.random.default_rng(11)

    def some(n: int, prompt: int, output: int) -> Workload:
        return _with_ids(rng, rng.integers(1, prompt, n), rng.integers(1, output, n))

    tight = replace(ROOMY, num_blocks=24)
    shared = some(24, 200, 60)
    assert shared.prompt_token_ids is not None
    prefix = rng.integers(3, 500, 96)
    ids = tuple(np.concatenate((prefix, own)) for own in shared.prompt_token_ids)
    shared = Workload(shared.prompt_tokens + 96, shared.output_tokens, prompt_token_ids=ids)
    return [
        Case(tight, some(24, 100, 120)),
        Case(replace(tight, enable_prefix_caching=True, num_blocks=40), shared),
    ]


def _with_ids(rng: np.random.Generator, prompts: np.ndarray, outputs: np.ndarray) -> Workload:
    ids = tuple(rng.integers(3, 500, p) for p in prompts)
    return Workload(prompts, outputs, prompt_token_ids=ids)


def test_batches_of_real_engines(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", max_position_embeddings=512)
    cases = _cases()
    given = [
        {
            "engine": {
                "max_num_seqs": c.config.max_num_seqs,
                "max_num_batched_tokens": c.config.max_num_batched_tokens,
                "max_model_len": c.config.max_model_len,
                "block_size": c.config.block_size,
                "num_gpu_blocks_override": c.config.num_blocks,
                "enable_prefix_caching": c.config.enable_prefix_caching,
            },
            "prompts": [ids.tolist() for ids in c.workload.prompt_token_ids or ()],
            "outputs": c.workload.output_tokens.tolist(),
        }
        for c in cases
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.cpu_engine", str(model)],
        input=json.dumps(given),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    real = json.loads(done.stdout.splitlines()[-1])
    preempted = 0
    for case, rows in zip(cases, real, strict=True):
        run, _ = simulate(case)
        assert run.steps is not None
        simulated = [
            {
                "scheduled": [list(pair) for pair in row.scheduled.items()],
                "preempted": row.preempted,
                "free_blocks": row.free_blocks,
                "finished": row.finished,
            }
            for row in simulated_rows(run.steps)
        ]
        assert len(rows) > 50
        for i, (a, b) in enumerate(zip(rows, simulated, strict=False)):
            assert a == b, f"row {i}"
        assert len(rows) == len(simulated)
        preempted += run.num_preemptions
    assert preempted > 10
