"""What the coordinator costs over Ray, beside the same engines started by itself.

One node, two engines with one core each and a model of random weights, outputs of one token, so
that requests come and go as fast as such engines can. All is processor time of the coordinator's
process, its threads and Ray's: until the first request is finished, which does not depend on how
many there are, and from then on for each. Ray's cluster is this machine alone. ``--calls`` measures
what one call to an agent costs that process, by the bytes sent and received.

    python -m benchmarks.ray_coordinator --requests 30000 --rounds 2
    python -m benchmarks.ray_coordinator --calls
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from samullm_plugin.host.interfaces.observer import RunEvent
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.run.run import start_run
from tests.models import make_tiny_llama  # the checkout's own
from tests.run.real_app import ENGINE, run_setup

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


SIZES = ((100, 100), (100, 20_000), (20_000, 20_000), (90_000, 90_000), (200, 200_000))
"""Bytes sent and received; Ray carries more than 100,000 by its object store."""


def thread_ns() -> dict[str, int]:
    """Return the processor time of each thread of this process, by number and name."""
    found = {}
    for number in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has just ended
            folder = Path("/proc/self/task", number)
            name = (folder / "comm").read_text().strip()
            found[f"{number} {name}"] = int((folder / "schedstat").read_text().split()[0])
    return found


def spent_us(before: dict[str, int], after: dict[str, int]) -> tuple[float, float]:
    """Return the microseconds between two readings, of all threads and of Ray's own."""
    spent = {name: 1e-3 * (ns - before.get(name, 0)) for name, ns in after.items()}
    ours = sum(us for name, us in spent.items() if "python" in name)
    return sum(spent.values()), sum(spent.values()) - ours


def measured(folder: Path, executor: str, count: int) -> dict[str, object]:
    """Run the requests by an executor; return what it cost."""
    num_finished, readings = 0, list[tuple[float, dict[str, int]]]()

    def listen(event: RunEvent) -> None:
        nonlocal num_finished
        if event.kind == "finished":
            num_finished += 1
            if num_finished in (1, count):
                readings.append((time.monotonic(), thread_ns()))

    options = {"start_method": "fork"} if executor == "vllm" else {}
    began = thread_ns()
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        ready = run_setup(
            folder,
            Path(directory) / "run",
            executor=executor,
            executor_options=options,
            listener=listen,
        )
        plan = Plan((Stage((Assignment("answer", ParallelConfig(2), (0, 1)),)),))
        outcome = start_run(ready, plan)
    assert not outcome.failed
    assert num_finished == count
    (first_s, first), (last_s, last) = readings
    all_us, ray_us = spent_us(first, last)
    return {
        "executor": executor,
        "requests": count,
        "cpu_s_until_the_first": round(1e-6 * spent_us(began, first)[0], 2),
        "cpu_us_per_request": round(all_us / (count - 1), 1),
        "of_which_in_threads_of_ray": round(ray_us / (count - 1), 1),
        "calls": outcome.metrics.get("executor", {}).get("ray_polls", 0),
        "requests_per_s": round((count - 1) / (last_s - first_s), 1),
    }


def calls(count: int = 100) -> None:
    """Measure single calls to an actor that takes 20 ms to answer, and the time between them."""
    import ray

    class Echo:
        def __init__(self) -> None:
            self.answer = b""

        def be(self, size: int) -> None:
            self.answer = b"x" * size

        def exchange(self, data: bytes) -> bytes:
            del data
            time.sleep(0.02)
            return self.answer

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    actor = ray.remote(Echo).options(num_cpus=1, enable_task_events=False).remote()
    ray.get(actor.be.remote(0))
    before = thread_ns()
    time.sleep(5.0)
    row: dict[str, object] = {"idle_cpu_us_per_s": round(spent_us(before, thread_ns())[0] / 5.0)}
    print(json.dumps(row), flush=True)
    for sent, received in SIZES:
        ray.get(actor.be.remote(received))
        before = thread_ns()
        for _ in range(count):
            answered = threading.Event()
            future = actor.exchange.remote(b"x" * sent).future()
            future.add_done_callback(lambda _, told=answered: told.set())
            answered.wait()
        took_us = spent_us(before, thread_ns())[0] / count
        row = {"sent_bytes": sent, "received_bytes": received, "cpu_us_per_call": round(took_us)}
        print(json.dumps(row), flush=True)


def main() -> None:
    """Measure and print JSON, one line for each run of an executor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--calls", action="store_true", help="measure single calls instead")
    options = parser.parse_args()
    if options.calls:
        calls()
        return
    with tempfile.TemporaryDirectory(prefix="samullm-ray-") as name:
        folder = Path(name)
        make_tiny_llama(folder / "one", tokenizer=True, num_hidden_layers=1)
        lines = [json.dumps({"prompt": f"w{3 + k % 400} w7"}) for k in range(options.requests)]
        (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
        engine = ENGINE.replace("max_num_seqs: 8", "max_num_seqs: 128")
        (folder / "app.yaml").write_text(APP.format(folder=folder, engine=engine))
        for _ in range(options.rounds):
            for executor in ("vllm", "ray"):
                sys.stdout.write(json.dumps(measured(folder, executor, options.requests)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
