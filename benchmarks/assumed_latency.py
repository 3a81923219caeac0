"""How far iteration latencies assumed from data sheets are off, on measurements of six GPUs.

    python benchmarks/assumed_latency.py ../shared/data

Fits the shares of :class:`~samullm_linear.assumed.Shares` and prints, for each kind of
GPU and each model, the error with it left out of the fit. Measurements: H100 (vLLM 0.15,
inference-sim @ 9293b227), H100 to B300 (vLLM 0.12 to 0.19, steady states, aiconfigurator @
095f58a5), RTX 4090 and RTX PRO 6000 (vLLM 0.19, LLMServingSim @ 5daddb21), A100 (an engine of
2023, puddingfjz/vllm @ de1677dc; not fitted, its engine launches every kernel by itself).
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from samullm_linear.assumed import SHARES, Shares, assumed_latency

from samullm_plugin.checkpoints.gpus import DATA_SHEETS, DataSheet
from samullm_plugin.checkpoints.models import bundled_architecture
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.latency import StepTable
from samullm_plugin.model.types import Floats

LLAMA_70B = ModelArchitecture(80, 8192, 64, 8, 128, 28672, 128256)
OTHERS = {
    "meta-llama/Llama-3.1-70B": LLAMA_70B,
    "openai/gpt-oss-120b": ModelArchitecture(
        36, 2880, 64, 8, 64, 2880, 201088, num_experts=128, num_active_experts=4, dtype_bytes=0.53
    ),
    "MiniMaxAI/MiniMax-M2.5": ModelArchitecture(
        62, 3072, 48, 8, 128, 1536, 200064, num_experts=256, num_active_experts=8, dtype_bytes=1.0
    ),
    "Qwen/Qwen3-235B-A22B-FP8": ModelArchitecture(
        94, 4096, 64, 4, 128, 1536, 151936, num_experts=128, num_active_experts=8, dtype_bytes=1.0
    ),
    "llama-2-70b": ModelArchitecture(80, 8192, 64, 8, 128, 28672, 32000),
    "codellama-34b": ModelArchitecture(48, 8192, 64, 8, 128, 22016, 32000),
}
BITS = {"fp8": 1.0, "fp4": 0.56, "": 2.0, "bf16": 2.0}
SYSTEMS = {"h100_sxm": "H100-80GB", "h200_sxm": "H200-141GB", "b200_sxm": "B200-180GB",
           "b300_sxm": "B200-180GB"}  # fmt: skip

KV_TOKENS_PRO_6000 = 400_000
"""Not recorded: what two cards leave of 0.9 of their memory beside the weights, rounded."""


@dataclass(frozen=True, slots=True)
class Point:
    """Iterations of one setting, and the mean seconds of one.

    Attributes:
        gpu: what is left out together.
        model: its name.
        sheet: data sheet.
        architecture: sizes.
        size: tensor-parallel size.
        steps: compositions, weighted by ``weights``.
        weights: shares of the compositions.
        seconds: measured.
    """

    gpu: str
    model: str
    sheet: DataSheet
    architecture: ModelArchitecture
    size: int
    steps: StepTable
    weights: Floats
    seconds: float


def table(rows: Sequence[Sequence[float]]) -> StepTable:
    """Return iterations of (decode sequences, context, prefill sequences, tokens, pairs)."""
    d, context, p, tokens, pairs = (np.array(v, np.float64) for v in zip(*rows, strict=True))
    whole = [v.round().astype(np.int64) for v in (d + p, d + tokens, p, tokens)]
    return StepTable(whole[0], whole[1], whole[2], whole[3], pairs, context, context / (d + 1e-9))


def interstep(folder: Path) -> Iterator[Point]:
    """Yield single iterations of an H100."""
    with gzip.open(folder / "h100_vllm015" / "interstep_ms.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    for row in rows[::7]:
        p, tokens = int(row["batch.num_prefill_reqs"]), float(row["batch.prefill_tokens"])
        d = int(row["batch.num_decode_reqs"])
        name = row["model"].lower()
        architecture = next(a for n, a in OTHERS.items() if name.startswith(n) or n in name)
        context = max(float(row["kv_tokens"]) - tokens, d)
        steps = table([(d, context if d else 0, p, tokens, tokens**2 / 2 / max(p, 1))])
        yield Point("H100", name, DATA_SHEETS["H100-80GB"], architecture, int(row["tp"]), steps,
                    np.ones(1), float(row["interstep_ms"]) / 1e3)  # fmt: skip


def steady(folder: Path) -> Iterator[Point]:
    """Yield steady states: decode iterations, and one in so many with a prompt's chunk."""
    path = folder / "h100_h200_steady_state" / "silicon_vllm.csv.gz"
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            ep, dp = row["moe_ep_size"] or "1", row["attention_dp_size"] or "1"
            if row["mode"] != "agg" or row["pp_size"] != "1" or ep != "1" or dp != "1":
                continue
            name = row["model_path"]
            known = OTHERS.get(name)
            if known is None and (found := bundled_architecture(name)):
                known = found[0]
            if known is None or row["system"] not in SYSTEMS:
                continue
            if name != "openai/gpt-oss-120b":
                known = replace(known, dtype_bytes=BITS[row["precision"]])
            batch, isl, osl = (int(row[k]) for k in ("batch_size", "isl", "osl"))
            context = batch * (isl + osl / 2)
            chunk = min(isl, 8192)
            chunks = -(-isl // chunk)
            share = min(batch * chunks / osl, 0.9)
            pairs = chunk * isl / 2
            steps = table([(batch, context, 0, 0, 0), (batch, context, 1, chunk, pairs)])
            yield Point(
                row["system"].split("_")[0].upper(), name, DATA_SHEETS[SYSTEMS[row["system"]]],
                known, int(row["tp_size"]), steps, np.array([1 - share, share]),
                float(row["silicon_tpot_ms"]) / 1e3,
            )  # fmt: skip


def series(folder: Path) -> Iterator[Point]:
    """Yield seconds without prompts of whole runs."""
    for run, gpu in (("RTX4090_Llama-3.1-8B", "RTX4090-24GB"),
                     ("RTXPRO6000_Qwen3-32B", "RTXPRO6000-96GB")):  # fmt: skip
        base = folder / "vllm019_runs" / run
        meta = json.loads((base / "vllm" / "meta.json").read_text())
        found = bundled_architecture(meta["model"])
        assert found is not None
        capacity = meta.get("kv_cache", {}).get("num_kv_tokens", KV_TOKENS_PRO_6000)
        with (base / "vllm" / "timeseries.csv").open() as file:
            for row in csv.DictReader(file):
                running, speed = int(row["running"]), float(row["gen_throughput"])
                if float(row["prompt_throughput"]) or running < 1 or speed < 1:
                    continue
                context = max(float(row["kv_cache_pct"]) / 100 * capacity, running)
                yield Point(
                    gpu.split("-")[0], meta["model"], DATA_SHEETS[gpu], found[0],
                    int(meta["engine_kwargs"]["tensor_parallel_size"]),
                    table([(running, context, 0, 0, 0)]), np.ones(1), running / speed,
                )  # fmt: skip


def a100(folder: Path) -> Iterator[Point]:
    """Yield a sample of the iterations of an engine of 2023."""
    with gzip.open(folder / "a100_iterations.csv.gz", "rt") as file:
        for i, row in enumerate(csv.DictReader(file)):
            if i % 401 or (found := bundled_architecture(row["model"])) is None:
                continue
            batch, context = int(row["batch_size"]), float(row["context_tokens"])
            new = float(row["new_tokens"])
            one = (batch, context, 0, 0, 0)
            if row["phase"] == "prefill":
                one = (0, 0, batch, new, new**2 / 2 / batch)
            yield Point("A100 (2023)", row["model"], DATA_SHEETS["A100-80GB"], found[0],
                        int(row["tp"]), table([one]), np.ones(1),
                        float(row["iter_s"]) - float(row["meta_s"]))  # fmt: skip


def errors(points: Sequence[Point], shares: Shares) -> Floats:
    """Return the logarithm of predicted over measured seconds of each point."""
    made = {}
    found = []
    for p in points:
        key = p.sheet, p.architecture, p.size
        if key not in made:
            made[key] = assumed_latency(p.architecture, p.size, p.sheet, shares)
        predicted = float(made[key].step_seconds(p.steps) @ p.weights)
        found.append(np.log(predicted / p.seconds))
    return np.array(found)


def loss(points: Sequence[Point], shares: Shares) -> float:
    """Return the mean over GPU and model of the mean absolute logarithm."""
    found = np.abs(errors(points, shares))
    groups = sorted({(p.gpu, p.model) for p in points})
    means = [found[[(p.gpu, p.model) == g for p in points]].mean() for g in groups]
    return float(np.mean(means))


LIMITS = {"bandwidth": (0.4, 0.95), "context_bandwidth": (0.2, 0.95), "compute": (0.2, 0.85),
          "attention_compute": (0.1, 0.8), "link": (0.1, 0.9)}  # fmt: skip


def fit(points: Sequence[Point], start: Shares = SHARES) -> Shares:
    """Return the shares with the least loss, one at a time in ever smaller steps."""
    best, value = start, loss(points, start)
    for step in (1.6, 1.25, 1.1, 1.04):
        for _ in range(3):
            before = value
            for field in fields(Shares):
                for factor in (step, 1 / step):
                    new = getattr(best, field.name) * factor
                    low, high = LIMITS.get(field.name, (0.0, np.inf))
                    candidate = replace(best, **{field.name: float(np.clip(new, low, high))})
                    if (found := loss(points, candidate)) < value - 1e-6:
                        best, value = candidate, found
            if before - value < 1e-3:
                break
    return best


def main() -> None:
    """Fit, and print the tables."""
    folder = Path(sys.argv[1])
    points = [*interstep(folder), *steady(folder), *series(folder)]
    old = list(a100(folder))
    shares = fit(points)
    print(shares)
    for what in ("gpu", "model"):
        print(f"\n| {what} left out | points | mean error | median | bias |\n|---|---|---|---|---|")
        values = []
        for name in sorted({getattr(p, what) for p in points}):
            rest = [p for p in points if getattr(p, what) != name]
            out = [p for p in points if getattr(p, what) == name]
            found = errors(out, fit(rest, shares))
            percent = 100 * np.abs(np.exp(found) - 1)
            values.append(percent.mean())
            print(f"| {name} | {len(out)} | {percent.mean():.0f} % | {np.median(percent):.0f} % | "
                  f"{100 * (np.exp(np.median(found)) - 1):+.0f} % |")  # fmt: skip
        print(f"| mean | | {np.mean(values):.0f} % | | |")
    found = errors(old, shares)
    print(f"\nA100, engine of 2023: {100 * np.abs(np.exp(found) - 1).mean():.0f} % "
          f"(bias {100 * (np.exp(np.median(found)) - 1):+.0f} %)")  # fmt: skip


if __name__ == "__main__":
    main()
