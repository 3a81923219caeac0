"""Which NVLink group carries what, for a schedule whose times and modes are settled."""

from __future__ import annotations

from collections.abc import Sequence

from ortools.sat.python import cp_model

from samullm_cpsat.instance import Instance


def give_parts(
    instance: Instance, modes: Sequence[int], starts: Sequence[int], ends: Sequence[int]
) -> list[tuple[int, ...] | None] | None:
    """Return by task how many tensor-parallel groups of it each pool carries.

    Args:
        instance: tasks and devices.
        modes: by task, its mode.
        starts: by task, its first tick.
        ends: by task, the tick after its last.

    Returns:
        None if there is no way; entries are None where there is one pool.
    """
    tasks = range(len(instance.tasks))
    if len(instance.pools) == 1:
        return [None for _ in tasks]
    model = cp_model.CpModel()
    chosen = [instance.tasks[i].modes[modes[i]] for i in tasks]
    parts = [
        [
            model.new_int_var(0, instance.parts_in(mode, pool), f"parts_{i}_{g}")
            for g, pool in enumerate(instance.pools)
        ]
        for i, mode in enumerate(chosen)
    ]
    machines = sorted({p.machine for p in instance.pools})
    for i, mode in enumerate(chosen):
        size = mode.parallel
        model.add(sum(parts[i]) == size.data_parallel_size * size.pipeline_parallel_size)
        for machine in machines if size.pipeline_parallel_size > 1 else ():
            replicas = model.new_int_var(0, size.data_parallel_size, f"replicas_{i}_{machine}")
            here = [
                x for x, p in zip(parts[i], instance.pools, strict=True) if p.machine == machine
            ]
            model.add(sum(here) == mode.stages_together * replicas)
    for now in sorted(set(starts)):
        running = [i for i in tasks if starts[i] <= now < ends[i]]
        for g, pool in enumerate(instance.pools):
            held = [chosen[i].parallel.tensor_parallel_size * parts[i][g] for i in running]
            model.add(sum(held) <= len(pool.devices))
    solver = cp_model.CpSolver()
    solver.parameters.catch_sigint_signal = False  # it would leave the default handler behind
    solver.parameters.num_workers = 1
    solver.parameters.max_deterministic_time = 5.0
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return [tuple(solver.value(x) for x in of_task) for of_task in parts]
