"""Where, if anywhere, the simulation and vLLM's scheduler part."""

from __future__ import annotations

from dataclasses import dataclass

from samullm_plugin.engine import (
    Curve,
    EngineConfig,
    EngineRun,
    NeverFitsError,
    StepLatency,
    StepTrace,
    Workload,
    simulate_engine,
)
from tests.conformance.vllm_scheduler import Row, run_vllm

LATENCY = StepLatency(Curve.line(0.004, 1e-5), context_token_s=1e-8, longest_token_s=1e-7)


@dataclass(frozen=True)
class Case:
    """One workload for one engine."""

    config: EngineConfig
    workload: Workload
    pooling: bool = False


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        steps: steps that schedule tokens.
        sequences: scheduled sequences, summed over the steps.
        preemptions: of all steps.
        never_fits: a request can never be scheduled.
        difference: the first one, or None.
    """

    steps: int
    sequences: int
    preemptions: int
    never_fits: bool
    difference: str | None


def simulated_rows(trace: StepTrace) -> list[Row]:
    """Return the recorded steps in the form of the driver of the real scheduler."""
    rows = []
    for i, step in enumerate(trace.step):
        sequences = slice(trace.seq_indptr[i], trace.seq_indptr[i + 1])
        preempted = slice(trace.preempted_indptr[i], trace.preempted_indptr[i + 1])
        finished = slice(trace.finished_indptr[i], trace.finished_indptr[i + 1])
        rows.append(
            Row(
                step=int(step),
                scheduled=dict(
                    zip(
                        trace.seq_request[sequences].tolist(),
                        trace.seq_tokens[sequences].tolist(),
                        strict=True,
                    )
                ),
                preempted=sorted(trace.preempted_request[preempted].tolist()),
                free_blocks=int(trace.free_blocks[i]),
                finished=sorted(trace.finished_request[finished].tolist()),
            )
        )
    return rows


def simulate(case: Case, *, record_steps: bool = True) -> tuple[EngineRun, bool]:
    """Return the simulated run and whether it ended at a request that never fits."""
    try:
        run = simulate_engine(case.config, case.workload, LATENCY, record_steps=record_steps)
    except NeverFitsError as error:
        return error.run, True
    return run, False


def compare(case: Case) -> Comparison:
    """Run both and compare every step: tokens and their order, preempted, finished, free blocks."""
    real = run_vllm(case.config, case.workload, pooling=case.pooling)
    run, never_fits = simulate(case)
    assert run.steps is not None
    rows = simulated_rows(run.steps)
    return Comparison(
        steps=len(real.rows),
        sequences=sum(len(r.scheduled) for r in real.rows),
        preemptions=sum(len(r.preempted) for r in real.rows),
        never_fits=real.stuck,
        difference=_difference(real.rows, rows, real.stuck, never_fits),
    )


def _difference(real: list[Row], simulated: list[Row], stuck: bool, never_fits: bool) -> str | None:
    for i, (a, b) in enumerate(zip(real, simulated, strict=False)):
        for name in ("step", "scheduled", "preempted", "finished", "free_blocks"):
            x, y = getattr(a, name), getattr(b, name)
            if x != y or (name == "scheduled" and list(x) != list(y)):
                return f"row {i}, {name}: vLLM {x}, simulation {y}"
    if len(real) != len(simulated):
        return f"vLLM has {len(real)} steps, the simulation {len(simulated)}"
    if stuck != never_fits:
        return f"never fits: vLLM {stuck}, simulation {never_fits}"
    return None
