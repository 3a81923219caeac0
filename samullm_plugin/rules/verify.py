"""The executable definition of a valid plan; knows no scheduler.

Every violation is listed, not only the first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from samullm_plugin.errors import PlanError
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.model.problem import Problem


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule.

    Attributes:
        rule: ``devices``, ``memory``, ``nvlink``, ``precedence``, ``completeness`` or ``shape``.
        where: stage and node.
        message: what is wrong, with the figures.
    """

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        """Return one line."""
        return f"[{self.rule}] {self.where}: {self.message}"


def verify(problem: Problem, plan: Plan) -> tuple[Violation, ...]:
    """Return every violation of a plan, none if it is valid.

    Rules: known nodes and devices, no device held twice in a stage, as many devices of one kind as
    the parallel sizes say (``devices``, ``shape``); each replica within one machine, or its stages
    on as many as its size lies on (:meth:`Cluster.machines_per_replica`), and its tensor-parallel
    groups within NVLink groups (``nvlink``); weights and one longest sequence fit (``memory``);
    every upstream node starts in the same or an earlier stage (``precedence``); every node is
    assigned (``completeness``).
    """
    found: list[Violation] = []
    if not plan.stages:
        found.append(Violation("completeness", "plan", "it has no stages"))
    for number, stage in enumerate(plan.stages):
        found += _stage(problem, number, stage)
    found += _precedence(problem, plan)
    for node in problem.app.nodes:
        if plan.stages and plan.last_stage(node.name) < 0:
            found.append(Violation("completeness", f"node {node.name}", "no stage assigns it"))
    return tuple(found)


def require_valid(problem: Problem, plan: Plan, author: str) -> None:
    """Raise if a plan is invalid.

    Args:
        problem: the instance.
        plan: the plan.
        author: who made it, for the message.

    Raises:
        PlanError: listing every violation.
    """
    if violations := verify(problem, plan):
        listing = "; ".join(str(v) for v in violations)
        raise PlanError(f"{author} returned an invalid plan: {listing}")


def _stage(problem: Problem, number: int, stage: Stage) -> list[Violation]:
    found: list[Violation] = []
    where = f"stage {number}"
    known = {n.name for n in problem.app.nodes}
    if not stage.assignments:
        found.append(Violation("shape", where, "it has no assignments"))
    for node, count in Counter(a.node for a in stage.assignments).items():
        if count > 1:
            found.append(Violation("shape", f"{where}, node {node}", f"assigned {count} times"))
    holders: dict[int, list[str]] = {}
    for assignment in stage.assignments:
        for device in set(assignment.devices):
            holders.setdefault(device, []).append(assignment.node)
        if assignment.node not in known:
            name = f"{where}, node {assignment.node}"
            found.append(Violation("shape", name, "the application has no such node"))
        else:
            found += _assignment(problem, where, assignment)
    for device, nodes in sorted(holders.items()):
        if len(nodes) > 1:
            message = f"device {device} is held by {', '.join(nodes)} at once"
            found.append(Violation("devices", where, message))
    if stage.end.node is not None and stage.assignment(stage.end.node) is None:
        message = f"its end event names {stage.end.node}, which it does not assign"
        found.append(Violation("shape", where, message))
    return found


def _assignment(problem: Problem, stage: str, assignment: Assignment) -> list[Violation]:
    found: list[Violation] = []
    where = f"{stage}, node {assignment.node}"
    parallel, devices = assignment.parallel, assignment.devices
    outside = [d for d in devices if not 0 <= d < problem.cluster.num_gpus]
    if outside:
        message = f"device {outside[0]} does not exist; there are {problem.cluster.num_gpus}"
        return [Violation("devices", where, message)]
    if len(set(devices)) != len(devices):
        found.append(Violation("devices", where, f"devices {list(devices)} repeat"))
    if len(devices) != parallel.num_devices:
        message = f"{parallel} needs {parallel.num_devices} devices, it has {len(devices)}"
        return [*found, Violation("shape", where, message)]
    kinds = {problem.cluster.kinds[d] for d in devices}
    if len(kinds) > 1:  # one model, one set of costs
        message = f"its replicas are on GPUs of different kinds: {', '.join(sorted(kinds))}"
        found.append(Violation("shape", where, message))
    index = problem.app.index(assignment.node)
    for replica in assignment.replicas():
        if reason := problem.cluster.replica_violation(replica, parallel.tensor_parallel_size):
            found.append(Violation("nvlink", where, reason))
        key = problem.mode_key(parallel, replica)
        if not problem.fits(index, key):
            costs = problem.costs[index].get(key)
            needed = problem.app.nodes[index].model.max_model_len
            message = (
                f"{parallel} has no costs on {key.gpu}"
                if costs is None
                else f"{parallel} leaves a KV cache of {costs.kv_cache_tokens} tokens on "
                f"{key.gpu}, one sequence needs {needed}"
            )
            found.append(Violation("memory", where, message))
            break
    return found


def _precedence(problem: Problem, plan: Plan) -> list[Violation]:
    """Return where a node starts before what it waits for."""
    found: list[Violation] = []
    app = problem.app
    first: dict[str, int] = {}
    for number, stage in enumerate(plan.stages):
        for assignment in stage.assignments:
            first.setdefault(assignment.node, number)
    for i, node in enumerate(app.nodes):
        if node.name not in first:
            continue
        for u in sorted(app.upstreams[i]):
            upstream = app.nodes[u].name
            where = f"stage {first[node.name]}, node {node.name}"
            if upstream not in first:
                message = f"it waits for {upstream}, which no stage assigns"
                found.append(Violation("precedence", where, message))
            elif first[upstream] > first[node.name]:
                message = f"it waits for {upstream}, which starts only in stage {first[upstream]}"
                found.append(Violation("precedence", where, message))
    return found
