"""A pipeline of two models in Ray Data LLM and in this product, in turn, on one local Ray cluster.

Both get the same two small models with random weights on CPU engines, the same prompts, the same
engine settings (``ENGINE``; all others are what each takes by itself), and two of the machine's
cores as devices: each model writes 32 tokens, the second reads what the first wrote. Printed per
round: seconds from the first call to the last row, engine starts included; the share of both
devices' time until then in which they were idle; and with ``--kill``, what becomes of the job when
one engine is killed once a model has done a quarter of the rows. Both are as they come: Ray Data's
``max_errored_blocks`` is 0, and what fails there is tried again; here an engine is started anew.

The idle shares are upper and lower bounds. This product's devices are busy while an iteration
runs. Of Ray Data's engines no iterations are known: a stage is taken to be busy from when its first
row is made ready for the engine, which may still be starting, until its last row comes out.

    python -m benchmarks.ray_data --rows 400 --rounds 3
    python -m benchmarks.ray_data --rows 400 --rounds 1 --kill --limit-s 600

A round that is not over after ``--limit-s`` is given up; what it leaves disturbs the rounds after
it, so that each system is better run by itself then (``--only``).

Needs the extras ray and vllm, and pandas.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

SYSTEMS = ("Ray Data LLM", "samullm-plugin")
TOKENS, MAX_MODEL_LEN = 32, 512
ENGINE = {
    "max_num_seqs": 32,
    "max_num_batched_tokens": 2048,
    "dtype": "float32",
    "block_size": 32,
    "enable_prefix_caching": False,
    "enforce_eager": True,
}
KILL_AT = 0.25
"""Share of the rows of a model after which an engine is killed."""


def prompts(rows: int) -> list[str]:
    """Return prompts of words that the models' tokenizer has."""
    return [" ".join(f"w{3 + (7 * k + j) % 400}" for j in range(16)) for k in range(rows)]


def find_engine() -> psutil.Process | None:
    """Return an engine's process, of those that this process and its Ray cluster started."""

    def words(process: psutil.Process | None) -> str:
        try:
            return "" if process is None else " ".join([process.name(), *process.cmdline()])
        except psutil.NoSuchProcess:
            return ""

    server = "samullm_vllm.fork_server"  # what it forks goes by its name
    for process in psutil.Process().children(recursive=True):
        said = words(process)
        if "EngineCore" in said or (server in said and server in words(process.parent())):
            return process
    return None


@contextmanager
def killing(num_done: Callable[[], int], enough: int, notes: list[str]) -> Iterator[None]:
    """Kill the first engine process found once so many rows are done; notes take what came of it.

    Args:
        num_done: tells how many rows of a model are done.
        enough: how many must be.
        notes: takes a line.
    """
    over = threading.Event()
    killed_s: list[float] = []

    def watch() -> None:
        while not over.wait(0.1):
            if num_done() >= enough:
                process = find_engine()
                if process is None:
                    notes.append("no engine was there to be killed")
                else:
                    process.kill()
                    killed_s.append(time.monotonic())
                    notes.append(f"an engine killed after {num_done()} rows of a model")
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        notes += [f"{time.monotonic() - s:.0f} s before the end" for s in killed_s]


