"""Measured iterations beside a latency model: they correct one, and judge one.

A model that knows only the device (operator tables price what it computes) is corrected:
scheduling, input preparation, sampling and output handling on the host come on top. Two terms, one
per iteration and one per sequence, hold them. A profile is judged by runs that it was not fitted
on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samullm_plugin.checkpoints.gpus import bundled_gpu, known_gpus
from samullm_plugin.checkpoints.models import bundled_architecture
from samullm_plugin.errors import InputError
from samullm_plugin.files import save, to_json
from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.measuring.engine import Run
from samullm_plugin.model.application import Application, EngineOptions, ModelNode, ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Floats
from samullm_plugin.profiling.iterations import Iterations
from samullm_plugin.profiling.probes import ProbeWorkload
from samullm_plugin.profiling.regression import least_absolute
from samullm_plugin.simulator import PlanSimulator


def judge_runs(
    latency: LatencyModel, model: ModelSpec, device: str, size: int, runs: Sequence[Run]
) -> dict[str, Any]:
    """Return how well a latency model predicts runs of an engine.

    Per run: ``mape_pct`` of its iterations, ``sum_error_pct`` of their summed seconds, and
    ``error_pct`` of the whole run, which is what the plan simulator says it takes against the
    seconds that passed between submission and last output. The first and the second run are of one
    workload: by how much they differ is ``drift_pct``, below which no error can be expected.
    """
    steps = latency.step_latency(model, Gpu(device, 1 << 40), size)
    rows: list[dict[str, Any]] = []
    errors: list[float] = []
    for run in runs:
        predicted = steps.step_seconds(run.steps)
        planned_s = planned_seconds(latency, model, device, size, run.workload)
        errors.append(round(100 * (planned_s / run.wall_s - 1), 2))
        rows.append(
            {
                "workload": run.name,
                "requests": len(run.workload.prompt_tokens),
                "iterations": len(run.steps),
                "mape_pct": round(float(100 * np.mean(np.abs(predicted / run.step_s - 1))), 2),
                "sum_error_pct": round(float(100 * (predicted.sum() / run.step_s.sum() - 1)), 2),
                "measured_s": round(run.wall_s, 3),
                "predicted_s": round(planned_s, 3),
                "error_pct": errors[-1],
            }
        )
    walls = [r.wall_s for r in runs[:2]]
    return {
        "tp": size,
        "runs": rows,
        "worst_error_pct": max(errors, key=abs),
        "drift_pct": round(100 * (max(walls) / min(walls) - 1), 2),
    }


def planned_seconds(
    latency: LatencyModel, model: ModelSpec, device: str, size: int, workload: ProbeWorkload
) -> float:
    """Return what the plan simulator says that a workload takes on one engine that is ready."""
    gpu = Gpu(device, 1 << 40)
    prompts, outputs = np.array(workload.prompt_tokens), np.array(workload.output_tokens)
    node = ModelNode("node", model, RequestTable.of(prompts, outputs))
    problem = Problem(
        Application("profile", (node,)),
        Cluster.uniform(gpu, size, nvlink=size),
        (LengthScenario((prompts,), (outputs,)),),
        ({ModeKey(device, size): latency.costs(model, gpu, size)},),
    )
    assignment = Assignment("node", ParallelConfig(1, size), tuple(range(size)))
    trace = PlanSimulator(problem).simulate_scenario(Plan((Stage((assignment,)),)), 0)
    return trace.makespan_s - min(s.ready_s for s in trace.segments)


LEAST_ROWS = 4
_FOLDS = 5


def correct_base(
    base: LatencyModel,
    groups: Sequence[Iterations],
    architectures: Mapping[str, ModelArchitecture],
) -> dict[str, Any]:
    """Return what is to be added to a latency model, as a correction file holds it.

    Per model and size: ``host_s`` and ``host_s_per_seq``, none negative (fitted with least absolute
    relative error, host stalls left out); ``base_mape_pct`` and ``base_bias_pct`` without them and
    ``mape_pct`` with them, each row predicted by a fit without it.

    Args:
        base: the latency model.
        groups: measured iterations of one device, one entry per model and size.
        architectures: sizes of models that are not bundled.

    Raises:
        InputError: too few rows, no device, or the base cannot predict a model.
    """
    entries = []
    for rows in groups:
        where = f"model {rows.model}, tensor-parallel size {rows.tensor_parallel_size}"
        if len(rows) < LEAST_ROWS:
            raise InputError(f"{where}: {len(rows)} iterations; give at least {LEAST_ROWS}")
        if not rows.device:
            raise InputError(f"{where}: the table does not name the device; give --device")
        device_s = _predict(base, rows, architectures)
        measured = rows.seconds - rows.host_stalls()
        terms = fit_host(rows.steps.num_seqs, device_s, measured)
        held_out = np.empty(len(rows))
        fold = np.arange(len(rows)) % _FOLDS
        for k in range(_FOLDS):
            rest = fold != k
            fitted = fit_host(rows.steps.num_seqs[rest], device_s[rest], measured[rest])
            held_out[~rest] = fitted[0] + fitted[1] * rows.steps.num_seqs[~rest]
        entries.append(
            {
                "model": rows.model,
                "tensor_parallel_size": rows.tensor_parallel_size,
                "device": rows.device,
                "host_s": float(terms[0]),
                "host_s_per_seq": float(terms[1]),
                "rows": len(rows),
                "base_mape_pct": _mape(device_s, measured),
                "base_bias_pct": float(100 * (device_s.sum() / measured.sum() - 1)),
                "mape_pct": _mape(device_s + held_out, measured),
            }
        )
    return {"base": base.name, "entries": entries}


def fit_host(num_seqs: np.ndarray, device_s: Floats, measured_s: Floats) -> tuple[float, float]:
    """Return seconds per iteration and per sequence, none negative, of what is left to explain."""
    left = (measured_s - device_s) / measured_s
    columns = np.column_stack([1 / measured_s, num_seqs / measured_s])
    candidates = [(0.0, 0.0)]
    for keep in ([0, 1], [0], [1]):
        if len(keep) == 2 and len(np.unique(num_seqs)) < 2:
            continue
        found = least_absolute(columns[:, keep], left, floor=1e-3)
        terms = np.zeros(2)
        terms[keep] = found
        if (terms >= 0).all():
            candidates.append((float(terms[0]), float(terms[1])))

    def error(terms: tuple[float, float]) -> float:
        return float(np.abs(left - columns @ np.array(terms)).sum())

    return min(candidates, key=error)


def write_correction(correction: Mapping[str, Any], path: Path) -> None:
    """Write a correction file.

    Raises:
        InputError: if it cannot be written.
    """
    kept = ("model", "tensor_parallel_size", "device", "host_s", "host_s_per_seq", "mape_pct")
    entries = [{k: e[k] for k in kept} for e in correction["entries"]]
    save(path, [to_json({"base": correction["base"], "entries": entries}, indent=1), b"\n"])


def _predict(
    base: LatencyModel, rows: Iterations, architectures: Mapping[str, ModelArchitecture]
) -> Floats:
    steps = rows.steps
    bundled = bundled_architecture(rows.model)
    architecture = architectures.get(rows.model) or (bundled[0] if bundled else None)
    engine = EngineOptions(
        max_num_seqs=max(int(steps.num_seqs.max()), 2),
        max_num_batched_tokens=max(int(steps.num_tokens.max()), 2),
    )
    longest = int(max(steps.longest_tokens.max(), steps.prefill_tokens.max(), 2048))
    model = ModelSpec(rows.model, longest, architecture, engine=engine)
    known = rows.device in known_gpus()
    gpu = bundled_gpu(rows.device) if known else Gpu(rows.device, 1)
    latency = base.step_latency(model, gpu, rows.tensor_parallel_size)
    return np.asarray(latency.step_seconds(steps))


def _mape(predicted: Floats, measured: Floats) -> float:
    return float(100 * np.abs(predicted / measured - 1).mean())
