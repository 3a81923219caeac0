"""Measuring a live engine and fitting what it took."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from samullm_linear.plugin import Linear, LinearOptions
from samullm_vllm.vllm_executor import VllmExecutor

from samullm_plugin import EngineOptions, ModelSpec
from samullm_plugin.cli.app import main
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.measuring.engine import MeasuredModel, measure, write_iterations
from samullm_plugin.measuring.judging import judge_runs
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.profiling.calibration import read_calibration, setting_key
from samullm_plugin.profiling.fit import fit_profile
from samullm_plugin.profiling.iterations import read_iterations
from samullm_plugin.profiling.profile_files import EngineStart, read_profile, write_profile
from tests.models import make_tiny_llama

pytestmark = pytest.mark.vllm
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


def test_live_engines_are_profiled_and_their_other_runs_are_predicted(tmp_path: Path) -> None:
    """Iterations are recorded, written, read back and fitted; totals of other runs hold.

    The machine may be doing something else at any moment, so that only what was measured at the
    same moments is compared: every other iteration with its neighbours, a run with its own
    iterations, and what plans say of a run with what the profile says of its iterations. Other work
    makes some iterations far longer than most, below which a fit by relative errors stays: it was
    seen at 0.6 of the median, hence the factor of four. Confused phases or units are further off.
    """
    folder = make_tiny_llama(tmp_path / "m", dtype="bfloat16", **SIZES)
    engine = EngineOptions(max_num_seqs=8, max_num_batched_tokens=256, block_size=32)
    model = ModelSpec("m", 512, path=str(folder), engine=engine)
    said: list[str] = []
    found = measure(
        PluginHost().create("executor", "vllm"),
        model,
        [1, 2],
        device="test-cores",
        kv_cache_tokens=[4096, 4096],
        vocab_size=SIZES["vocab_size"],
        repeat_s=0.0,
        run_dir=tmp_path / "run",
        report=said.append,
    )
    assert said
    for size, measured in zip([1, 2], found, strict=True):
        check_measured(tmp_path, model, size, measured)


def check_measured(tmp_path: Path, model: ModelSpec, size: int, measured: MeasuredModel) -> None:
    """Look at what was measured at one size, and predict from it."""
    rows = measured.rows
    assert rows.tensor_parallel_size == size
    assert {"decode", "prefill", "mixed"} == set(rows.phase.tolist())
    assert {1, 2, 4, 8} <= set(rows.batch_size[rows.phase == "decode"].tolist())
    assert rows.steps.num_tokens.max() == 256
    assert (rows.seconds > 0).all()
    assert 0 < measured.start.prepared_ready_s < measured.start.ready_s
    assert measured.prepare_s > 0.5 * measured.start.ready_s  # on a CPU all of a start can be ahead
    assert sum(measured.start.parts.values()) == pytest.approx(measured.start.ready_s)
    assert 0 < measured.start.parts["process and imports"] < measured.start.ready_s
    path = tmp_path / "rows.csv"
    write_iterations(path, [rows])
    (again,) = read_iterations(path)
    for name in ("num_seqs", "num_tokens", "prefill_seqs", "prefill_tokens", "context_tokens"):
        assert (getattr(again.steps, name) == getattr(rows.steps, name)).all(), name
    assert again.steps.prefill_pairs == pytest.approx(rows.steps.prefill_pairs)
    assert again.seconds == pytest.approx(rows.seconds, abs=1e-8)

    start = EngineStart(model="m", tensor_parallel_size=size, kv_cache_tokens=4096, warm_s=1.0)
    fitted, others = (again.where(np.arange(len(again)) % 2 == k) for k in range(2))
    write_profile(fit_profile([fitted], {}, source="test", starts=[start]), tmp_path / "p.json")
    latency = Linear(LinearOptions(profile=tmp_path / "p.json"))
    steps = latency.step_latency(model, Gpu("test-cores", 1 << 40), size)
    ratios = steps.step_seconds(others.steps) / others.seconds
    assert 0.25 < np.median(ratios) < 4.0
    runs = judge_runs(latency, model, "test-cores", size, measured.unseen)["runs"]
    assert [r["workload"] for r in runs] == [
        "mixed", "mixed", "long prompts", "long outputs", "few",
    ]  # fmt: skip
    for run, row in zip(measured.unseen, runs, strict=True):
        assert 0.0 < run.step_s.sum() <= run.wall_s
        assert run.step_s.sum() * (1.0 + row["sum_error_pct"] / 100.0) == pytest.approx(
            steps.step_seconds(run.steps).sum(), rel=1e-3
        )
        assert row["predicted_s"] == pytest.approx(steps.step_seconds(run.steps).sum(), rel=0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_several_models_come_into_one_profile_and_are_kept_for_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samullm_plugin.measuring.engine.measure", partial(measure, repeat_s=0.0))
    folders = [
        make_tiny_llama(tmp_path / name, dtype="bfloat16", **{**SIZES, "num_hidden_layers": layers})
        for name, layers in (("one", 2), ("other", 3))
    ]
    words = ["profile", "latency", "--max-model-len", "256", "--max-num-seqs", "8",
             "--max-num-batched-tokens", "128", "--output", str(tmp_path / "p.json")]  # fmt: skip
    assert main([*words, *(w for f in folders for w in ("--model", str(f)))]) == 0
    profile = read_profile(tmp_path / "p.json")
    assert (
        {m.model for m in profile.models} == {s.model for s in profile.starts} == {"one", "other"}
    )
    engine = EngineOptions(
        max_num_seqs=8, max_num_batched_tokens=128, block_size=32, dtype="bfloat16"
    )
    cluster = VllmExecutor.local_cluster()
    assert cluster is not None
    for folder in folders:
        spec = ModelSpec(folder.name, 256, path=str(folder), engine=engine)
        kept = read_calibration(setting_key(spec, cluster.gpus[0].name, 1, 1))
        assert kept is not None
        assert kept.num_iterations > 100
        assert len(kept.start_s) == 1


def test_engines_that_share_a_core_are_compared_with_what_they_take_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of work beside every other. On a core both take turns, so that one of two waits.

    The machine may be doing something else, which a median of eight outlives.
    """
    folders = [
        make_tiny_llama(tmp_path / name, dtype="bfloat16", **{**SIZES, "num_hidden_layers": layers})
        for name, layers in (("one", 2), ("other", 4))
    ]
    words = ["profile", "slowdown", "--max-model-len", "256", "--max-num-seqs", "8", "--seconds",
             "0.5", "--max-num-batched-tokens", "128", "--output-json", "-"]  # fmt: skip
    assert main([*words, *(w for f in folders for w in ("--model", str(f)))]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    kinds = {(m["model"], m["work"], m["beside"], m["beside_work"]) for m in found["measured"]}
    works = ("decode", "prefill")
    assert kinds == {
        (a, x, b, y) for a, b in (("one", "other"), ("other", "one")) for x in works for y in works
    }
    factors = [m["factor"] for m in found["measured"]]
    assert found["slowdown"] == pytest.approx(max(1.0, float(np.mean(factors))))
    assert 1.2 < np.median(factors) < 4.0
    assert f"slowdown: {found['slowdown']:.2f}" in err


def test_wrong_input_to_profile_slowdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--model", "a", "--model", "b", "--model", "c"], "--model: 3 are given"),
        (["--model", "a", "--executor", "simulated"], "there is nothing to measure"),
        (["--model", str(tmp_path / "gone")], "gone"),
    ):
        assert main(["profile", "slowdown", *words]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert "Traceback" not in err
