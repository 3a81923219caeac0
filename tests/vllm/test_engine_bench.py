"""The bench on real engines, with models of a few thousand weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import samullm_apps.cores

from samullm_plugin import EngineOptions, ModelArchitecture, ModelSpec, PluginHost
from samullm_plugin.bench.engine_bench import EngineBench
from samullm_plugin.bench.engine_cases import CaseBuilder, EngineBenchSettings, random_model
from samullm_plugin.run.journal import read_journal
from tests.vllm.conftest import Bench, request, spec

pytestmark = pytest.mark.vllm


@pytest.fixture
def tiny_cores(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """The applications for CPU cores, all three models being one tiny one."""
    tiny = samullm_apps.cores.model("cores-small", layers=1, hidden=128, inner=64, heads=4)
    for name in ("SMALL", "MEDIUM", "LARGE"):
        monkeypatch.setattr(samullm_apps.cores, name, tiny)
    return tiny


def test_profiled_planned_run_and_kept(tiny_cores: ModelSpec, tmp_path: Path) -> None:
    """Lengths are imposed, outputs enter prompts, and what is known is not measured again."""
    text = "cores-chain-summary:documents=3,judges=1,max_tokens=12,gpus=1"
    settings = EngineBenchSettings("vllm", {"heartbeat_s": 0.05}, rounds=1, scenarios=1)
    said: list[str] = []

    def make() -> EngineBench:
        cases = CaseBuilder(PluginHost(), settings, tmp_path, "this machine", said.append)
        return EngineBench(cases)

    result = make().run([text], ["min-heuristic"])
    (measured,) = result.measurements
    assert (measured.model, measured.device, measured.sizes) == ("cores-small", "cpu-core", (1,))
    (run,) = result.runs
    assert run.requests["failed"] == run.requests["skipped"] == 0
    assert run.measured_s > run.load_s > 0
    assert run.engine_starts == 1  # all nodes have one model: they were fused
    assert run.open_s < 5.0  # vLLM was imported before: that takes 10 s of the processor
    records = list(read_journal(tmp_path / run.directory / "events.jsonl"))
    finished = [r for r in records if r["kind"] == "finished"]
    assert len(finished) == run.requests["finished"]
    assert sum(r["num_tokens"] for r in finished) == run.completion_tokens
    reasons = {r["finish_reason"] for r in finished if r["num_tokens"] < 12}
    assert reasons <= {"stop"}  # not cut: their own end, as far as anybody can learn
    summaries = {r["request"]: r for r in finished if r["node"] == "summarise"}
    judged = next(r for r in finished if r["node"] == "judge.large" and r["request"] == 0)
    lengths = {50 + s["num_tokens"] for s in summaries.values()}
    assert judged["prompt_tokens"] in lengths  # the template and a whole summary
    said.clear()
    again = make().run([text], ["min-heuristic"])
    assert said == []
    assert again.runs == result.runs
    assert again.measurements == result.measurements


@pytest.mark.parametrize(
    "sizes",
    [
        ModelArchitecture(2, 64, 2, 1, 32, 96, 512),
        ModelArchitecture(2, 64, 2, 2, 32, 96, 512, mlp="plain"),
        ModelArchitecture(2, 64, 2, 2, 32, 96, 512, num_experts=4, num_active_experts=2),
    ],
    ids=["llama", "opt", "mixtral"],
)
def test_stand_ins_can_be_loaded(bench: Bench, tmp_path: Path, sizes: ModelArchitecture) -> None:
    """Engines fill models of every kind with random weights and compute."""
    engine = EngineOptions(max_num_seqs=4, max_num_batched_tokens=64, block_size=32)
    model = random_model(ModelSpec("stand-in", 128, sizes, engine=engine), tmp_path)
    bench.start(spec("a", tmp_path, model=model, kv_cache_tokens=512))
    bench.executor.submit("a", [request(0, 5)])
    assert bench.gather(1)[0].num_tokens == 5
