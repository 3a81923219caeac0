"""Files of ``samullm simulate``: requests, engine settings, steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samullm_plugin.app.fields import read_yaml, validate
from samullm_plugin.engine import (
    Curve,
    EngineConfig,
    EngineRun,
    StepLatency,
    StepTrace,
    Workload,
)
from samullm_plugin.errors import InputError, describe_validation
from samullm_plugin.files import good_rows
from samullm_plugin.model.engine_config import SchedulingPolicy
from samullm_plugin.model.kv_cache import KvCacheGroup, KvCacheKind
from samullm_plugin.model.latency import CURVES

ITERATIONS_AS_SECONDS = StepLatency(Curve.constant(1.0))
"""Used where no latency is given: every iteration takes one second, so times count iterations."""

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _FileModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SimulatedRequest(_FileModel):
    """One line of a requests file.

    Attributes:
        id: unique name.
        prompt_tokens: prompt length, or
        prompt_token_ids: the prompt itself, for prefix caching.
        output_tokens: tokens it generates, unless ``max_model_len`` ends it before.
        arrival_step: scheduler step it arrives before, or
        arrival_s: seconds after the engine is ready.
        priority: lower is served first under policy ``priority``.
    """

    id: str | int
    prompt_tokens: Positive | None = None
    prompt_token_ids: Annotated[list[int], Field(min_length=1)] | None = None
    output_tokens: Positive
    arrival_step: Annotated[int, Field(ge=0)] | None = None
    arrival_s: NotNegative | None = None
    priority: int = 0

    @property
    def length(self) -> int:
        """Return the prompt's length."""
        if self.prompt_token_ids is not None:
            return len(self.prompt_token_ids)
        return self.prompt_tokens or 0


class LineCurve(_FileModel):
    """``base_s + slope_s * x``."""

    base_s: float
    slope_s: float


class KnotCurve(_FileModel):
    """Seconds at increasing knots, linear between them."""

    knots: list[float]
    values: list[float]


CurveSpec = Annotated[float | LineCurve | KnotCurve, Field(union_mode="smart")]


class LatencySpec(_FileModel):
    """``latency`` of an engine file: the fields of ``StepLatency``; what is left out is 0.

    A curve is a number (constant), ``{base_s, slope_s}`` or ``{knots, values}``.
    """

    by_tokens: CurveSpec = 0.0
    by_seqs: CurveSpec = 0.0
    prefill_token_s: NotNegative = 0.0
    prefill_pair_s: NotNegative = 0.0
    context_token_s: NotNegative = 0.0
    longest_token_s: NotNegative = 0.0
    host_by_seqs: CurveSpec = 0.0
    overlap_host: bool = False
    prefill_seq_s: NotNegative = 0.0
    launch_s: NotNegative = 0.0
    prefill_launch_s: NotNegative = 0.0
    longest_over_seqs: Annotated[int, Field(ge=0)] = 0
    prefill_step_s: NotNegative = 0.0

    def build(self) -> StepLatency:
        """Return the latency."""
        given = dict(self)
        for name in CURVES:
            given[name] = _curve(given[name])
        return StepLatency(**given)


def _curve(spec: float | LineCurve | KnotCurve) -> Curve:
    if isinstance(spec, LineCurve):
        return Curve.line(spec.base_s, spec.slope_s)
    if isinstance(spec, KnotCurve):
        return Curve(tuple(spec.knots), tuple(spec.values))
    return Curve.constant(spec)


class KvCacheGroupSection(_FileModel):
    """One of ``kv_cache_groups`` of an engine file."""

    kind: KvCacheKind
    block_size: Positive = 16
    window_tokens: Annotated[int, Field(ge=0)] = 0


class EngineSection(_FileModel):
    """An engine file: vLLM's engine arguments by their names, and the latency of iterations."""

    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 8192
    max_model_len: Annotated[int, Field(ge=2)] = 8192
    block_size: Positive = 16
    num_blocks: Annotated[int, Field(ge=2)] = 10_000
    enable_prefix_caching: bool = False
    async_scheduling: bool = False
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = 0
    scheduling_policy: SchedulingPolicy = "fcfs"
    pipeline_parallel_size: Positive = 1
    kv_cache_groups: tuple[KvCacheGroupSection, ...] = ()
    latency: LatencySpec | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RequestFile:
    """A requests file.

    Attributes:
        path: for messages.
        ids: in the order of the lines.
        lines: line numbers.
        workload: lengths and arrivals.
    """

    path: Path
    ids: tuple[str, ...]
    lines: tuple[int, ...]
    workload: Workload

    def name(self, request: int) -> str:
        """Return where a request comes from, for messages."""
        return f"{self.path} line {self.lines[request]}: request {self.ids[request]!r}"


