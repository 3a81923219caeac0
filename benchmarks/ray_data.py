"""A pipeline of two models in Ray Data LLM and in this product, in turn, on one local Ray cluster.

Both get the same two small models with random weights on CPU engines, the same prompts, the same
engine settings (``ENGINE``; all others are what each takes by itself), and two of the machine's
cores as devices: each model writes 32 tokens, the second reads what the first wrote. Printed per
round: seconds from the first call to the last row, engine starts included; the share of both
devices' time until then in which they were idle; and with ``--kill``, what becomes of the job when
one engine is killed late in it, in every round but the first.

The idle shares are upper and lower bounds. This product's devices are busy while an iteration
runs. Of Ray Data's engines no iterations are known: a stage is taken to be busy from when its first
row is made ready for the engine, which may still be starting, until its last row comes out.

    python -m benchmarks.ray_data --rows 400 --rounds 3
    python -m benchmarks.ray_data --rows 400 --kill

Needs the extras ray and vllm, and pandas.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

TOKENS, MAX_MODEL_LEN = 32, 512
ENGINE = {
    "max_num_seqs": 32,
    "max_num_batched_tokens": 2048,
    "dtype": "float32",
    "block_size": 32,
    "enable_prefix_caching": False,
    "enforce_eager": True,
}
KILL_AT = 0.7
"""Share of an undisturbed round's seconds after which an engine is killed."""


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


def kill_an_engine(after_s: float, notes: list[str]) -> threading.Timer:
    """Kill the first engine process found ``after_s`` from now; what came of it goes to notes."""

    def kill() -> None:
        process = find_engine()
        if process is None:
            notes.append("no engine was there to be killed")
        else:
            process.kill()
            notes.append(f"an engine killed ({process.pid})")

    timer = threading.Timer(after_s, kill)
    timer.daemon = True
    timer.start()
    return timer


def with_ray_data(models: list[Path], texts: list[str]) -> tuple[list[str], float]:
    """Return what the second model wrote, and the idle share of the devices."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

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
            postprocess=lambda row: {
                **{k: v for k, v in row.items() if k in ("id", *times)},
                target: row["generated_text"],
                f"{target}_out_s": time.time(),
            },
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
    parser.add_argument(
        "--kill", action="store_true", help="kill an engine late, but in the first round"
    )
    options = parser.parse_args()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    seconds: dict[str, list[float]] = {"Ray Data LLM": [], "samullm-plugin": []}
    with tempfile.TemporaryDirectory() as temporary:
        models = [
            make_tiny_llama(
                Path(temporary) / f"m{k}", seed=k, tokenizer=True, num_hidden_layers=options.layers
            )
            for k in range(2)
        ]
        texts = prompts(options.rows)
        for number in range(options.rounds):
            order = list(seconds) if number % 2 == 0 else list(reversed(seconds))
            for name in order:
                notes: list[str] = []
                timer = None
                if options.kill and number and seconds[name]:
                    timer = kill_an_engine(KILL_AT * seconds[name][0], notes)
                began_s = time.perf_counter()
                try:
                    if name == "Ray Data LLM":
                        written, idle = with_ray_data(models, texts)
                    else:
                        run = Path(temporary) / f"run{number}"
                        written, idle = with_samullm(models, texts, run)
                except Exception as error:  # what becomes of the job is the result
                    kind = type(error).__name__
                    print(", ".join([f"{name}: failed: {kind}: {error}", *notes]), flush=True)
                    continue
                finally:
                    if timer is not None:
                        timer.cancel()
                wall_s = time.perf_counter() - began_s
                if timer is None:
                    seconds[name].append(wall_s)
                elif not notes:
                    notes.append("over before an engine was to be killed")
                found = f"{wall_s:.1f} s, {len(written)} rows, devices idle {idle:.0%}"
                print(", ".join([f"{name}: {found}", *notes]), flush=True)
        for name, took_s in seconds.items():
            median = f"median {statistics.median(took_s):.1f} s" if took_s else "no round succeeded"
            print(f"{name}: {median} of {len(took_s)} undisturbed")


if __name__ == "__main__":
    main()
