"""What sleeping engines save where models take turns: their model comes again, and they wake.

Run from the repository's root::

    python -m benchmarks.sleeping_engines [--seeds 30] [--scenarios 2] [APPLICATION ...]

On one or two A100, models that take turns: drafts, critiques and revisions, checks between steps.
Plans of auto without and with prepared starts, without and with engines that sleep, are carried out
on the same hidden draws of the output lengths, in simulation, planning not included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samullm_plugin.app.loading import load_application
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.types import Floats
from samullm_plugin.planning.building import sample_scenarios
from samullm_plugin.planning.instances import make_instance
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.rules.sharing import shared_problem
from samullm_plugin.simulator import PlanSimulator

MODELS = {
    "small": "THUDM/chatglm3-6b",
    "seven": "mistralai/Mistral-7B-Instruct-v0.2",
    "writer": "lmsys/vicuna-13b-v1.5",
    "judge": "WizardLMTeam/WizardLM-13B-V1.2",
    "large": "meta-llama/Llama-2-70b-chat-hf",
}


@dataclass(frozen=True, slots=True)
class Alternating:
    """An application whose models take turns.

    Attributes:
        gpus: A100.
        rows: requests of the first node.
        steps: model and most tokens of each node, which follow one another.
        keep: share of the rows that a judgement of at most 20 tokens lets go on.
    """

    gpus: int
    rows: int
    steps: tuple[tuple[str, int], ...]
    keep: float = 1.0

    def nodes(self) -> dict[str, Any]:
        """Return the nodes of its ``app.yaml``."""
        made: dict[str, Any] = {}
        for k, (model, tokens) in enumerate(self.steps):
            source = {"for_each": f"step{k - 1}"} if k else {"requests": "rows.jsonl"}
            made[f"step{k}"] = {"model": model, "sampling_params": {"max_tokens": tokens}, **source}
            if tokens <= 20 and self.keep < 1:
                made[f"step{k}"]["keep"] = {"when": "yes", "probability": self.keep}
        return made


def rounds(writer: str, judge: str, count: int, tokens: int = 300) -> tuple[tuple[str, int], ...]:
    """Return a draft, and so often a critique and a revision."""
    return ((writer, tokens), *((judge, 150), (writer, tokens)) * count)


CHECKED = (("seven", 200), ("writer", 8), ("seven", 200), ("writer", 8), ("seven", 400))
THREE = (("seven", 300), ("small", 100), ("writer", 100)) * 2

APPLICATIONS = {
    "1 round, 300 rows": Alternating(1, 300, rounds("seven", "writer", 1)),
    "2 rounds, 300 rows": Alternating(1, 300, rounds("seven", "writer", 2)),
    "2 rounds, 3,000 rows": Alternating(1, 3000, rounds("writer", "judge", 2, 400)),
    "3 rounds, 500 rows": Alternating(1, 500, rounds("writer", "judge", 3)),
    "checked, 400 rows": Alternating(1, 400, CHECKED, 0.6),
    "checked, 1,000 rows": Alternating(1, 1000, CHECKED, 0.6),
    "three models, 500 rows": Alternating(1, 500, THREE),
    "three models, 500 rows, 2 GPUs": Alternating(2, 500, THREE),
    "2 rounds, 70B judge, 400 rows, 2 GPUs": Alternating(2, 400, rounds("writer", "large", 2)),
    "2 rounds, 600 rows, 2 GPUs": Alternating(2, 600, rounds("seven", "writer", 2)),
}


def hidden_s(
    host: PluginHost, path: Path, seeds: int, **options: bool
) -> tuple[Floats, tuple[int, int]]:
    """Return makespans of a plan by hidden draw; in the first, engines started and woken."""
    loaded = load_application(path)
    instance = make_instance(host, loaded, loaded.planner.model_copy(update=options))
    found = make_plan(host, instance.problem, "auto", instance.planning_options(host))
    draws = sample_scenarios(
        instance.problem.app, instance.estimator, np.random.default_rng([0, 41]), seeds
    )
    problem = instance.problem.with_scenarios(draws)
    if found.shared:
        problem = shared_problem(problem, found.shared)
    traces = PlanSimulator(problem).simulate(found.plan)
    segments = traces[0].segments
    woken = sum(s.woken for s in segments)
    started = sum(s.ready_s > s.start_s for s in segments) - woken
    return np.array([t.makespan_s for t in traces]), (started, woken)


def cell(with_s: Floats, without_s: Floats) -> str:
    """Return the mean paired difference with its standard error."""
    ratio = 100 * (with_s / without_s - 1)
    return f"{ratio.mean():+.1f} ± {ratio.std(ddof=1) / np.sqrt(len(ratio)):.1f} %"


def main() -> None:
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("applications", nargs="*", default=list(APPLICATIONS))
    parser.add_argument("--seeds", type=int, default=30, help="hidden draws")
    parser.add_argument("--scenarios", type=int, default=2, help="length scenarios of the plans")
    given = parser.parse_intermixed_args()
    host = PluginHost.from_settings()
    print("| application | none, s | prepared | sleeping | both | both to prepared | woken |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.applications:
            one, rng = APPLICATIONS[name], np.random.default_rng(3)
            texts = ["tell me about it " * int(rng.integers(5, 80)) for _ in range(one.rows)]
            rows = [{"id": f"r{i}", "prompt": text} for i, text in enumerate(texts)]
            folder = Path(scratch)
            (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            used = {model for model, _ in one.steps}
            app = {
                "version": 1,
                "name": "alternating",
                "models": {m: {"model": MODELS[m], "max_model_len": 4096} for m in sorted(used)},
                "nodes": one.nodes(),
                "cluster": {"gpus": one.gpus, "gpu": "A100-80GB", "nvlink": 2},
                "planner": {"scheduler": "auto", "scenarios": given.scenarios},
            }
            path = folder / "app.yaml"
            path.write_text(json.dumps(app))
            made = [
                hidden_s(host, path, given.seeds, prepared_starts=ahead, sleeping_engines=sleep)
                for ahead in (False, True)
                for sleep in (False, True)
            ]
            (none, _), (sleeping, _), (ahead, _), (both, (started, woken)) = made
            cells = (cell(ahead, none), cell(sleeping, none), cell(both, none), cell(both, ahead))
            print(
                f"| {name} | {none.mean():,.1f} | {' | '.join(cells)} | "
                f"{woken} of {started + woken} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
