"""Nodes of one model that are served as one: run and reported under their own names."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import load_application
from samullm_plugin.app.spec import Component, PlannerSection
from samullm_plugin.cli.app import main
from samullm_plugin.engine import Curve, StepLatency
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.length import LengthObservations, LengthQuery
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.planning.building import sample_scenarios
from samullm_plugin.planning.instances import Instance, make_instance
from samullm_plugin.rules.fusion import fuse_chains
from samullm_plugin.run.drift import DriftEstimator, length_observations
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.prompts import Prompt
from samullm_plugin.run.replanning import Replanner
from samullm_plugin.run.report import read_run, report_facts
from samullm_plugin.run.residual import residual_work, sample_residual
from samullm_plugin.run.results import Result
from samullm_plugin.run.run import resume_run, start_run
from samullm_plugin.run.setup import RunSetup
from samullm_plugin.run.text_prompts import TextPrompts
from samullm_plugin.simulator import PlanSimulator
from tests.models import make_tiny_llama
from tests.run.worlds import NoLatency, Uniform

ITEMS = 18
ONE, TWO = ParallelConfig(), ParallelConfig(2)

APP = """
    version: 1
    name: refine
    models:
      one: {one}
      two: {two}
    nodes:
      check:
        model: one
        requests: requests.jsonl
        keep: {{when: "w[0-9]*[02468]( |$)", probability: 0.8}}
        sampling_params: {{temperature: 0, ignore_eos: true, max_tokens: 1}}
        task: checking
      draft:
        model: one
        for_each: check
        prompt: "w9 {{{{ prompt }}}}"
        sampling_params: {{temperature: 0, ignore_eos: true, max_tokens: 30}}
      rate:
        model: two
        for_each: draft
        inputs: {{final: {{from: revise, by: id}}}}
        prompt: "w7 {{{{ final }}}} w8 {{{{ output }}}}"
        sampling_params: {{temperature: 0, ignore_eos: true, max_tokens: 12}}
      revise:
        model: one
        for_each: draft
        inputs: {{verdict: check}}
        prompt: "{{{{ verdict }}}} w5 {{{{ output }}}} w6 {{{{ prompt }}}}"
        sampling_params: {{temperature: 0, ignore_eos: true, max_tokens: 25}}
        task: revision
    cluster: {{gpus: 2, gpu: core, gpu_memory_gib: 1, nvlink: 1}}
    executor: simulated
"""
NODES = ("check", "draft", "revise", "rate")
FUSED = "check+draft+revise"


def write_app(folder: Path, one: str, two: str) -> None:
    rng = np.random.default_rng(0)
    lines = [
        {
            "id": f"i{k}",
            "prompt": " ".join(f"w{int(w)}" for w in rng.integers(3, 500, 8)),
            "max_tokens": 1,
        }
        for k in range(ITEMS)
    ]
    for line in lines[::3]:
        line["prompt_tokens"] = 8
    (folder / "requests.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "app.yaml").write_text(dedent(APP).format(one=one, two=two))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An application that can be planned: models of which only the names are known."""
    made = tmp_path_factory.mktemp("fused")
    write_app(made, "{model: lmsys/vicuna-13b-v1.5}", "{model: THUDM/chatglm3-6b}")
    text = (made / "app.yaml").read_text().replace("gpu: core, gpu_memory_gib: 1, ", "")
    (made / "plannable.yaml").write_text(text)
    return made


def run_setup(folder: Path, directory: Path, *, fused: bool, **changes: object) -> RunSetup:
    loaded = load_application(folder / "app.yaml")
    assert loaded.cluster is not None
    app = fuse_chains(loaded.app, 2).app if fused else loaded.app
    costs = ModeCosts(
        StepLatency(Curve.line(0.01, 0.0002)), 16384, LoadTimes(1.5, 3.0), Provenance("assumed", "")
    )
    scenarios = sample_scenarios(app, Uniform(30), np.random.default_rng(0), 1)
    modes = {ModeKey("core", 1): costs}
    problem = Problem(app, loaded.cluster, scenarios, (modes,) * len(app.nodes))
    planner = PlannerSection(scheduler=Component(type="min-heuristic"))
    instance = Instance(problem, Uniform(30), NoLatency(), planner)
    values: dict[str, object] = {"executor": "simulated", "truth": problem, **changes}
    host = PluginHost.from_settings()
    return RunSetup(host, loaded, instance, directory=directory, **values)  # type: ignore[arg-type]


