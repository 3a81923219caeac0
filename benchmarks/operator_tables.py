"""Latency model `aiconfigurator` against its package and against measured steady states.

Needs the extra ``aiconfigurator``; reads ``../shared/data/h100_h200_steady_state`` beside the
checkout (measured points that ai-dynamo/aiconfigurator @ 095f58a5 publishes, Apache-2.0) and
``../shared/data/h100_vllm015`` (iterations of inference-sim/inference-sim @ 9293b227, Apache-2.0),
and says so where they are absent. Run from the repository's root::

    python benchmarks/operator_tables.py                       # the tables
    python benchmarks/operator_tables.py --every 8             # an eighth of the points
    python benchmarks/operator_tables.py --write docs/accuracy-operators.md
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from samullm_aiconfigurator.plugin import AiconfiguratorOptions, OperatorTables

from samullm_plugin import (
    EngineConfig,
    EngineOptions,
    Gpu,
    InputError,
    ModelSpec,
    StepModel,
    StepTable,
    Workload,
    bundled_gpu,
    bundled_model,
    simulate_engine,
)
from samullm_plugin.measuring.judging import correct_base
from samullm_plugin.profiling.iterations import Iterations
from samullm_plugin.testing.latency_contract import step_table

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
POINTS = DATA / "h100_h200_steady_state" / "silicon_vllm.csv.gz"
STEPS = DATA / "h100_vllm015" / "interstep_ms.csv.gz"
STEP_MODELS = {
    "llama-2-70b": "meta-llama/Llama-2-70b-chat-hf",
    "llama-2-70b-hf": "meta-llama/Llama-2-70b-chat-hf",
    "codellama-34b": "meta-llama/CodeLlama-34b-Instruct-hf",
}
"""Bundled models of the measured sizes."""
FITTED_ROWS = 40

QUANTISED = {
    ("MiniMaxAI/MiniMax-M2.5", "fp4"): "nvidia/MiniMax-M2.5-NVFP4",
    ("moonshotai/Kimi-K2.5", "fp4"): "nvidia/Kimi-K2.5-NVFP4",
}
"""Checkpoints that were measured, where the table names the one they were made from."""
GEMM = {("meta-llama/Llama-3.1-70B", "fp8"): "fp8", ("meta-llama/Llama-3.1-70B", "fp4"): "nvfp4"}
"""Quantisation where the named configuration has none of its own."""

METHOD = """`against the package`: time per output token of this model's iterations, put together
as the package's aggregated estimate does (as many mixed steps as requests, the rest decode steps),
against that estimate itself; the target is 2 %. `package`, `simulated`: mean absolute percentage
error of the time per output token against the measured points, of the package's estimate and of the
engine simulation with this model's latencies (closed loop of as many requests as the batch; no host
time is added). `bias` is the mean signed error. Tables are those of the package's current vLLM
version; the points were measured with older ones.
"""


@dataclass(frozen=True)
class Point:
    """One measured steady state, tensor-parallel only."""

    model: str
    system: str
    precision: str
    size: int
    expert_parallel: bool
    batch: int
    isl: int
    osl: int
    tpot_s: float

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the latency model."""
        chosen: dict[str, Any] = {"expert_parallel": self.expert_parallel}
        if (self.model, self.precision) in QUANTISED:
            chosen["models"] = {self.model: QUANTISED[self.model, self.precision]}
        if (self.model, self.precision) in GEMM:
            chosen["gemm_quant_mode"] = GEMM[self.model, self.precision]
        return chosen


