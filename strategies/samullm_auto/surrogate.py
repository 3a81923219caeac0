"""A fast stand-in for the simulation: durations of models alone, work linear in time."""

from __future__ import annotations

from samullm_auto.recipe import Recipe
from samullm_plugin import ParallelConfig, Problem
from samullm_plugin.core.simulation import PlanSimulator

TAIL = 0.02
"""Share of a consumer's time that it needs after the last of its inputs."""


class Surrogate:
    """Estimates a recipe's makespan in microseconds, to tell which recipes to simulate.

    Exact for independent models that are not resized (but for devices torn over NVLink groups).

    Attributes:
        modes: per node, its configurations; the more devices, the later.
    """

    def __init__(self, problem: Problem, simulator: PlanSimulator, scenario: int) -> None:
        """Simulate every model alone in every configuration.

        Args:
            problem: the instance.
            simulator: the host's simulator.
            scenario: the length scenario.
        """
        app = problem.app
        self.modes = [problem.parallel_configs(i) for i in range(len(app.nodes))]
        pairs = [(i, p) for i, configs in enumerate(self.modes) for p in configs]
        alone = simulator.alone_many_s(scenario, pairs)
        self._seconds: list[dict[ParallelConfig, float]] = [{} for _ in app.nodes]
        self._loads: list[dict[ParallelConfig, float]] = [{} for _ in app.nodes]
        for (i, p), seconds in zip(pairs, alone, strict=True):
            devices = problem.cluster.idle_devices(p)
            self._seconds[i][p] = seconds
            load_s = problem.load_s(problem.mode(i, p, devices)) if devices else 0.0
            self._loads[i][p] = min(load_s, seconds)
        self._num_gpus = problem.cluster.num_gpus
        self._upstreams = app.upstreams

    def seconds(self, node: int, parallel: ParallelConfig) -> float:
        """Return the seconds of a node alone, engine start included."""
        return self._seconds[node][parallel]

    def makespan_s(self, recipe: Recipe) -> tuple[float, float]:
        """Return the estimated makespan and the sum of all finishes (to tell equals apart)."""
        left = list(recipe.order)
        free, now = self._num_gpus, 0.0
        running: dict[int, tuple[float, ParallelConfig]] = {}
        finish: dict[int, float] = {}
        begun: dict[int, float] = {}
        while left or running:
            for i in list(left):
                ups = self._upstreams[i]
                if not all(u in finish or (u in running and recipe.starts[i] < 1) for u in ups):
                    continue
                p = recipe.modes[i]
                if p.num_devices > free:
                    if recipe.strict:
                        break
                    continue
                free -= p.num_devices
                end = now + self._seconds[i][p]
                if ups:
                    last = max(finish.get(u, running[u][0] if u in running else 0.0) for u in ups)
                    end = max(end, last + TAIL * self._seconds[i][p])
                running[i] = end, p
                begun[i] = now
                left.remove(i)
            if not left and recipe.grow and free:
                free = self._grow(running, begun, now, free)
            first = min(running, key=lambda i: running[i][0])
            now, p = running.pop(first)
            finish[first] = now
            free += p.num_devices
        return max(finish.values()), sum(finish.values())

    def _grow(
        self,
        running: dict[int, tuple[float, ParallelConfig]],
        begun: dict[int, float],
        now: float,
        free: int,
    ) -> int:
        """Give free devices to what finishes last, in place; return the devices left."""
        for i in sorted(running, key=lambda i: -running[i][0]):
            end, p = running[i]
            load, total = self._loads[i][p], self._seconds[i][p]
            if begun[i] == now or total <= load or self._upstreams[i] & running.keys():
                continue
            share = min(1.0, (end - now) / (total - load))
            best = end, p
            for q in self.modes[i]:
                if p.num_devices < q.num_devices <= p.num_devices + free:
                    load_q = self._loads[i][q]
                    best = min(best, (now + load_q + share * (self._seconds[i][q] - load_q), q))
            if best[0] < end - 0.01 * (end - now):
                running[i] = best
                begun[i] = now
                free -= best[1].num_devices - p.num_devices
            if not free:
                break
        return free