def read_engine(path: Path) -> tuple[EngineConfig, StepLatency | None]:
    """Return settings and iteration latency (None if the file has none).

    Raises:
        InputError: naming file and field.
    """
    spec = validate(EngineSection, read_yaml(path), str(path))
    settings = spec.model_dump(exclude={"latency", "kv_cache_groups"})
    settings["kv_cache_groups"] = tuple(
        KvCacheGroup(g.kind, block_size=g.block_size, window_tokens=g.window_tokens)
        for g in spec.kv_cache_groups
    )
    try:
        return EngineConfig(**settings), None if spec.latency is None else spec.latency.build()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_requests(path: Path, max_model_len: int) -> RequestFile:
    """Return the requests of a file with one JSON object a line.

    Raises:
        InputError: naming file, line and field.
    """
    lines: dict[str, int] = {}
    requests = []
    for where, value in good_rows(path, "requests"):
        request = _read_line(value, where, max_model_len)
        name = str(request.id)
        number = int(where.rpartition(" ")[2])
        if name in lines:
            raise InputError(f"{where}: id {name!r} is that of line {lines[name]} too")
        lines[name] = number
        requests.append(request)
    if not requests:
        raise InputError(f"{path}: holds no request; write one JSON object a line")
    by_step = [lines[str(r.id)] for r in requests if r.arrival_step is not None]
    by_time = [lines[str(r.id)] for r in requests if r.arrival_s is not None]
    if by_step and by_time:
        raise InputError(
            f"{path}: line {by_step[0]} has arrival_step, line {by_time[0]} arrival_s; "
            "use one of them"
        )
    return RequestFile(path, tuple(lines), tuple(lines.values()), _workload(requests))


def _read_line(value: Mapping[str, Any], where: str, max_model_len: int) -> SimulatedRequest:
    try:
        request = SimulatedRequest.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{where}: {describe_validation(error)}") from error
    if (request.prompt_tokens is None) == (request.prompt_token_ids is None):
        raise InputError(f"{where}: give either prompt_tokens or prompt_token_ids")
    if request.length >= max_model_len:
        raise InputError(
            f"{where}: the prompt of {request.length} tokens leaves no room for output within "
            f"max_model_len {max_model_len}"
        )
    return request


def _workload(requests: Sequence[SimulatedRequest]) -> Workload:
    prompts = np.array([r.length for r in requests], np.int64)
    arrival_s = arrival_step = token_ids = None
    if any(r.arrival_s is not None for r in requests):
        arrival_s = np.array([r.arrival_s or 0.0 for r in requests])
    if any(r.arrival_step is not None for r in requests):
        arrival_step = np.array([r.arrival_step or 0 for r in requests], np.int64)
    if any(r.prompt_token_ids is not None for r in requests):
        invented = 0  # prompts of which only the length is known agree with no other
        columns = []
        for r in requests:
            if r.prompt_token_ids is None:
                columns.append(-1 - np.arange(invented, invented + r.length))
                invented += r.length
            else:
                columns.append(np.array(r.prompt_token_ids, np.int64))
        token_ids = tuple(columns)
    return Workload(
        prompts,
        np.array([r.output_tokens for r in requests], np.int64),
        arrival_s=arrival_s,
        arrival_step=arrival_step,
        priority=np.array([r.priority for r in requests], np.int64),
        prompt_token_ids=token_ids,
    )


def write_steps(path: Path, trace: StepTrace, ids: Sequence[str]) -> None:
    """Write one JSON object per step that scheduled tokens.

    Raises:
        InputError: if the file cannot be written.
    """
    quoted = [json.dumps(name) for name in ids]
    sequences = list(zip(trace.seq_request.tolist(), trace.seq_tokens.tolist(), strict=True))
    preempted, finished = trace.preempted_request.tolist(), trace.finished_request.tolist()
    ends = zip(
        trace.step.tolist(),
        trace.seq_indptr.tolist()[1:],
        trace.preempted_indptr.tolist()[1:],
        trace.finished_indptr.tolist()[1:],
        trace.free_blocks.tolist(),
        strict=True,
    )
    a = b = c = 0
    try:
        with path.open("w", encoding="utf-8") as file:
            for step, a_end, b_end, c_end, free in ends:
                scheduled = ", ".join(f"{quoted[r]}: {n}" for r, n in sequences[a:a_end])
                file.write(
                    f'{{"step": {step}, "scheduled": {{{scheduled}}}, '
                    f'"preempted": {json.dumps(sorted(ids[r] for r in preempted[b:b_end]))}, '
                    f'"finished": {json.dumps(sorted(ids[r] for r in finished[c:c_end]))}, '
                    f'"free_blocks": {free}}}\n'
                )
                a, b, c = a_end, b_end, c_end
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def summarize(config: EngineConfig, workload: Workload, run: EngineRun) -> dict[str, object]:
    """Return what ``samullm simulate`` reports, as JSON has it."""
    usable = config.num_blocks - 1
    output = int(run.generated_tokens.sum())
    prompt = int(workload.prompt_tokens.sum())
    seconds = run.makespan_s
    per_second = 1.0 / seconds if seconds > 0 else 0.0
    return {
        "num_requests": len(workload),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "makespan_s": seconds,
        "busy_s": run.busy_s,
        "throughput": {
            "requests_per_s": len(workload) * per_second,
            "output_tokens_per_s": output * per_second,
            "total_tokens_per_s": (prompt + output) * per_second,
        },
        "mean_first_token_s": float(run.first_token_s.mean()),
        "mean_finish_s": float(run.finish_s.mean()),
        "num_steps": run.num_steps,
        "preemptions": run.num_preemptions,
        "computed_tokens": run.computed_tokens,
        "cached_tokens": run.cached_tokens,
        "kv_cache": {
            "usable_blocks": usable,
            "peak_blocks": run.peak_blocks,
            "peak_usage": run.peak_blocks / usable,
        },
    }