def read_points() -> tuple[list[Point], int]:
    """Return the aggregated tensor-parallel points, and how many others there are."""
    points, others = [], 0
    with gzip.open(POINTS, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["mode"] != "agg":
                others += 1
                continue
            tp, pp, dp, moe_tp, moe_ep = (
                int(row[c] or 1)
                for c in ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
            )
            if pp > 1 or dp > 1 or (moe_tp * moe_ep not in (1, tp)) or min(moe_tp, moe_ep) > 1:
                others += 1
                continue
            points.append(
                Point(
                    row["model_path"], row["system"], row["precision"] or "bf16", tp,
                    tp > 1 and moe_ep == tp, int(row["batch_size"]), int(row["isl"]),
                    int(row["osl"]), float(row["silicon_tpot_ms"]) * 1e-3,
                )
            )  # fmt: skip
    return points, others


class Pricer:
    """Latency models of the points' deployments, each made once."""

    def __init__(self) -> None:
        """Start without any."""
        self._models: dict[str, OperatorTables] = {}
        self.seconds = 0.0

    def steps(self, point: Point) -> tuple[StepModel, str]:
        """Return the iteration latency of a point, and the name the package knows its model by.

        Raises:
            InputError: the package cannot price it.
        """
        options = point.options
        key = repr(sorted(options.items()))
        if key not in self._models:
            self._models[key] = OperatorTables(AiconfiguratorOptions(**options))
        model = self._models[key]
        # One tabulation for all points of a deployment.
        engine = EngineOptions(max_num_seqs=1024, max_num_batched_tokens=16384)
        spec = ModelSpec(point.model, 16384, engine=engine)
        began = time.perf_counter()
        gpu = Gpu(point.system, 10**12)
        found = model.step_latency(spec, gpu, point.size)
        self.seconds += time.perf_counter() - began
        return found, model._name(spec)


def of_package(point: Point, name: str) -> float:
    """Return the package's own time per output token."""
    from aiconfigurator.cli.api import cli_estimate

    mixture = dict(
        moe_tp_size=1 if point.expert_parallel else point.size,
        moe_ep_size=point.size if point.expert_parallel else 1,
    )
    found = cli_estimate(
        name,
        point.system,
        backend_name="vllm",
        isl=point.isl,
        osl=point.osl,
        batch_size=point.batch,
        tp_size=point.size,
        gemm_quant_mode=point.options.get("gemm_quant_mode"),
        **mixture,
    )
    return float(found.tpot) * 1e-3


def of_model(point: Point, steps: StepModel) -> float:
    """Return the time per output token put together as the package does."""
    b, isl, osl = point.batch, point.isl, point.osl
    context = isl + osl // 2
    decode, mixed = steps.step_seconds(
        step_table([(b, context, 0, 0, 0), (max(b - 1, 1), context, 1, isl, 0)])
    )
    if b == 1:
        return float(decode)
    if b >= osl:
        return float(mixed)
    return float((b * mixed + (osl - b) * decode) / osl)


def of_simulation(point: Point, steps: StepModel, rounds: int = 3) -> float:
    """Return the time per output token of a closed loop in the engine simulation."""
    b = point.batch
    count = rounds * b
    indptr = np.minimum(np.arange(count + 1), count - b)
    config = EngineConfig(
        max_num_seqs=max(b, 1),
        max_num_batched_tokens=8192,
        max_model_len=point.isl + point.osl + 1,
        num_blocks=2 + b * (-(-(point.isl + point.osl) // 16) + 1),
        async_scheduling=True,
    )
    run = simulate_engine(
        config,
        Workload(
            np.full(count, point.isl),
            np.full(count, point.osl),
            release_index=np.arange(b, count),
            release_indptr=indptr,
        ),
        steps,
    )
    return float(((run.finish_s - run.first_token_s) / max(point.osl - 1, 1)).mean())


def compare(points: Iterable[Point]) -> tuple[list[str], list[str], float]:
    """Return the table's rows, what could not be priced, and the seconds of tabulating."""
    pricer = Pricer()
    groups: dict[tuple[str, ...], list[tuple[float, ...]]] = defaultdict(list)
    refused: dict[str, int] = defaultdict(int)
    for point in points:
        key = (point.model, point.system, point.precision)
        try:
            steps, name = pricer.steps(point)
            theirs = of_package(point, name)
        except InputError as error:
            refused[f"{' '.join(key)}: {error}"] += 1
            continue
        except (RuntimeError, ValueError, KeyError) as error:  # what the package raises
            reason = str(error).splitlines()[0][:160]
            refused[f"{' '.join(key)}: the package's own estimate fails: {reason}"] += 1
            continue
        ours, simulated = of_model(point, steps), of_simulation(point, steps)
        groups[key].append(
            (ours / theirs - 1, theirs / point.tpot_s - 1, simulated / point.tpot_s - 1)
        )
    rows = []
    for key, found in sorted(groups.items()):
        errors = 100 * np.array(found)
        size = np.abs(errors)
        rows.append(
            f"| {' | '.join(key)} | {len(found)} | {np.median(size[:, 0]):.2f} % | "
            f"{size[:, 0].max():.2f} % | {size[:, 1].mean():.1f} % | {errors[:, 1].mean():+.1f} % "
            f"| {size[:, 2].mean():.1f} % | {errors[:, 2].mean():+.1f} % |"
        )
    return rows, [f"- {n} points: {why}" for why, n in sorted(refused.items())], pricer.seconds


def read_steps() -> list[tuple[str, Iterations]]:
    """Return measured H100 iterations by workload; the time between two steps is the iteration."""
    groups: dict[tuple[str, str, int], list[dict[str, str]]] = defaultdict(list)
    with gzip.open(STEPS, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups[row["model"], row["workload"], int(row["tp"])].append(row)
    found = []
    for (model, workload, size), rows in sorted(groups.items()):

        def column(name: str, rows: list[dict[str, str]] = rows) -> np.ndarray:
            return np.array([float(r[name]) for r in rows])

        prefills = column("batch.num_prefill_reqs").astype(np.int64)
        decodes = column("batch.num_decode_reqs").astype(np.int64)
        tokens = column("batch.prefill_tokens").astype(np.int64)
        context = np.where(decodes > 0, np.maximum(column("kv_tokens") - tokens, decodes), 0.0)
        mean = context / np.maximum(decodes, 1)
        steps = StepTable(
            prefills + decodes,
            tokens + decodes,
            prefills,
            tokens,
            tokens * (tokens / np.maximum(prefills, 1) + 1) / 2,
            context,
            mean,
        )
        phase = np.where(prefills > 0, "mixed", "decode")
        whole = Iterations(
            STEP_MODELS[model], size, "H100-80GB", phase, phase, prefills + decodes, steps,
            column("interstep_ms") * 1e-3, np.full(len(rows), np.nan),
        )  # fmt: skip
        found.append((f"{model} {workload}", whole))
    return found


def compare_steps() -> list[str]:
    """Return the table's rows of measured iterations, before and after correcting host time."""
    lines = []
    for name, rows in read_steps():
        with TemporaryDirectory() as folder:
            sizes = bundled_model(rows.model).architecture
            assert sizes is not None
            config = {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "num_hidden_layers": sizes.num_layers, "hidden_size": sizes.hidden_size,
                "num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_kv_heads,
                "intermediate_size": sizes.intermediate_size, "vocab_size": sizes.vocab_size,
                "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
            }  # fmt: skip
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            base = OperatorTables(AiconfiguratorOptions(models={rows.model: folder}))
            fitted = np.zeros(len(rows), bool)
            fitted[np.linspace(0, len(rows) - 1, FITTED_ROWS).astype(int)] = True
            entry = correct_base(base, [rows.where(fitted)], {})["entries"][0]
            rest = rows.where(~fitted)
            engine = EngineOptions(max_num_batched_tokens=16384)
            model = ModelSpec(rows.model, 4096, engine=engine)
            plain = base.step_latency(
                model, bundled_gpu(rows.device), rows.tensor_parallel_size
            ).step_seconds(rest.steps)
        corrected = plain + entry["host_s"] + entry["host_s_per_seq"] * rest.steps.num_seqs
        cells = []
        for predicted in (plain, corrected):
            apart = np.abs(predicted / rest.seconds - 1)
            total = predicted.sum() / rest.seconds.sum() - 1
            cells += [f"{100 * apart.mean():.1f} %", f"{100 * total:+.1f} %"]
        lines.append(
            f"| {name} | {rows.tensor_parallel_size} | {len(rest)} | {' | '.join(cells)} | "
            f"{1e3 * entry['host_s']:.2f} ms + {1e6 * entry['host_s_per_seq']:.1f} us |"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; write the page if asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth point only")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the page there")
    chosen = parser.parse_args(arguments)
    if not POINTS.is_file():
        print(f"no measured points: {POINTS} is absent", file=sys.stderr)
        return 2
    points, others = read_points()
    try:
        rows, refused, seconds = compare(points[:: chosen.every])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    head = (
        "| model | system | precision | points | against the package: median | worst | "
        "package | bias | simulated | bias |\n|---|---|---|" + "---:|" * 7
    )
    text = "\n".join(
        [head, *rows, "", f"Tabulating all deployments took {seconds:.1f} s.", "",
         "Not compared:", "", f"- {others} points: disaggregated, or with pipeline, data or mixed "
         "expert parallelism", *refused]
    )  # fmt: skip
    if STEPS.is_file():
        text += (
            "\n\n## Measured iterations (H100, vLLM 0.15.1)\n\n"
            f"Rows not fitted; `corrected` by the host time of {FITTED_ROWS} rows, as `samullm "
            "profile fit --base aiconfigurator` does. Every row counts as it is, host stalls "
            "included.\n\n| iterations | tp | rows | tables: MAPE | sum | corrected: MAPE | sum "
            "| host, per sequence |\n|---|" + "---:|" * 7 + "\n" + "\n".join(compare_steps())
        )
    print(text)
    if chosen.write is not None:
        chosen.write.write_text(
            "# Operator tables against measured steady states\n\n"
            f"Written by `python benchmarks/operator_tables.py --every {chosen.every} --write "
            "docs/accuracy-operators.md`. Points: ai-dynamo/aiconfigurator @ 095f58a5 "
            f"(Apache-2.0).\n\n{METHOD}\n{text}\n",
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
