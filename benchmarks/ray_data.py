"""A pipeline of two models in Ray Data LLM and in this product, in turn, on one local Ray cluster.

Both get the same two small models with random weights on CPU engines, the same prompts and the same
engine settings, and two of the machine's cores as devices: each model writes 32 tokens, the second
reads what the first wrote. Printed per round: seconds from the first call to the last row, engine
starts included; the share of both devices' time in which no request was on the device's engine;
and with ``--kill``, what becomes of the job when one engine is killed halfway.

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

TOKENS = 32
ENGINE = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "dtype": "float32", "block_size": 32}


def prompts(rows: int) -> list[str]:
    """Return prompts of words that the models' tokenizer has."""
    return [" ".join(f"w{3 + (7 * k + j) % 400}" for j in range(16)) for k in range(rows)]


def kill_an_engine(after_s: float, killed: list[int]) -> threading.Timer:
    """Kill the first engine process found, ``after_s`` from when one is there and busy."""

    def kill() -> None:
        for process in psutil.process_iter(["cmdline", "name"]):
            words = " ".join([process.info["name"] or "", *(process.info["cmdline"] or [])])
            if "EngineCore" in words or "samullm-engine" in words:
                killed.append(process.pid)
                process.kill()
                return

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
            engine_kwargs={**ENGINE, "max_model_len": 512, "distributed_executor_backend": "mp"},
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

    engine = {k: v for k, v in ENGINE.items() if k != "dtype"} | {"dtype": "float32"}
    app = sl.App(
        "two",
        models={
            name: sl.Model(str(path), engine_args=engine)
            for name, path in zip(("first", "second"), models, strict=True)
        },
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
        app.plan(gpus=2), output_dir=directory, executor="ray", reuse="off",
        executor_options={"address": "auto", "resource": "CPU"},
    )  # fmt: skip
    rows = run.to_pandas().to_dict("records")
    metrics = json.loads((directory / "metrics.json").read_text())
    return [r["two"] for r in rows], float(metrics["idle_share"]["measured"])


def main() -> None:
    """Measure and print."""
    import ray

    from tests.models import make_tiny_llama

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kill", action="store_true", help="kill an engine halfway")
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
                killed: list[int] = []
                timer = None
                if options.kill and number and seconds[name]:
                    timer = kill_an_engine(0.7 * seconds[name][0], killed)
                began_s = time.perf_counter()
                try:
                    if name == "Ray Data LLM":
                        written, idle = with_ray_data(models, texts)
                    else:
                        run = Path(temporary) / f"run{number}"
                        written, idle = with_samullm(models, texts, run)
                except Exception as error:  # what becomes of the job is the result
                    print(f"{name}: failed: {type(error).__name__}", flush=True)
                    continue
                finally:
                    if timer is not None:
                        timer.cancel()
                wall_s = time.perf_counter() - began_s
                if not killed:
                    seconds[name].append(wall_s)
                note = f", an engine killed ({killed[0]})" if killed else ""
                print(
                    f"{name}: {wall_s:.1f} s, {len(written)} rows, devices idle {idle:.0%}{note}",
                    flush=True,
                )
        for name, found in seconds.items():
            print(f"{name}: median {statistics.median(found):.1f} s of {len(found)}")


if __name__ == "__main__":
    main()
