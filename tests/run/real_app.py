"""A small application on real engines: two models answer, one of them in chains, a third judges.

Also a program: ``python real_app.py FOLDER RUN [--resume] [--ray ADDRESS] [--replan]`` runs it, for
tests that kill it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from samullm_plugin.app.loading import load_application  # noqa: E402
from samullm_plugin.app.spec import Component, PlannerSection  # noqa: E402
from samullm_plugin.engine import Curve, StepLatency  # noqa: E402
from samullm_plugin.host.manager import PluginHost  # noqa: E402
from samullm_plugin.model.cluster import Cluster, Gpu  # noqa: E402  # found by the line above
from samullm_plugin.model.costs import LoadTimes, ModeCosts, Provenance  # noqa: E402
from samullm_plugin.model.parallel import ParallelConfig  # noqa: E402
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd  # noqa: E402
from samullm_plugin.model.problem import ModeKey, Problem  # noqa: E402
from samullm_plugin.planning.building import sample_scenarios  # noqa: E402
from samullm_plugin.planning.instances import Instance  # noqa: E402
from samullm_plugin.run.engine_failures import RunOptions  # noqa: E402
from samullm_plugin.run.replanning import Replanner  # noqa: E402
from samullm_plugin.run.run import resume_run, start_run  # noqa: E402
from samullm_plugin.run.setup import RunSetup  # noqa: E402
from tests.models import make_tiny_llama  # noqa: E402
from tests.run.worlds import NoLatency, Uniform  # noqa: E402

ITEMS = 24
GPU = Gpu("core", 1 << 30)

APP = """
version: 1
name: real
models:
  one: {{model: one, path: {folder}/one, max_model_len: 1024, architecture: {folder}/one, {engine}}}
  two: {{model: two, path: {folder}/two, max_model_len: 1024, architecture: {folder}/two, {engine}}}
nodes:
  answer: {{model: one, requests: requests.jsonl, {sampling}}}
  chain:
    model: two
    requests: chain.jsonl
    chain: doc
    prompt: "{{{{ prompt }}}} w9 {{{{ previous }}}}"
    {sampling}
  judge:
    model: one
    for_each: answer
    inputs: {{first: answer, second: {{from: chain, by: doc, take: last}}}}
    prompt: "w5 {{{{ first }}}} w6 {{{{ second }}}}"
    {sampling}
cluster: {{gpus: 2, gpu: core, gpu_memory_gib: 1, nvlink: 2}}
executor: vllm
"""
ENGINE = (
    "engine_args: {dtype: float32, block_size: 32, max_num_seqs: 8, max_num_batched_tokens: 256}"
)
SAMPLING = "sampling_params: {temperature: 0, ignore_eos: true, max_tokens: 40}"


def make_files(folder: Path, items: int = ITEMS) -> None:
    """Write models, requests of so many items, and app.yaml."""
    make_tiny_llama(folder / "one", tokenizer=True)
    make_tiny_llama(folder / "two", seed=1, tokenizer=True, num_hidden_layers=4)
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(f"w{int(i)}" for i in rng.integers(3, 500, count))

    answers = [
        {"id": f"i{k}", "prompt": words(12), "max_tokens": int(rng.integers(20, 120))}
        for k in range(items)
    ]
    chain = [
        {"id": f"i{k}/{c}", "doc": f"i{k}", "prompt": words(8), "max_tokens": 24}
        for k in range(items)
        for c in range(1 + k % 3)
    ]
    for name, lines in (("requests", answers), ("chain", chain)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    app = APP.format(folder=folder, engine=ENGINE, sampling=SAMPLING)
    (folder / "app.yaml").write_text(app)


def plan() -> Plan:
    """Return stages that move, resize and start models early."""
    one, two = ParallelConfig(), ParallelConfig(2)
    return Plan(
        (
            Stage(
                (Assignment("answer", one, (0,)), Assignment("chain", one, (1,))),
                StageEnd("node_progress", "answer", 0.4),
            ),
            Stage((Assignment("answer", two, (0, 1)),), StageEnd("node_progress", "answer", 0.8)),
            Stage((Assignment("answer", one, (1,)), Assignment("chain", one, (0,)))),
            Stage((Assignment("chain", one, (0,)), Assignment("judge", one, (1,)))),
        )
    )


def run_setup(folder: Path, directory: Path, **changes: object) -> RunSetup:
    """Return the run of the application in a folder."""
    loaded = load_application(folder / "app.yaml")
    cluster = loaded.cluster or Cluster.uniform(GPU, 2, nvlink=2)
    costs = ModeCosts(
        StepLatency(Curve.line(0.004, 0.0001)), 4096, LoadTimes(1.5, 3.0), Provenance("assumed", "")
    )
    scenarios = sample_scenarios(loaded.app, Uniform(100), np.random.default_rng(0), 1)
    modes = {ModeKey(cluster.gpus[0].name, 1): costs}
    problem = Problem(loaded.app, cluster, scenarios, (modes,) * len(loaded.app.nodes))
    planner = PlannerSection(scheduler=Component(type="min-heuristic"))
    instance = Instance(problem, Uniform(100), NoLatency(), planner)
    values: dict[str, object] = {
        "executor": "vllm",
        "executor_options": {"heartbeat_s": 0.05},
        "options": RunOptions(10_000, 10_000),
        **changes,
    }
    host = PluginHost.from_settings()
    return RunSetup(host, loaded, instance, directory=directory, **values)  # type: ignore[arg-type]


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--ray", help="address of a Ray cluster with two machines")
    parser.add_argument("--replan", action="store_true", help="as samullm run does")
    arguments = parser.parse_args()
    ready = run_setup(arguments.folder, arguments.run)
    if arguments.ray:
        # A busy machine may be silent for some seconds.
        options = {"heartbeat_s": 0.05, "address": arguments.ray, "lost_timeout_s": 10.0}
        cluster = Cluster((GPU, GPU), (), ((0,), (1,)))
        problem = replace(ready.instance.problem, cluster=cluster)
        instance = replace(ready.instance, problem=problem)
        ready = replace(ready, executor="ray", executor_options=options, instance=instance)
    if arguments.replan:
        ready = replace(ready, replanner=Replanner(ready.host, ready.instance))
    outcome = resume_run(ready) if arguments.resume else start_run(ready, plan())
    return int(outcome.drained or bool(outcome.failed))


if __name__ == "__main__":
    sys.exit(main())