def moving_plan() -> Plan:
    """The fused node gives up a device in mid-request, then all go on elsewhere."""
    return Plan(
        (
            Stage((Assignment(FUSED, TWO, (0, 1)),), StageEnd("node_progress", FUSED, 0.3)),
            Stage(
                (Assignment(FUSED, ONE, (1,)), Assignment("rate", ONE, (0,))),
                StageEnd("node_progress", FUSED, 0.7),
            ),
            Stage((Assignment(FUSED, ONE, (0,)), Assignment("rate", ONE, (1,)))),
        )
    )


def apart_plan() -> Plan:
    check, draft, revise, rate = (
        Assignment(n, ONE, (d % 2,)) for d, n in enumerate(("check", "draft", "revise", "rate"))
    )
    return Plan(
        (
            Stage((check, draft), StageEnd("node_finished", "check")),
            Stage((draft, revise), StageEnd("node_finished", "draft")),
            Stage((revise, rate)),
        )
    )


def journal(directory: Path) -> list[dict[str, Any]]:
    return list(read_journal(directory / "events.jsonl"))


def test_a_simulated_run_is_reported_under_the_users_names(folder: Path, tmp_path: Path) -> None:
    ready = run_setup(folder, tmp_path / "run", fused=True)
    problem = ready.instance.problem
    outcome = start_run(ready, moving_plan())
    assert not outcome.failed
    loaded = ready.loaded
    taken = problem.scenarios[0].output_tokens
    parts = {p.name: taken[i][p.rows] for i, n in enumerate(problem.app.nodes) for p in n.parts}
    assert set(parts) == set(NODES)
    records = journal(tmp_path / "run")
    for node in loaded.app.nodes:
        done = {r["request"] for r in records if r["kind"] == "finished" and r["node"] == node.name}
        assert done == set(np.flatnonzero(parts[node.name]).tolist())
        lines = (tmp_path / f"run/outputs/{node.name}.jsonl").read_text().splitlines()
        tokens = [json.loads(x)["response"]["body"]["usage"]["completion_tokens"] for x in lines]
        assert tokens == parts[node.name][parts[node.name] > 0].tolist()
        counted = outcome.metrics["nodes"][node.name]
        assert counted["requests"]["finished"] == len(lines)
        assert counted["requests"]["skipped"] == ITEMS - len(lines)
        # lengths and costs are true, so that what was planned of each part comes true
        finish = counted["finish_s"]
        if node.name != "check":
            assert finish["measured"] == pytest.approx(finish["planned"])
    assert 0 < len(np.flatnonzero(parts["draft"])) < ITEMS
    assert outcome.metrics["nodes"]["revise"]["served_as"] == FUSED
    loads = {name: node["load_s"] for name, node in outcome.metrics["nodes"].items()}
    assert len(loads["draft"]) == 4
    assert outcome.metrics["load_s"] == pytest.approx(sum(loads["draft"]) + sum(loads["rate"]))
    ended = [r["node"] for r in records if r["kind"] == "node_finished"]
    assert sorted(ended) == sorted(NODES)
    assert {r["node"] for r in records if r["kind"] == "moved"} <= set(NODES)
    started = {r["node"] for r in records if r["kind"] == "engine_started"}
    assert started == {FUSED, "rate"}


def test_the_coordinator_does_what_the_plan_simulator_says(folder: Path, tmp_path: Path) -> None:
    ready = run_setup(folder, tmp_path / "run", fused=True)
    trace = PlanSimulator(ready.instance.problem).simulate_scenario(moving_plan(), 0)
    outcome = start_run(ready, moving_plan())
    assert outcome.metrics["makespan_s"]["measured"] == pytest.approx(trace.makespan_s)


