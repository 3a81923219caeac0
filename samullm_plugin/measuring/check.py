"""Judge a profile by runs of a live engine that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.measuring.engine import Run
from samullm_plugin.model.application import Application, ModelNode, ModelSpec, RequestTable
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.profiling.probes import ProbeWorkload
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
