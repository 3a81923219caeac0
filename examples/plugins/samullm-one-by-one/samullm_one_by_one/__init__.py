"""One model at a time, each at the size that finishes it soonest."""

from samullm_plugin import (
    Assignment,
    Plan,
    Problem,
    SchedulingContext,
    Stage,
    StageScheduler,
    hookimpl,
)

samullm_interface = 1


class OneByOne(StageScheduler):
    """One model at a time in topological order, each at the size that finishes it soonest."""

    name = "one-by-one"

    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return one stage per node."""
        stages = []
        for node in problem.app.order:
            name = problem.app.nodes[node].name
            best = min(
                problem.parallel_configs(node),
                key=lambda parallel: context.simulator.alone_s(0, node, parallel),
            )
            devices = problem.idle_devices(node, best)
            assert devices is not None  # the configurations are those that can be placed
            stages.append(Stage((Assignment(name, best, devices),)))
            context.report.explanation[name] = f"{best} finishes it soonest"
        return Plan(tuple(stages))


@hookimpl
def register_schedulers(register):
    """Offer the scheduler."""
    register(OneByOne)