@contextmanager
def limited(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError in this thread after so many seconds."""

    def end(*_: object) -> None:
        raise TimeoutError(f"not over after {limit_s:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def with_ray_data(models: list[Path], texts: list[str], done: Path) -> tuple[list[str], float]:
    """Return what the second model wrote, and the idle share of the devices.

    A byte is appended to the file ``done`` for each row that comes out of a model.
    """
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    def after(row: dict[str, Any], target: str) -> dict[str, Any]:
        with done.open("ab") as file:
            file.write(b".")
        kept = {k: v for k, v in row.items() if k in ("id", *times)}
        return {**kept, target: row["generated_text"], f"{target}_out_s": time.time()}

    def stage(folder: Path, source: str, target: str) -> Any:
        sampling = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
        config = vLLMEngineProcessorConfig(
            model_source=str(folder),
            concurrency=1,
            batch_size=32,
            placement_group_config={"bundles": [{"CPU": 1}]},
            engine_kwargs={
                **ENGINE,
                "max_model_len": MAX_MODEL_LEN,
                "distributed_executor_backend": "mp",
            },
            chat_template_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,
        )
        return build_processor(
            config,
            preprocess=lambda row: {
                **row,
                "prompt": row[source],
                "sampling_params": sampling,
                f"{target}_in_s": time.time(),
            },
            postprocess=lambda row: after(row, target),
        )

    times = [f"{t}_{e}_s" for t in ("first", "second") for e in ("in", "out")]
    began_s = time.time()
    ds = ray.data.from_items([{"id": i, "text": t} for i, t in enumerate(texts)])
    found = stage(models[1], "first", "second")(stage(models[0], "text", "first")(ds)).take_all()
    wall_s = time.time() - began_s
    busy_s = sum(
        max(r[f"{t}_out_s"] for r in found) - min(r[f"{t}_in_s"] for r in found)
        for t in ("first", "second")
    )
    return [r["second"] for r in sorted(found, key=lambda r: r["id"])], 1 - busy_s / (2 * wall_s)


def with_samullm(models: list[Path], texts: list[str], directory: Path) -> tuple[list[str], float]:
    """Return what the second model wrote, and the idle share of the devices."""
    import samullm_plugin as sl

    began_s = time.time()
    app = sl.App(
        "two",
        models={
            name: sl.Model(str(path), max_model_len=MAX_MODEL_LEN, engine_args=ENGINE)
            for name, path in zip(("first", "second"), models, strict=True)
        },
        cluster={"gpus": 2, "gpu": "core", "gpu_memory_gib": 1},
    )
    sampling = {"temperature": 0.0, "ignore_eos": True}
    first = app.llm(
        "one",
        model="first",
        data=[{"id": str(i), "text": t} for i, t in enumerate(texts)],
        prompt="{{ text }}",
        max_tokens=TOKENS,
        sampling_params=sampling,
    )
    app.llm(
        "two",
        model="second",
        for_each=first,
        prompt="{{ output }}",
        max_tokens=TOKENS,
        sampling_params=sampling,
    )
    run = app.run(
        app.plan(reuse="off", executor="ray"),
        output_dir=directory,
        executor="ray",
        executor_options={"address": "auto", "resource": "CPU"},
    )
    rows = run.to_pandas().to_dict("records")
    wall_s = time.time() - began_s
    metrics = json.loads((directory / "metrics.json").read_text())
    busy = (1 - metrics["idle_share"]["measured"]) * metrics["makespan_s"]["measured"] / wall_s
    return [r["two"] for r in rows], 1 - busy


def main() -> None:
    """Measure and print."""
    import ray

    from tests.models import make_tiny_llama

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kill", action="store_true", help="kill an engine in each round")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="of a round")
    parser.add_argument("--only", choices=SYSTEMS, help="run one of the two")
    options = parser.parse_args()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    # Ray gives its workers the lowest priority: beside other work engines hardly get a turn.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="samullm-ray-data-") as temporary:
        models = [
            make_tiny_llama(
                Path(temporary) / f"m{k}", seed=k, tokenizer=True, num_hidden_layers=options.layers
            )
            for k in range(2)
        ]
        texts = prompts(options.rows)
        seconds: dict[str, list[float]] = {
            name: [] for name in SYSTEMS if options.only in (None, name)
        }
        for number in range(options.rounds):
            order = list(seconds) if number % 2 == 0 else list(reversed(seconds))
            for name in order:
                work = Path(temporary) / f"{name}{number}".replace(" ", "-")
                text, took_s = one_round(
                    name, models, texts, work, kill=options.kill, limit_s=options.limit_s
                )
                print(f"{name}: {text}", flush=True)
                if took_s is not None:
                    seconds[name].append(took_s)
        for name, took in seconds.items():
            median = f"median {statistics.median(took):.1f} s" if took else "no round succeeded"
            print(f"{name}: {median} of {len(took)}")


def one_round(
    name: str, models: list[Path], texts: list[str], work: Path, *, kill: bool, limit_s: float
) -> tuple[str, float | None]:
    """Return what came of a round in words, and its seconds if it succeeded.

    Args:
        name: one of ``SYSTEMS``.
        models: folders of both models.
        texts: the prompts.
        work: folder or file of the round, not there yet.
        kill: kill an engine in it.
        limit_s: give it up after so many seconds.
    """
    by_ray_data, notes = name == SYSTEMS[0], list[str]()

    def num_done() -> int:
        path = work if by_ray_data else work / "events.jsonl"
        if not path.exists():
            return 0
        return path.stat().st_size if by_ray_data else path.read_bytes().count(b'"finished"')

    run = with_ray_data if by_ray_data else with_samullm
    began_s = time.perf_counter()
    try:
        killer = killing(num_done, int(KILL_AT * len(texts)), notes) if kill else nullcontext()
        with limited(limit_s), killer:
            written, idle = run(models, texts, work)
    except Exception as error:  # what becomes of the job is the result
        told = f"failed: {type(error).__name__}: {error}, {num_done()} outputs by then"
        return ", ".join([told, *notes]), None
    wall_s = time.perf_counter() - began_s
    if kill and not notes:
        notes.append("over before an engine was to be killed")
    found = f"{wall_s:.1f} s, {len(written)} rows, devices idle {idle:.0%}"
    return ", ".join([found, *notes]), wall_s


if __name__ == "__main__":
    main()
