"""Without a latency model, the best that is known of each model and device is taken, and named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import Application, EngineOptions, ModelNode, ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.latency import StepLatency, StepTable
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.shared_gpus import Sharing, share_gpus
from samullm_plugin.planning.applications import find_application
from samullm_plugin.planning.best_known import BestKnown, best_known
from samullm_plugin.planning.instances import make_instance
from samullm_plugin.planning.planner import PlanningOptions, make_plan
from samullm_plugin.planning.reporting import makespan_band
from samullm_plugin.profiling.calibration import (
    Calibration,
    add_calibration,
    add_lengths,
    add_start_factors,
    read_calibration,
    read_lengths,
    setting_key,
    start_factor,
)
from samullm_plugin.profiling.loading import ASSUMED, SCALED
from samullm_plugin.profiling.shared import beside_others
from samullm_plugin.run.calibrating import Calibrator
from samullm_plugin.run.ledger import Ledger

H100 = Gpu("H100-80GB", 80 << 30)
A100 = Gpu("A100-80GB", 84_986_691_584)
SIZES = ModelArchitecture(32, 4096, 32, 8, 128, 14336, 128256)
MINE = ModelSpec("mine", 8192, SIZES)


@pytest.fixture(scope="module")
def known() -> BestKnown:
    return best_known(PluginHost.from_settings())


def steps(count: int) -> StepTable:
    """Return decode iterations of 1 to 8 sequences, and prompts."""
    rng = np.random.default_rng(0)
    seqs = rng.integers(1, 9, count)
    prefill = (np.arange(count) % 10 == 0).astype(np.int64)
    tokens = prefill * rng.integers(10, 200, count)
    context = np.where(prefill == 1, 0, seqs * 100).astype(float)
    scheduled = np.where(prefill == 1, 1, seqs)
    return StepTable(
        scheduled, np.where(prefill == 1, tokens, seqs), prefill, tokens,
        tokens * (tokens + 1) / 2.0, context, context / scheduled,
    )  # fmt: skip


def test_a_model_nobody_measured_is_assumed_on_any_known_gpu(known: BestKnown) -> None:
    costs = known.costs(MINE, H100, 1)
    assert costs.provenance.kind == "assumed"
    assert costs.provenance.error_pct == pytest.approx(28.0)
    assert costs.kv_cache_tokens > 100_000
    assert isinstance(costs.latency, StepLatency)
    # One token of an 8B model reads 16 GB of weights, at 3.35 TB/s at best.
    one = StepTable(
        *(np.array([v]) for v in (1, 1, 0, 0)), *(np.array([float(v)]) for v in (0, 1, 1))
    )
    assert 0.0048 < costs.latency.step_seconds(one)[0] < 0.012


def test_profiles_come_before_data_sheets(known: BestKnown) -> None:
    assert known.provenance(MINE, A100, 1).kind == "transferred"
    vicuna = ModelSpec("lmsys/vicuna-13b-v1.5", 4096)
    assert known.provenance(vicuna, A100, 1).kind == "measured"
    changed = replace(vicuna, engine=EngineOptions(extra=(("speculative_config", "x"),)))
    assert known.provenance(changed, A100, 1).kind == "assumed"


def test_what_is_not_known_names_the_remedy(known: BestKnown) -> None:
    with pytest.raises(InputError, match="sizes are not known; give the folder"):
        known.costs(ModelSpec("org/new", 4096), H100, 1)
    with pytest.raises(InputError, match=r"GPU Odd-1: neither measured.*samullm profile latency"):
        known.costs(MINE, Gpu("Odd-1", 1 << 36), 1)


def test_runs_calibrate_the_next_plan(known: BestKnown) -> None:
    key = setting_key(MINE, "H100-80GB", 1, 1)
    assert read_calibration(key) is None
    table = steps(200)
    before = known.costs(MINE, H100, 1)
    true = before.latency.scaled(3.0)  # type: ignore[attr-defined]  # it is data
    seen = Calibration(table, true.step_seconds(table), 200, (12.0, 14.0))
    assert add_calibration(key, seen, {})
    assert add_calibration(key, seen, {})
    after = known.costs(MINE, H100, 1)
    assert after.provenance.source == "measured on this machine, 400 iterations"
    assert after.provenance.error_pct == pytest.approx(0.0, abs=2.0)
    assert after.latency.step_seconds(table) == pytest.approx(true.step_seconds(table), rel=0.1)
    assert after.load.warm_s == 13.0
    # Other settings, sizes and devices were not measured.
    for other in (replace(MINE, engine=EngineOptions(max_num_seqs=8)), replace(MINE, name="x")):
        assert known.costs(other, H100, 1).provenance.kind == "assumed"
    assert known.costs(MINE, H100, 2).provenance.kind == "assumed"


def test_starts_of_one_size_say_something_of_the_others(known: BestKnown) -> None:
    """Else a size that nobody has tried would look quicker than those that were measured."""
    other = replace(MINE, name="x")
    assumed = [known.costs(m, H100, tp).load for m, tp in ((MINE, 1), (MINE, 2), (other, 1))]
    assert {load.source for load in assumed} == {ASSUMED}
    assert start_factor("H100-80GB") is None
    assert add_start_factors("H100-80GB", [3.0, 4.0, 9.0])
    scaled = [known.costs(m, H100, tp).load for m, tp in ((MINE, 1), (MINE, 2), (other, 1))]
    assert {load.source for load in scaled} == {SCALED}
    for load, before in zip(scaled, assumed, strict=True):
        assert load.warm_s == pytest.approx(4.0 * before.warm_s)
        assert load.cold_s - load.warm_s == pytest.approx(before.cold_s - before.warm_s)
    a100 = ModelSpec("lmsys/vicuna-13b-v1.5", 4096)
    assert known.costs(a100, A100, 1).load.source != SCALED  # measured, or of another device
    few = Calibration(steps(3), np.ones(3), 3, (12.0, 14.0))
    assert add_calibration(setting_key(MINE, "H100-80GB", 1, 1), few, {})
    measured = known.costs(MINE, H100, 1)
    assert (measured.load.warm_s, measured.provenance.kind) == (13.0, "assumed")


def test_a_run_keeps_what_starts_took_of_what_was_assumed(known: BestKnown) -> None:
    table = RequestTable.of([5], 9)
    app = Application("a", (ModelNode("n", MINE, table),))
    for measured, factor in ((3.0, 3.0), (9.0, 6.0)):  # the median of 3 and 9
        costs = ({ModeKey("H100-80GB", 1): known.costs(MINE, H100, 1)},)
        scenario = LengthScenario((np.array([5]),), (np.array([1]),))
        problem = Problem(app, Cluster.uniform(H100, 1), (scenario,), costs)
        first_s = known.costs(replace(MINE, name="y"), H100, 1).load.warm_s
        calibrator = Calibrator(problem)
        base_s = first_s / (start_factor("H100-80GB") or 1.0)
        calibrator.add_start(0, ModeKey("H100-80GB", 1), measured * base_s)
        calibrator.keep(Ledger(app))
        assert start_factor("H100-80GB") == pytest.approx(factor)


def test_what_engines_take_beside_others_is_not_kept(known: BestKnown) -> None:
    """Plans multiply by the slowdown, which it has in it."""
    app = Application("a", (ModelNode("n", MINE, RequestTable.of([5], 9)),))
    cluster = share_gpus(Cluster.uniform(H100, 1), [Sharing(2, 1.5)])
    key = ModeKey(cluster.kinds[0], 1)
    costs = beside_others(known.costs(MINE, cluster.gpus[0], 1), cluster.gpus[0])
    scenario = LengthScenario((np.array([5]),), (np.array([1]),))
    calibrator = Calibrator(Problem(app, cluster, (scenario,), ({key: costs},)))
    calibrator.add_start(0, key, 3.0)
    calibrator.add_steps(0, key, steps(200), np.ones(200))
    assert calibrator.keep(Ledger(app)) == 0
    assert start_factor("H100-80GB") is None
    assert start_factor(cluster.kinds[0]) is None


def test_a_broken_cache_is_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAMULLM_CACHE_DIR", str(tmp_path))
    (tmp_path / "calibrations").mkdir()
    key = setting_key(MINE, "H100-80GB", 1, 1)
    for text in ("", "[]", '{"steps": 3}'):
        (tmp_path / "calibrations" / f"{key}.json").write_text(text)
        assert read_calibration(key) is None
    monkeypatch.setenv("SAMULLM_CACHE_DIR", str(tmp_path / "calibrations" / f"{key}.json"))
    assert not add_lengths(MINE, [("", 1, 1, False)])  # a file is no folder: nothing is lost


def test_lengths_of_earlier_runs_are_known(tmp_path: Path) -> None:
    rows = [("summary", 10, 30, False)] * 50
    folder = tmp_path / "mine"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512,
              "num_attention_heads": 2, "intermediate_size": 128}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "r.jsonl").write_text('{"prompt": "a b c", "max_tokens": 500}\n')
    (tmp_path / "app.yaml").write_text(
        "version: 1\nname: a\nmodels: {m: {model: mine, path: mine}}\n"
        "nodes: {n: {model: m, requests: r.jsonl}}\n"
        "cluster: {gpus: 1, gpu: H100-80GB}\n"
    )
    host = PluginHost.from_settings()
    loaded = find_application(host, str(tmp_path / "app.yaml"))
    assert add_lengths(loaded.app.nodes[0].model, rows)
    (seen,) = read_lengths(loaded.app.nodes[0].model)
    assert (seen.task, seen.output_tokens.tolist()) == ("summary", [30] * 50)
    problem = make_instance(host, loaded).problem
    assert {int(s.output_tokens[0][0]) for s in problem.scenarios} == {30}


def test_plans_carry_the_error_into_the_makespan(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"prompt": "a b c", "max_tokens": 500}\n' * 200)
    (tmp_path / "app.yaml").write_text(
        "version: 1\nname: a\n"
        "models: {m: {model: meta-llama/Llama-3.1-8B, max_model_len: 4096}}\n"
        "nodes: {n: {model: m, requests: r.jsonl}}\n"
        "cluster: {gpus: 1, gpu: H100-80GB}\n"
    )
    host = PluginHost.from_settings()
    instance = make_instance(host, find_application(host, str(tmp_path / "app.yaml")))
    result = make_plan(host, instance.problem, "greedy", PlanningOptions())
    band = makespan_band(instance.problem, result)
    assert band is not None
    low, high = band
    assert low < min(result.makespan_s) <= max(result.makespan_s) < high
    # Engine starts are not iterations: the band is narrower than the error of an iteration.
    assert high < 1.28 * max(result.makespan_s)
