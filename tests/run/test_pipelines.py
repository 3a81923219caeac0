"""The pipelines of the examples, whole, on small real engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samullm_plugin.app.loading import build_application, read_spec
from samullm_plugin.app.nodespec import RegexSection
from samullm_plugin.app.spec import AppSpec, ClusterSection, Component, ModelSection, PlannerSection
from samullm_plugin.engine import Curve, StepLatency
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.planning.building import sample_scenarios
from samullm_plugin.planning.instances import Instance
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.rules.fusion import fuse_chains
from samullm_plugin.rules.repeats import with_repeats
from samullm_plugin.run.coordinator import Coordinator
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.run import RunOutcome, resume_run, start_run
from samullm_plugin.run.setup import RunSetup
from tests.models import make_tiny_llama
from tests.run.worlds import NoLatency, Uniform

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples" / "applications"
COSTS = ModeCosts(
    StepLatency(Curve.line(0.004, 0.0001)), 8192, LoadTimes(1.5, 3.0), Provenance("assumed", "")
)
ENGINE = {
    "dtype": "float32",
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two models that can spell anything."""
    folder = tmp_path_factory.mktemp("models")
    for k in range(2):
        make_tiny_llama(folder / f"m{k}", seed=k, characters=True, vocab_size=104)
    return folder


def run_setup(
    models: Path, app: Path, directory: Path, schemas: Any = None, **changes: Any
) -> RunSetup:
    """Return the run of an app.yaml whose models are replaced by small ones.

    Args:
        models: their folder.
        app: the file.
        directory: of the run.
        schemas: what outputs of nodes must be, besides what the file says.
        changes: of the setup.
    """
    spec = read_spec(app)
    nodes = {
        n: s.model_copy(update={"output_schema": schemas[n]}) if schemas and n in schemas else s
        for n, s in spec.nodes.items()
    }
    spec = spec.model_copy(update={"nodes": nodes})
    small = {
        name: ModelSection(
            model=f"m{k % 2}",
            path=str(models / f"m{k % 2}"),
            architecture=str(models / f"m{k % 2}"),
            max_model_len=2048,
            engine_args=ENGINE,
        )
        for k, name in enumerate(spec.models)
    }
    return setup_of(spec, small, app, directory, **changes)


def setup_of(
    spec: AppSpec,
    models: Mapping[str, ModelSection],
    app: Path,
    directory: Path,
    *,
    fused: bool = False,
    cores: int = 2,
    **changes: Any,
) -> RunSetup:
    """Return the run of an app.yaml with other models, on so many cores."""
    cluster = ClusterSection(gpus=cores, gpu="core", gpu_memory_gib=1, nvlink=cores)
    spec = spec.model_copy(update={"models": models, "cluster": cluster})
    loaded = build_application(spec, app)
    assert loaded.cluster is not None
    apart = with_repeats(loaded.app)
    planned = fuse_chains(apart, 2).app if fused else apart
    scenarios = sample_scenarios(planned, Uniform(100), np.random.default_rng(0), 1)
    modes = {ModeKey("core", 1): COSTS}
    problem = Problem(planned, loaded.cluster, scenarios, (modes,) * len(planned.nodes))
    planner = PlannerSection(scheduler=Component(type="min-heuristic"))
    instance = Instance(problem, Uniform(100), NoLatency(), planner)
    values = {"executor": "vllm", "executor_options": {"heartbeat_s": 0.05}, **changes}
    return RunSetup(PluginHost.from_settings(), loaded, instance, directory=directory, **values)


def run(models: Path, app: Path, directory: Path, **changes: Any) -> RunOutcome:
    """Plan and run an application."""
    ready = run_setup(models, app, directory, **changes)
    plan = make_plan(ready.host, ready.instance.problem, "min-heuristic").plan
    return start_run(ready, plan)