def test_the_report_names_the_users_nodes(folder: Path, tmp_path: Path) -> None:
    start_run(run_setup(folder, tmp_path / "run", fused=True), moving_plan())
    run = read_run(tmp_path / "run")
    assert run.finished
    facts = report_facts(run, tmp_path / "report.html")
    rows = {row["name"]: row for row in facts["nodes"]}
    assert set(rows) == set(NODES)
    assert rows["revise"]["fused"] == FUSED
    assert rows["rate"]["fused"] == ""
    assert rows["draft"]["planned_s"] == pytest.approx(rows["draft"]["measured_s"])
    assert len(rows["draft"]["loads"]) == 4
    (tmp_path / "run/planned.json").unlink()  # as in runs of earlier releases
    old = report_facts(read_run(tmp_path / "run"), tmp_path / "report.html")
    assert {row["name"]: row["tokens"] for row in old["nodes"]} == {
        name: row["tokens"] for name, row in rows.items()
    }


@pytest.mark.parametrize("seed", range(2))
def test_a_journal_cut_anywhere_goes_on(folder: Path, tmp_path: Path, seed: int) -> None:
    whole = tmp_path / "whole"
    start_run(run_setup(folder, whole, fused=True), moving_plan())
    outputs = {p.name: p.read_bytes() for p in (whole / "outputs").iterdir()}
    data = (whole / "events.jsonl").read_bytes()
    rng = np.random.default_rng(seed)
    for k, size in enumerate([0, *rng.integers(0, len(data), 8).tolist(), len(data)]):
        cut = tmp_path / f"cut{k}"
        shutil.copytree(whole, cut)
        shutil.rmtree(cut / "outputs")
        (cut / "outputs").mkdir()
        (cut / "events.jsonl").write_bytes(data[:size])
        outcome = resume_run(run_setup(folder, cut, fused=True))
        assert not outcome.failed
        settled = ("finished", "skipped", "failed")
        counts = Counter((r["node"], r["request"]) for r in journal(cut) if r["kind"] in settled)
        assert set(counts.values()) == {1}
        assert len(counts) == 4 * ITEMS
        assert {p.name: p.read_bytes() for p in (cut / "outputs").iterdir()} == outputs


def finish_all(ledger: Ledger, source: TextPrompts, texts: dict[tuple[str, int], str]) -> None:
    """Give every request its text, in order; note the prompts in ``texts``."""
    todo = list(ledger.first())
    while todo:
        node, r = todo.pop(0)
        prompt = source.prepare((node, r), ledger)
        part = next(p for p in ledger.app.nodes[node].parts if p.start <= r < p.stop)
        if prompt is None:
            todo += ledger.settle((node, r), Status.SKIPPED, 0.0, Result())
            continue
        assert isinstance(prompt, Prompt)
        assert prompt.text is not None
        written = r - part.start
        texts[part.name, written] = f"{prompt.text}|{prompt.max_tokens}|{dict(prompt.sampling)}"
        answer = f"w{len(texts[part.name, written]) + written} said {part.name}"
        todo += ledger.settle((node, r), Status.FINISHED, 0.0, Result(3, 5, "stop", answer))


def test_prompts_are_the_same_fused_or_not(folder: Path) -> None:
    """Templates, filters, sampling parameters and limits follow the user's nodes."""
    loaded = load_application(folder / "app.yaml")
    found = []
    for app in (loaded.app, fuse_chains(loaded.app, 2).app):
        texts: dict[tuple[str, int], str] = {}
        finish_all(Ledger(app), TextPrompts(loaded, app), texts)
        found.append(texts)
    assert found[0] == found[1]
    assert {name for name, _ in found[0]} == set(NODES)
    assert 0 < sum(name == "revise" for name, _ in found[0]) < ITEMS
    assert all("said check w5 w" in t for (name, _), t in found[0].items() if name == "revise")


