"""Durations of modes, from the host's own simulations, in whole ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from samullm_tasks.timing import TimedMode, alone, tails_s

from samullm_cpsat.instance import Instance, Lag, Mode, Task, pools_of
from samullm_plugin import Cluster, InputError, ParallelConfig, Problem
from samullm_plugin.model.problem import ModeKey
from samullm_plugin.model.types import Floats
from samullm_plugin.simulator import PlanSimulator


@dataclass(frozen=True, slots=True)
class Timings:
    """What was simulated.

    Attributes:
        instance: the scheduling instance; task ``i`` is node ``i``.
        finish_s: by task and mode, when each request finishes after the start, alone, in the first
            scenario, sorted.
        end_s: by task and mode, when the last does, shape ``(scenarios,)``.
    """

    instance: Instance
    finish_s: tuple[tuple[Floats, ...], ...]
    end_s: tuple[tuple[Floats, ...], ...]

    def finished_share(self, task: int, parallel: ParallelConfig, gpu: str, done: float) -> float:
        """Return the share of a task's requests that is finished when a share of its work is."""
        modes = self.instance.tasks[task].modes
        m = next(m for m, x in enumerate(modes) if x.parallel == parallel and x.gpu == gpu)
        finish = self.finish_s[task][m]
        if not len(finish):
            return done
        load_s = modes[m].load * self.instance.tick_s
        at = load_s + done * max(0.0, float(finish[-1]) - load_s)
        return float(np.searchsorted(finish, at, side="right")) / len(finish)


def candidates(problem: Problem) -> list[list[TimedMode]]:
    """Return by node every mode that fits in memory and on the idle cluster.

    Raises:
        InputError: naming the node, the model and the memory it lacks.
    """
    cluster, pools = problem.cluster, pools_of(problem.cluster)
    first = {kind: d for d, kind in reversed(list(enumerate(cluster.kinds)))}
    idle = Instance("", (), (), pools)
    found = []
    for i, node in enumerate(problem.app.nodes):
        of_node = []
        for key, costs in problem.costs[i].items():
            if not problem.fits(i, key) or key.gpu not in first:
                continue
            sizes = key.tensor_parallel_size, key.pipeline_parallel_size
            machines = cluster.machines_per_replica(key.gpu, *sizes)
            for dp in range(1, cluster.num_gpus + 1):
                size = ParallelConfig(dp, *sizes)
                if not idle.placeable(Mode(size, 0, 1, key.gpu, machines)):
                    break
                of_node.append(TimedMode(i, size, key.gpu, first[key.gpu], problem.load_s(costs)))
        if not of_node:
            raise InputError(_lacking(problem, i, cluster, node.model.name))
        found.append(of_node)
    return found


def _lacking(problem: Problem, node: int, cluster: Cluster, model: str) -> str:
    """Return why a node fits nowhere."""
    name = problem.app.nodes[node].name
    needed = problem.app.nodes[node].model.max_model_len
    best: tuple[int, ModeKey | None] = (-1, None)
    for key, costs in problem.costs[node].items():
        best = max(best, (costs.kv_cache_tokens, key), key=lambda b: b[0])
    kinds = ", ".join(f"{g.name} with {g.memory_bytes / 2**30:.0f} GiB" for g in set(cluster.gpus))
    return (
        f"node {name}: model {model} fits on no set of devices of one kind ({kinds}): its KV cache "
        f"has room for {max(best[0], 0)} tokens at best, one sequence needs {needed}; add devices, "
        "larger NVLink groups or memory, or lower max_model_len"
    )