def outputs(directory: Path, node: str) -> dict[str, Any]:
    """Return what a node gave, by id: texts of models, values of functions; errors as such."""
    found = {}
    for line in (directory / "outputs" / f"{node}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["error"] is not None:
            found[row["custom_id"]] = row["error"]
            continue
        body = row["response"]["body"]
        if "data" in body:
            found[row["custom_id"]] = body["data"][0]
            continue
        if "choices" not in body:
            found[row["custom_id"]] = body["value"]
            continue
        choice = body["choices"][0]
        found[row["custom_id"]] = choice.get("text") or choice.get("message", {}).get("content")
    return found


def test_cascade(models: Path, tmp_path: Path) -> None:
    """The limit lies between what the small model is sure of and what it is not."""
    app = Path(shutil.copytree(EXAMPLES / "cascade", tmp_path / "cascade")) / "app.yaml"
    text = app.read_text()
    assert text.count("logprob < -0.7") == 1
    app.write_text(text.replace("logprob < -0.7", "logprob < -0.12"))
    outcome = run(models, app, tmp_path / "r")
    assert outcome.failed == ()
    small, large = outputs(tmp_path / "r", "small"), outputs(tmp_path / "r", "large")
    explain = outputs(tmp_path / "r", "explain")
    assert set(small) == set(explain) == {"q1", "q2", "q3", "q4"}  # what was accepted met again
    assert set(small.values()) | set(large.values()) <= set("ABCD")
    # Who goes on to the large model is decided by the mean log probability of the answer.
    finished = {
        r["request"]: r
        for r in read_journal(tmp_path / "r/events.jsonl")
        if r["kind"] == "finished" and r["node"] == "small"
    }
    lines = (EXAMPLES / "cascade" / "questions.jsonl").read_text().splitlines()
    means = {
        json.loads(line)["id"]: np.mean([position[0][1] for position in finished[r]["logprobs"]])
        for r, line in enumerate(lines)
    }
    assert set(large) == {name for name, mean in means.items() if mean < -0.12}, means
    assert 0 < len(large) < len(small), means


def test_preference_data(models: Path, tmp_path: Path) -> None:
    outcome = run(models, EXAMPLES / "preference-data" / "app.yaml", tmp_path / "r")
    rates = outputs(tmp_path / "r", "rate")
    assert len(rates) == 16
    good = {k: json.loads(v) for k, v in rates.items() if isinstance(v, str)}
    assert good
    assert all(1 <= v["score"] <= 9 for v in good.values())
    best = outputs(tmp_path / "r", "best")
    for item, chosen in best.items():
        if "score" in chosen:
            mine = [v["score"] for k, v in good.items() if f":{item}#" in f"{k}"]
            assert chosen["score"] == max(mine)
            assert isinstance(chosen["generate"], str)
    assert {name for name, _, _ in outcome.failed} <= {"rate", "best", "pair"}


LIST = RegexSection(regex=r"1\. [a-c]{4,6}\n2\. [a-c]{4,6}\n3\. [a-c]{4,6}")


def test_evol_instruct_and_resume(models: Path, tmp_path: Path) -> None:
    app, schemas = EXAMPLES / "evol-instruct" / "app.yaml", {"propose": LIST}

    def stop(coordinator: Coordinator) -> None:
        taken = coordinator.queue.end_calls

        def end_calls(now_s: float) -> None:
            taken(now_s)
            if coordinator.ledger.settled(len(coordinator.problem.app.nodes)):
                coordinator.request_drain()

        coordinator.queue.end_calls = end_calls  # type: ignore[method-assign]

    outcome = run(models, app, tmp_path / "r", schemas=schemas, on_start=stop)
    assert outcome.drained
    before = list(read_journal(tmp_path / "r/events.jsonl"))
    outcome = resume_run(run_setup(models, app, tmp_path / "r", schemas=schemas))
    assert not outcome.failed
    records = list(read_journal(tmp_path / "r/events.jsonl"))
    called = [(r["node"], r["request"]) for r in records if r["kind"] in ("finished", "skipped")]
    assert len(called) == len(set(called))  # what a function returned is not computed again
    assert any(r["node"] == "parse" for r in before if r["kind"] == "finished")
    parsed = outputs(tmp_path / "r", "parse")
    assert set(parsed) == {f"s{k}/{j}" for k in range(1, 5) for j in range(1, 4)}
    texts = {v["instruction"] for v in parsed.values()}
    assert len(outputs(tmp_path / "r", "unique")) == len({t.lower() for t in texts})
    assert set(outputs(tmp_path / "r", "answer")) <= set(outputs(tmp_path / "r", "unique"))


def test_judging(models: Path, tmp_path: Path) -> None:
    outcome = run(models, EXAMPLES / "judging" / "app.yaml", tmp_path / "r")
    assert outcome.failed == ()
    winners = outputs(tmp_path / "r", "winner")
    assert set(winners) == {"j1", "j2", "j3"}
    votes = outputs(tmp_path / "r", "judge")
    for item, found in winners.items():
        mine = [v for k, v in votes.items() if k.startswith(f"{item}#")]
        assert len(mine) == 3
        assert found["winner"] in {"mistral", "wizard", "vicuna"}
        assert found["votes"] == mine.count(found["winner"])


def test_extraction(models: Path, tmp_path: Path) -> None:
    outcome = run(models, EXAMPLES / "extraction" / "app.yaml", tmp_path / "r")
    assert {name for name, _, _ in outcome.failed} <= {"extract", "page"}
    pieces = outputs(tmp_path / "r", "pieces")
    assert {k.partition("/")[0] for k in pieces} == {"a", "b", "c"}
    for found in outputs(tmp_path / "r", "extract").values():
        if isinstance(found, dict):  # rejected: the text is kept
            assert found["message"].startswith("rejected")
            assert found["text"]
        else:
            assert 0 <= json.loads(found)["year"] <= 2030
