"""One model at a time on all GPUs."""

from __future__ import annotations

from typing import ClassVar

from samullm_plugin import ParallelConfig, Plan, Problem, StageScheduler
from samullm_plugin.host.interfaces.scheduler import SchedulingContext
from samullm_plugin.rules.placement import place
from samullm_plugin.simulator import Rollout


class MaxHeuristic(StageScheduler):
    """One model at a time, in topological order, on all GPUs (the paper's Max-heuristic).

    Each model takes the data- and tensor-parallel sizes that finish it first, among those that
    leave no room for another replica. The GPUs such a configuration leaves over (an odd one with
    tensor-parallel size two, say) stay idle. A model is started when the one before has finished,
    so there is nothing to preempt.
    """

    name: ClassVar[str] = "max-heuristic"

    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return the plan; with several length scenarios, mean times decide."""
        simulator = context.simulator.coarse()
        problem = simulator.problem
        rollout = Rollout(simulator, context.give_up_s)
        while unfinished := rollout.unfinished():
            name = rollout.ready(unfinished, ())[0]
            parallel, ends_s = self._fastest(problem, rollout, name)
            assignments = place(problem, {name: parallel}, {})
            assert assignments is not None  # ``parallel_configs`` gives only what has a place
            rollout.run_stage(assignments)
            context.report.explanation[name] = (
                f"{parallel}, the fastest of the configurations that leave no room for another "
                f"replica: {ends_s:.1f} s"
            )
        return rollout.plan()

    def _fastest(
        self, problem: Problem, rollout: Rollout, name: str
    ) -> tuple[ParallelConfig, float]:
        """Return the configuration that finishes a node first, and the mean seconds it takes."""
        node = problem.app.index(name)
        fitting = problem.parallel_configs(node)
        widest: dict[tuple[int, int], ParallelConfig] = {}
        for p in fitting:
            shape = p.tensor_parallel_size, p.pipeline_parallel_size
            if shape not in widest or p.data_parallel_size > widest[shape].data_parallel_size:
                widest[shape] = p
        configs = list(widest.values())
        times = rollout.alone_s([(name, p) for p in configs])
        best = min(range(len(configs)), key=times.__getitem__)
        return configs[best], times[best]
