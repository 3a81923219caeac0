"""What the coordinator costs per request over Ray, beside the same engines started by itself.

One node, two engines with one core each and a model of random weights, outputs of one token, so
that requests come and go as fast as such engines can. Processor time of the coordinator's process,
all its threads, from the first finished request to the last; Ray's cluster is this machine alone.

    python -m benchmarks.ray_coordinator --requests 4000
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from samullm_plugin.host.interfaces.observer import RunEvent
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.run.run import start_run
from tests.models import make_tiny_llama  # the checkout's own
from tests.run.real_app import ENGINE, setup

APP = """
version: 1
name: short
models:
  one: {{model: one, path: {folder}/one, max_model_len: 1024, architecture: {folder}/one, {engine}}}
nodes:
  answer:
    {{model: one, requests: requests.jsonl, sampling_params: {{temperature: 0, max_tokens: 1}}}}
cluster: {{gpus: 2, gpu: core, gpu_memory_gib: 1, nvlink: 2}}
"""


def measured(folder: Path, executor: str, count: int) -> dict[str, object]:
    """Run the requests by an executor; return what it cost."""
    seen: list[tuple[float, float]] = []

    def listen(event: RunEvent) -> None:
        if event.kind == "finished":
            seen.append((time.process_time(), time.monotonic()))

    options = {"start_method": "fork"} if executor == "vllm" else {}
    ready = setup(
        folder, folder / executor, executor=executor, executor_options=options, listener=listen
    )
    plan = Plan((Stage((Assignment("answer", ParallelConfig(2), (0, 1)),)),))
    outcome = start_run(ready, plan)
    assert not outcome.failed
    assert len(seen) == count
    cpu = np.array([s[0] for s in seen])
    return {
        "executor": executor,
        "requests": count,
        "cpu_us_per_request": round(1e6 * float(cpu[-1] - cpu[0]) / (count - 1), 1),
        "requests_per_s": round((count - 1) / (seen[-1][1] - seen[0][1]), 1),
    }


def main() -> None:
    """Measure and print JSON, one line for each executor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samullm-ray-") as name:
        folder = Path(name)
        make_tiny_llama(folder / "one", tokenizer=True, num_hidden_layers=1)
        lines = [json.dumps({"prompt": f"w{3 + k % 400} w7"}) for k in range(options.requests)]
        (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
        engine = ENGINE.replace("max_num_seqs: 8", "max_num_seqs: 128")
        (folder / "app.yaml").write_text(APP.format(folder=folder, engine=engine))
        for executor in ("vllm", "ray"):
            sys.stdout.write(json.dumps(measured(folder, executor, options.requests)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