class Asked(Uniform):
    """Keeps what it is asked and told."""

    def __init__(self) -> None:
        super().__init__(30)
        self.queries: list[LengthQuery] = []

    def sample(
        self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int
    ) -> np.ndarray:
        self.queries.append(query)
        return super().sample(query, rng, num_scenarios)

    def fit(self, observations: list[LengthObservations]) -> Asked:  # type: ignore[override]
        return self


def test_lengths_are_asked_for_by_the_users_nodes(folder: Path) -> None:
    loaded = load_application(folder / "app.yaml")
    asked = Asked()
    sample_scenarios(fuse_chains(loaded.app, 2).app, asked, np.random.default_rng(0), 1)
    assert [(q.node, q.task, len(q)) for q in asked.queries] == [  # check writes one token
        ("draft", "", ITEMS),
        ("revise", "revision", ITEMS),
        ("rate", "", ITEMS),
    ]
    draft, revise = asked.queries[:2]
    assert revise.max_tokens.tolist() == [25] * ITEMS
    assert (revise.prompt_tokens > draft.prompt_tokens).any()  # outputs of the part before


class Watching(Replanner):
    """Looks at what is left in the middle of the run."""

    left: Any = None

    def consider(self, coordinator: Any, *, stage_changed: bool) -> Plan | None:
        snapshot = DriftEstimator().snapshot(coordinator)
        left = residual_work(coordinator.problem.app, snapshot)
        if self.left is None and left is not None and len(left.app.nodes[0].fused) == 2:
            self.left, self.observed = left, length_observations(coordinator, snapshot)
        return None


def test_what_is_left_keeps_the_users_nodes(folder: Path, tmp_path: Path) -> None:
    ready = run_setup(folder, tmp_path / "run", fused=True)
    watching = Watching(ready.host, ready.instance)
    start_run(replace(ready, replanner=watching), moving_plan())
    parts = watching.left.app.nodes[0].parts
    assert [p.name for p in parts] == ["draft", "revise"]
    assert parts[0].start == 0
    assert parts[0].stop == parts[1].start < parts[1].stop
    assert parts[1].stop == len(watching.left.app.nodes[0].requests)
    asked = Asked()
    sample_residual(watching.left, asked, np.random.default_rng(0), 1)
    assert [(q.node, q.task) for q in asked.queries][:2] == [("draft", ""), ("revise", "revision")]
    whole = ready.instance.problem.app.nodes[0]
    (draft, revise), rows = asked.queries[:2], watching.left.kept[0][1]
    assert draft.requests is not None
    assert revise.requests is not None
    assert (draft.requests + whole.fused[1].start).tolist() == rows[parts[0].rows].tolist()
    assert (revise.requests + whole.fused[2].start).tolist() == rows[parts[1].rows].tolist()
    assert "checking" in {o.task for o in watching.observed}


def known(loaded: LoadedApplication) -> LoadedApplication:
    lengths = [np.arange(1, ITEMS + 1) + 20 * i for i in range(4)]
    return replace(loaded, output_tokens=tuple(lengths))


@pytest.mark.parametrize("fusion", [True, False])
def test_known_lengths_stay_with_their_requests(folder: Path, fusion: bool) -> None:
    text = (folder / "plannable.yaml").read_text()
    other = folder / "known.yaml"
    other.write_text(text.replace('keep: {when: "w[0-9]*[02468]( |$)", probability: 0.8}', ""))
    loaded = known(load_application(other))
    planner = loaded.planner.model_copy(update={"fusion": fusion})
    problem = make_instance(PluginHost.from_settings(), loaded, planner).problem
    assert [n.name for n in problem.app.nodes] == (
        [FUSED, "rate"] if fusion else ["check", "draft", "rate", "revise"]
    )
    assert loaded.output_tokens is not None
    limits = {"check": 1, "draft": 30, "rate": 12, "revise": 25}
    for i, node in enumerate(problem.app.nodes):
        for part in node.parts:
            lengths = loaded.output_tokens[loaded.app.index(part.name)]
            expected = np.minimum(lengths, limits[part.name])
            assert problem.scenarios[0].output_tokens[i][part.rows].tolist() == expected.tolist()


