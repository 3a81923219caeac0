"""What engines that are taken over save: starts and makespan of two pipelines, simulated.

Run from the repository's root::

    python -m benchmarks.shared_engines

*checks*: a writer proposes and evolves three instructions, one judge checks each, the writer
answers those that pass. *refine*: a draft, another model's critique, a revision, a verdict, another
revision where it is needed, a summary. ``alone``: every node's engines are started for it; ``one
after another``: nodes of one model that follow one another are one; ``taken over``: engines of
nodes that have finished go on for others as well; ``shared``: nodes that compute at the same moment
may be served by the same engines too, where that is shorter.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from samullm_plugin.app.loading import load_application
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.planning.instances import make_instance, unfused
from samullm_plugin.planning.planner import make_plan

ROWS = 60
MODELS = {
    "writer": {"model": "THUDM/chatglm3-6b", "max_model_len": 4096},
    "judge": {"model": "lmsys/vicuna-13b-v1.5"},
}


def node(model: str, tokens: int, **given: Any) -> dict[str, Any]:
    """Return a node."""
    return {"model": model, "sampling_params": {"max_tokens": tokens}, **given}


def checks() -> dict[str, Any]:
    """Return three checks by one judge between the nodes of one writer."""
    nodes = {"propose": node("writer", 60, requests="rows.jsonl")}
    for k in range(3):
        nodes[f"evolve{k}"] = node("writer", 32, for_each="propose")
        keep = {"when": "yes", "probability": 0.5}
        nodes[f"check{k}"] = node("judge", 2, for_each=f"evolve{k}", keep=keep)
        nodes[f"answer{k}"] = node("writer", 40, for_each=f"check{k}")
    return nodes


def refine() -> dict[str, Any]:
    """Return two models that take turns."""
    again = {"when": "no", "probability": 0.5}
    return {
        "draft": node("writer", 100, requests="rows.jsonl"),
        "critique": node("judge", 60, for_each="draft"),
        "revise": node("writer", 100, for_each="critique"),
        "verdict": node("judge", 4, for_each="revise", keep=again),
        "again": node("writer", 100, for_each="verdict"),
        "summary": node("judge", 20, for_each="again"),
    }


def main() -> None:
    """Print the table."""
    host = PluginHost.from_settings()
    print("| pipeline | GPUs | engines | started | taken over | start s x GPUs | makespan s |")
    print("|---|--:|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [{"id": f"r{i}", "prompt": "tell me about it " * (i % 5 + 1)} for i in range(ROWS)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        for name, nodes in (("checks", checks()), ("refine", refine())):
            cluster = {"gpus": 2, "gpu": "A100-80GB", "nvlink": 2}
            app = {"version": 1, "name": name, "models": MODELS, "nodes": nodes}
            path = folder / f"{name}.yaml"
            path.write_text(json.dumps(app | {"cluster": cluster}))
            loaded = load_application(path)
            for gpus in (1, 2):
                fused = make_instance(host, loaded, gpus=gpus)
                alone = make_instance(host, loaded, unfused(loaded.planner), gpus=gpus)
                shared = fused.planning_options(host)
                apart = replace(shared, simulator_of=None)
                for what, problem, how in (
                    ("alone", alone.problem, apart),
                    ("one after another", fused.problem.without_shared_engines(), apart),
                    ("taken over", fused.problem, apart),
                    ("shared", fused.problem, shared),
                ):
                    result = make_plan(host, problem, "auto", how)
                    segments = result.traces[0].segments
                    started = [s for s in segments if s.ready_s > s.start_s]
                    held_s = sum((s.ready_s - s.start_s) * len(s.devices) for s in started)
                    print(
                        f"| {name} | {gpus} | {what} | {len(started)} | "
                        f"{len(segments) - len(started)} | {held_s:.0f} | "
                        f"{result.makespan_s.mean():.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
