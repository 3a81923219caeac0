"""Why each model is where it is, in a sentence with figures."""

from __future__ import annotations

from samullm_auto.search import Candidate
from samullm_auto.solution import by_shape
from samullm_plugin import Problem
from samullm_plugin.model.result import PlanTrace
from samullm_plugin.simulator import PlanSimulator


def explain(problem: Problem, judge: PlanSimulator, best: Candidate) -> dict[str, str]:
    """Return by node name what it got, when, and what the fastest alternative would have been."""
    simulator = judge.coarse()
    trace = simulator.simulate_scenario(best.plan, 0)
    result = {}
    for i, node in enumerate(problem.app.nodes):
        segments = [s for s in trace.segments if s.node == node.name]
        if not segments:
            result[node.name] = "it has nothing to do in the first length scenario"
            continue
        parts = [
            f"{s.parallel} on GPUs {_devices(s.devices)} from {s.start_s:.0f} to {s.end_s:.0f} s"
            for s in segments
        ]
        shapes = by_shape(problem.parallel_configs(i))  # each by number of devices
        configs = list(dict.fromkeys(p for same in shapes for p in (same[0], same[-1])))
        times = simulator.alone_many_s(0, [(i, p) for p in configs])
        fastest = min(range(len(configs)), key=times.__getitem__)
        gpu_s = [t * p.num_devices for t, p in zip(times, configs, strict=True)]
        cheapest = min(range(len(configs)), key=gpu_s.__getitem__)
        result[node.name] = (
            f"{', then '.join(parts)}; alone it would take {times[fastest]:.0f} s at best "
            f"({configs[fastest]}) and {gpu_s[cheapest]:.0f} GPU-seconds at least "
            f"({configs[cheapest]}, {times[cheapest]:.0f} s){_critical(trace, i)}"
        )
    return result


def _devices(devices: tuple[int, ...]) -> str:
    return ",".join(str(d) for d in devices)


def _critical(trace: PlanTrace, node: int) -> str:
    """Return a remark if the node finishes last."""
    if trace.node_finish_s[node] >= trace.makespan_s:
        return "; it finishes last and decides the makespan"
    slack = trace.makespan_s - trace.node_finish_s[node]
    return f"; it could finish {slack:.0f} s later without delaying the end"