def test_a_plan_says_which_nodes_are_fused(folder: Path) -> None:
    loaded = load_application(folder / "plannable.yaml")
    host = PluginHost.from_settings()
    groups = {"both": ("revise", "draft")}
    problem = make_instance(host, loaded, gpus=2, fused=groups).problem
    assert [n.name for n in problem.app.nodes] == ["check", "both", "rate"]
    assert problem.app.fused == {"both": ("draft", "revise")}
    assert make_instance(host, loaded, gpus=2, fused={}).problem.app.fused == {}
    with pytest.raises(InputError, match="draft, rate have different models"):
        make_instance(host, loaded, gpus=2, fused={"x": ("draft", "rate")})
    with pytest.raises(InputError, match="no node 'gone'"):
        make_instance(host, loaded, gpus=2, fused={"x": ("draft", "gone")})


def test_plan_and_run_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = folder / "plannable.yaml"
    plans = {}
    for name, words in (("fused", []), ("apart", ["--no-fusion"])):
        command = ["plan", str(app), "--scheduler", "greedy", *words, "-o"]
        assert main([*command, str(tmp_path / name), "--output-json", "-"]) == 0
        out, err = capsys.readouterr()
        plans[name] = json.loads(out)
        assert (f"{FUSED}: check, draft and revise" in err) == (name == "fused")
    assert plans["fused"]["fused"] == {FUSED: ["check", "draft", "revise"]}
    assert plans["apart"]["fused"] == {}
    for name in plans:  # the plan decides, whatever the flag says
        command = ["run", str(app), "--plan", str(tmp_path / name), "--no-fusion"]
        assert main([*command, "--output-dir", str(tmp_path / f"run-{name}"), "--no-replan"]) == 0
        started = {r["node"] for r in journal(tmp_path / f"run-{name}") if "engine" in r["kind"]}
        assert (FUSED in started) == (name == "fused")
        capsys.readouterr()
    stored = json.loads((tmp_path / "fused").read_text())
    stored["fused"][FUSED][0] = "gone"
    (tmp_path / "other").write_text(json.dumps(stored))
    command = ["run", str(app), "--plan", str(tmp_path / "other"), "--output-dir", str(tmp_path)]
    assert main(command) == 2
    assert f"other: fused.{FUSED} names gone, which application" in capsys.readouterr().err
    assert main(["compare", str(app), "--schedulers", "greedy,min-heuristic"]) == 0
    assert f"{FUSED}: check" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_real_engines_write_the_same_fused_or_not(tmp_path: Path) -> None:
    """Temperature 0, float32: also where the fused engines move in mid-request."""
    make_tiny_llama(tmp_path / "one", tokenizer=True)
    make_tiny_llama(tmp_path / "two", seed=1, tokenizer=True)
    engine = "engine_args: {dtype: float32, block_size: 32, max_num_seqs: 8}"
    one, two = (
        f"{{model: {n}, path: {tmp_path}/{n}, max_model_len: 1024, "
        f"architecture: {tmp_path}/{n}, {engine}}}"
        for n in ("one", "two")
    )
    write_app(tmp_path, one, two)
    found = []
    for fused, plan in ((True, moving_plan()), (False, apart_plan())):
        directory = tmp_path / f"run{fused}"
        ready = run_setup(tmp_path, directory, fused=fused, executor="vllm", truth=None)
        outcome = start_run(ready, plan)
        assert not outcome.failed
        texts = {}
        for path in (directory / "outputs").iterdir():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            texts[path.stem] = {
                x["custom_id"]: x["response"]["body"]["choices"][0]["text"] for x in lines
            }
        found.append(texts)
    assert set(found[0]) == set(NODES)
    assert len(found[0]["check"]) == ITEMS
    assert 0 < len(found[0]["revise"]) < ITEMS
    assert found[0] == found[1]