def measure(problem: Problem, simulator: PlanSimulator, ticks: int) -> Timings:
    """Simulate every mode of every node, and pairs of modes of producer and consumer.

    Durations are means over the length scenarios, rounded up.

    Args:
        problem: the instance.
        simulator: the host's simulator of it.
        ticks: about as many ticks as the whole schedule should take.

    Raises:
        InputError: if a node fits nowhere.
    """
    modes = candidates(problem)
    scenarios = range(len(problem.scenarios))
    finishes: list[list[list[Floats]]] = []  # by node, mode and scenario: when requests finish
    for i, of_node in enumerate(modes):
        finishes.append([_alone(simulator, s, of_node) for s in scenarios])
        finishes[i] = [list(of_mode) for of_mode in zip(*finishes[i], strict=True)]
    seconds = [[_mean_end(finish) for finish in of_node] for of_node in finishes]
    tick_s = _tick_s(problem, modes, seconds, ticks)
    tasks = []
    for i, node in enumerate(problem.app.nodes):
        of_task = []
        for c, duration_s in zip(modes[i], seconds[i], strict=True):
            duration = max(1, _up(duration_s, tick_s))
            load = min(duration, _up(c.load_s, tick_s))
            sizes = c.parallel.tensor_parallel_size, c.parallel.pipeline_parallel_size
            machines = problem.cluster.machines_per_replica(c.gpu, *sizes)
            of_task.append(Mode(c.parallel, load, duration, c.gpu, machines))
        tasks.append(Task(node.name, tuple(of_task)))
    lags = tuple(
        Lag(p, c, _tails(simulator, modes, finishes, p, c, tick_s, tasks[c]))
        for c in range(len(tasks))
        for p in sorted(problem.app.upstreams[c])
    )
    instance = Instance(problem.app.name, tuple(tasks), lags, pools_of(problem.cluster), tick_s)
    finish = tuple(tuple(np.sort(of_mode[0]) for of_mode in of_node) for of_node in finishes)
    ends = tuple(
        tuple(np.array([f.max() for f in of_mode]) for of_mode in of_node) for of_node in finishes
    )
    return Timings(instance, finish, ends)


def _alone(simulator: PlanSimulator, scenario: int, of_node: list[TimedMode]) -> list[Floats]:
    """Return by mode when each taken request finishes after the start, sorted by request."""
    runs = alone(simulator, scenario, of_node)
    return [np.where(np.isfinite(r.finish_s), r.finish_s, 0.0) for r in runs]


def _mean_end(finish: list[Floats]) -> float:
    return float(np.mean([f.max() for f in finish]))


def _up(seconds: float, tick_s: float) -> int:
    """Return the least whole number of ticks that holds these seconds, up to rounding errors."""
    return math.ceil(seconds / tick_s - 1e-9)


def _tick_s(
    problem: Problem, modes: list[list[TimedMode]], seconds: list[list[float]], ticks: int
) -> float:
    """Return a round tick that divides the least possible makespan into about ``ticks``."""
    area = sum(
        min(c.parallel.num_devices * s for c, s in zip(of_node, of_seconds, strict=True))
        for of_node, of_seconds in zip(modes, seconds, strict=True)
    )
    least_s = max(area / problem.cluster.num_gpus, *(min(s) for s in seconds), 1e-6)
    exponent = math.floor(math.log10(least_s / ticks))
    return next(
        step * 10.0**exponent
        for step in (5.0, 2.0, 1.0)
        if step * 10.0**exponent <= least_s / ticks * (1 + 1e-9)
    )


def _tails(
    simulator: PlanSimulator,
    modes: list[list[TimedMode]],
    finishes: list[list[list[Floats]]],
    producer: int,
    consumer: int,
    tick_s: float,
    task: Task,
) -> tuple[tuple[int, ...], ...]:
    """Return a consumer's tails (:func:`tails_s`) in ticks, means over the length scenarios.

    A tail is never longer than the whole consumer.
    """
    scenarios = range(len(simulator.works))
    total = sum(
        tails_s(
            simulator,
            s,
            modes[producer],
            [of_mode[s] for of_mode in finishes[producer]],
            modes[consumer],
        )
        for s in scenarios
    )
    return tuple(
        tuple(
            min(m.duration, _up(float(t), tick_s)) for t, m in zip(of_mode, task.modes, strict=True)
        )
        for of_mode in np.asarray(total) / len(scenarios)
    )
