"""Decision variables, by task and segment.

A task is run in one segment (structure ``no-switching``) or in up to ``max_segments`` of them. A
segment holds its devices from its start to its end, in one mode, and does a share of the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ortools.sat.python import cp_model

from samullm_cpsat.instance import Instance


@dataclass(frozen=True, slots=True)
class SegmentVars:
    """One segment of a task.

    Attributes:
        start: first tick.
        end: tick after the last one.
        size: ticks between them.
        interval: all of it, present or not.
        present: whether the segment is used.
        mode: by mode, whether the segment runs in it; exactly one if present, none if not.
        mode_interval: by mode, the same interval, present if the segment runs in it.
        share: by mode, work units done in it, 0 unless chosen; None where a task has one segment,
            which does all of its work.
        devices: by pool, devices held; None where one pool holds everything.
        parts: by pool, tensor-parallel groups held, by mode; None likewise.
    """

    start: cp_model.IntVar
    end: cp_model.IntVar
    size: cp_model.IntVar
    interval: cp_model.IntervalVar
    present: cp_model.IntVar
    mode: tuple[cp_model.IntVar, ...]
    mode_interval: tuple[cp_model.IntervalVar, ...]
    share: tuple[cp_model.IntVar, ...] | None = None
    devices: tuple[cp_model.IntVar, ...] | None = None
    parts: tuple[tuple[cp_model.IntVar, ...], ...] | None = None


@dataclass(slots=True)
class Variables:
    """All variables of a model.

    Attributes:
        segments: by task, its segments in order of time.
        task_end: by task, when it is finished.
        makespan: when all are.
        machine_replicas: by machine, task, segment and mode, replicas of several pipeline stages.
    """

    segments: list[list[SegmentVars]] = field(default_factory=list)
    task_end: list[cp_model.IntVar] = field(default_factory=list)
    makespan: cp_model.IntVar | None = None
    machine_replicas: dict[tuple[int, int, int, int], cp_model.IntVar] = field(default_factory=dict)


def make_variables(
    model: cp_model.CpModel,
    instance: Instance,
    *,
    segments: int,
    units: int,
    horizon: int,
    pooled: bool,
) -> Variables:
    """Create the variables.

    Args:
        model: the model to add them to.
        instance: tasks and devices.
        segments: most segments of a task.
        units: work units of a task.
        horizon: no later tick is used.
        pooled: whether devices are counted by pool.
    """
    v = Variables()
    for i in range(len(instance.tasks)):
        v.segments.append(
            [
                _segment(model, instance, i, k, segments, units, horizon, pooled)
                for k in range(segments)
            ]
        )
        v.task_end.append(model.new_int_var(0, horizon, f"end_{i}"))
    if pooled:
        _machine_replicas(model, instance, v)
    v.makespan = model.new_int_var(0, horizon, "makespan")
    return v


def _segment(
    model: cp_model.CpModel,
    instance: Instance,
    i: int,
    k: int,
    segments: int,
    units: int,
    horizon: int,
    pooled: bool,
) -> SegmentVars:
    label = f"{i}_{k}"
    modes = instance.tasks[i].modes
    start = model.new_int_var(0, horizon, f"start_{label}")
    end = model.new_int_var(0, horizon, f"stop_{label}")
    size = model.new_int_var(0, horizon, f"size_{label}")
    present = model.new_bool_var(f"present_{label}")
    chosen = tuple(model.new_bool_var(f"mode_{label}_{m}") for m in range(len(modes)))
    stretched = segments > 1 or bool(instance.producers(i))
    intervals = []
    for m, mode in enumerate(modes):
        name = f"interval_{label}_{m}"
        if stretched:
            interval = model.new_optional_interval_var(start, size, end, chosen[m], name)
        else:
            interval = model.new_optional_fixed_size_interval_var(
                start, mode.duration, chosen[m], name
            )
        intervals.append(interval)
    share = None
    if segments > 1:
        share = tuple(model.new_int_var(0, units, f"share_{label}_{m}") for m in range(len(modes)))
    devices = parts = None
    if pooled:
        most = [
            max(instance.parts_in(m, p) * m.parallel.tensor_parallel_size for m in modes)
            for p in instance.pools
        ]
        devices = tuple(
            model.new_int_var(0, most[g], f"devices_{label}_{g}")
            for g in range(len(instance.pools))
        )
        parts = tuple(
            tuple(
                model.new_int_var(
                    0,
                    min(
                        instance.parts_in(mode, p),
                        mode.parallel.data_parallel_size * mode.parallel.pipeline_parallel_size,
                    ),
                    f"parts_{label}_{g}_{m}",
                )
                for m, mode in enumerate(modes)
            )
            for g, p in enumerate(instance.pools)
        )
    return SegmentVars(
        start,
        end,
        size,
        model.new_optional_interval_var(start, size, end, present, f"interval_{label}"),
        present,
        chosen,
        tuple(intervals),
        share,
        devices,
        parts,
    )


def _machine_replicas(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """Add, for modes of several pipeline stages, how many replicas lie on each machine."""
    machines = sorted({p.machine for p in instance.pools})
    if len(machines) == 1:
        return
    for i, task in enumerate(instance.tasks):
        for k in range(len(v.segments[i])):
            for m, mode in enumerate(task.modes):
                if mode.parallel.pipeline_parallel_size > 1:
                    for machine in machines:
                        v.machine_replicas[machine, i, k, m] = model.new_int_var(
                            0,
                            mode.parallel.data_parallel_size,
                            f"replicas_{i}_{k}_{m}_{machine}",
                        )
