"""The five pipelines of the examples on real vLLM engines: planned against measured.

Every model is replaced by a small one of random weights (``tests/models.py``), so the figures are
about planning and running, not about what models say. Each pipeline is run twice: planned from what
is assumed of the machine, then from what the first run has measured. Run from the repository's
root, with vLLM or its CPU build::

    python -m benchmarks.pipelines --repeat 4
    python -m benchmarks.pipelines --only cascade judging --json OUT.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samullm_plugin.app.loading import build_application, read_spec
from samullm_plugin.app.nodespec import NodeSection
from samullm_plugin.app.spec import ModelSection, PlannerSection
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.instances import make_instance
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.run.run import start_run
from samullm_plugin.run.setup import RunSetup
from tests.models import make_tiny_llama

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "applications"
NAMES = ("preference-data", "evol-instruct", "judging", "extraction", "cascade")
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


@dataclass(frozen=True)
class Measured:
    """One run of a pipeline.

    Attributes:
        name: of the pipeline.
        planned_from: what its plan was made from.
        requests: that were asked, repeated ones left out.
        failed: requests that failed; random weights follow no schema within their limits.
        planned_s: mean makespan over the plan's length scenarios.
        least_s, most_s: the shortest and the longest of them.
        measured_s: makespan of the run.
        engine_starts: engines that were started.
        taken_over: engines that went on for another node instead.
        load_s: seconds of all starts.
    """

    name: str
    planned_from: str
    requests: int
    failed: int
    planned_s: float
    least_s: float
    most_s: float
    measured_s: float
    engine_starts: int
    taken_over: int
    load_s: float


def copied(name: str, folder: Path, repeat: int) -> Path:
    """Return an example's app.yaml in a folder of its own, with its rows so many times."""
    place = Path(shutil.copytree(EXAMPLES / name, folder / name))
    for path in place.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        again = [
            {**row, "id": f"{row.get('id', i)}-{k}"}
            for k in range(repeat)
            for i, row in enumerate(rows)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in again))
    return place / "app.yaml"


def run(host: PluginHost, app: Path, models: Path, directory: Path, planned_from: str) -> Measured:
    """Plan and run a pipeline on this machine's engines."""
    spec = read_spec(app)
    used = {
        m: i
        for i, m in enumerate(
            dict.fromkeys(
                m for s in spec.nodes.values() if isinstance(s, NodeSection) for m in s.models
            )
        )
    }
    small = {
        name: ModelSection(
            model=f"small-{used[name]}",
            path=str(models / f"small-{used[name]}"),
            max_model_len=2048,
            engine_args=ENGINE,
        )
        for name in spec.models
    }
    for number in used.values():
        if not (models / f"small-{number}").is_dir():
            path = models / f"small-{number}"
            make_tiny_llama(path, seed=number, characters=True, vocab_size=104)
    spec = spec.model_copy(
        update={"models": small, "cluster": None, "planner": PlannerSection(scenarios=4)}
    )
    loaded = build_application(spec, app)
    instance = make_instance(host, loaded)
    result = make_plan(host, instance.problem, "auto", instance.planning_options(host))
    outcome = start_run(
        RunSetup(host, loaded, instance, executor="vllm", directory=directory), result.plan
    )
    told = outcome.metrics
    return Measured(
        app.parent.name,
        planned_from,
        told["requests"]["finished"] + told["requests"]["failed"],
        told["requests"]["failed"],
        float(result.makespan_s.mean()),
        float(result.makespan_s.min()),
        float(result.makespan_s.max()),
        told["makespan_s"]["measured"],
        told["engine_starts"],
        told["engines_taken_over"],
        told["load_s"],
    )


def main() -> None:
    """Run the pipelines that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--repeat", type=int, default=4, help="how often each row is there")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["SAMULLM_CACHE_DIR"] = str(folder / "cache")
        host = PluginHost.from_settings()
        print("| pipeline | planned from | requests | planned s | measured s | planned/measured |")
        print("|---|---|--:|--:|--:|--:|")
        for name in given.only:
            app = copied(name, folder, given.repeat)
            for planned_from in ("assumptions", "the run before"):
                place = folder / f"{name}-{len(found)}"
                row = run(host, app, folder / "models", place, planned_from)
                found.append(row)
                ratio = row.planned_s / row.measured_s
                print(
                    f"| {row.name} | {row.planned_from} | {row.requests} | {row.planned_s:.1f} "
                    f"({row.least_s:.1f}-{row.most_s:.1f}) | {row.measured_s:.1f} | {ratio:.2f} |",
                    flush=True,
                )
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
