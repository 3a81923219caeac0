"""Measuring a live engine and fitting what it took."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samullm_plugin import EngineOptions, InputError, ModelSpec
from samullm_plugin.cli.profile_latency import _sizes
from samullm_plugin.core.profile.probes import Limits, held_out, probes
from samullm_plugin.io.iterations import read_iterations
from samullm_plugin.manager import PluginHost
from samullm_plugin.services.profiling_engine import measure, write_iterations
from samullm_plugin.services.profiling_fit import fit_profile
from tests.models import LLAMA_SIZES, make_tiny_llama

LIMITS = [
    Limits(64, 2048, 4096, 65_536),
    Limits(1, 64, 128, 256),
    Limits(256, 8192, 2048, 4096),
    Limits(8, 16, 512, 1024),
]


@pytest.mark.parametrize("limits", LIMITS)
def test_probes_fit_and_cover(limits: Limits) -> None:
    """Every request fits the engine; batch sizes from one to the most are decoded."""
    workloads = [*probes(limits), held_out(limits, np.random.default_rng(0))]
    for workload in workloads:
        assert len(workload.prompt_tokens) == len(workload.output_tokens) > 0
        assert min(workload.prompt_tokens) >= 1
        assert min(workload.output_tokens) >= 1
        for prompt, output in zip(workload.prompt_tokens, workload.output_tokens, strict=True):
            assert prompt + output <= limits.max_model_len
    lengths = sorted(workloads[0].output_tokens)
    assert len(lengths) <= limits.max_num_seqs
    assert len(set(lengths)) == min(len(lengths), len(set(lengths)))
    if limits.max_num_seqs > 1:
        assert lengths[0] < lengths[-1]


@pytest.mark.vllm
def test_live_engine_to_profile(tmp_path: Path) -> None:
    """Iterations of a real engine are recorded, written, read back and fitted."""
    folder = make_tiny_llama(tmp_path / "m")
    model = ModelSpec(
        "m",
        256,
        path=str(folder),
        engine=EngineOptions(
            max_num_seqs=8, max_num_batched_tokens=128, block_size=32, dtype="float32"
        ),
    )
    said: list[str] = []
    executor = PluginHost().create("executor", "vllm")
    (measured,) = measure(
        executor,
        model,
        [1],
        device="test-cores",
        kv_cache_tokens=2048,
        vocab_size=LLAMA_SIZES["vocab_size"],
        run_dir=tmp_path / "run",
        report=said.append,
    )
    rows = measured.rows
    assert {"decode", "prefill", "mixed"} == set(rows.phase.tolist())
    assert set(range(1, 9)) <= set(rows.batch_size[rows.phase == "decode"].tolist())
    assert rows.steps.num_tokens.max() == 128
    assert (rows.seconds > 0).all()
    assert measured.start_s > 0
    assert said
    path = tmp_path / "rows.csv"
    write_iterations(path, [rows])
    (again,) = read_iterations(path)
    for name in ("num_seqs", "num_tokens", "prefill_seqs", "prefill_tokens", "context_tokens"):
        assert (getattr(again.steps, name) == getattr(rows.steps, name)).all(), name
    assert again.steps.prefill_pairs == pytest.approx(rows.steps.prefill_pairs)
    assert again.seconds == pytest.approx(rows.seconds, abs=1e-8)
    profile = fit_profile([again], {}, source="test")
    fitted = profile.fitted("m", 1)
    assert fitted is not None
    seconds = fitted.latency.latency().step_seconds(rows.steps)
    assert np.isfinite(seconds).all()


def test_sizes_are_checked() -> None:
    assert _sizes("1,2") == [1, 2]
    for wrong in ("", "0", "1,1", "two"):
        with pytest.raises(InputError, match="--tp"):
            _sizes(wrong)
