"""From a schedule to a plan: stages that end when named nodes do.

Every end of a placement that others may wait for is the end of a stage, so that the host's
transition rule starts what follows at that very moment, and a node's last stage ends with the node
itself, so that no stage can be passed over before its nodes have run.
"""

from __future__ import annotations

from collections.abc import Callable

from samullm_cpsat.instance import Instance
from samullm_cpsat.schedule import Placement, Schedule
from samullm_plugin import Assignment, Plan, Stage, StageEnd

FinishedShare = Callable[[Placement], float]


def plan_of(instance: Instance, schedule: Schedule, finished_share: FinishedShare) -> Plan:
    """Return the plan of a schedule in which everything starts as early as its order lets.

    Args:
        instance: tasks and devices; tasks have the names of nodes.
        schedule: what is placed where and when.
        finished_share: for a placement that is not the last of its task, the share of the node's
            requests that is finished at its end.
    """
    placements = schedule.placements
    last = {p.task: n for n, p in enumerate(placements)}
    ends, end_stage = _stage_ends(instance, placements, last, finished_share)
    first_stage = _first_stages(instance, placements, last, end_stage)
    stages: list[Stage] = []
    for number, end in enumerate(ends):
        assignments = tuple(
            Assignment(
                instance.tasks[p.task].name,
                instance.tasks[p.task].modes[p.mode].parallel,
                p.devices,
            )
            for n, p in enumerate(placements)
            if first_stage[n] <= number <= end_stage[n]
        )
        rest = [n for n in range(len(placements)) if end_stage[n] >= number]
        if all(first_stage[n] <= number and n == last[placements[n].task] for n in rest):
            stages.append(Stage(assignments, StageEnd("all_finished")))
            break  # nothing starts or stops any more
        stages.append(Stage(assignments, end))
    return Plan(tuple(stages))


def _stage_ends(
    instance: Instance,
    placements: tuple[Placement, ...],
    last: dict[int, int],
    finished_share: FinishedShare,
) -> tuple[list[StageEnd], list[int]]:
    """Return the end event of each stage, and by placement the stage that ends with it.

    A placement that is broken off ends with a node that finishes at the same tick, if one does,
    for that is why it is broken off; else when it has finished its share.
    """
    rank = {task: n for n, task in enumerate(instance.order())}
    finishing = sorted(last.values(), key=lambda n: (placements[n].end, rank[placements[n].task]))
    broken = [n for n in range(len(placements)) if n not in finishing]
    at_finish = {placements[n].end for n in finishing}
    own = {placements[n].end: n for n in reversed(broken) if placements[n].end not in at_finish}
    events = sorted(
        [*finishing, *own.values()], key=lambda n: (placements[n].end, rank[placements[n].task])
    )
    ends, end_stage = [], [0] * len(placements)
    for number, n in enumerate(events):
        name = instance.tasks[placements[n].task].name
        end_stage[n] = number
        if n in finishing:
            ends.append(StageEnd("node_finished", name))
        else:
            ends.append(StageEnd("node_progress", name, finished_share(placements[n])))
    for n in broken:
        end_stage[n] = max(
            k for k, e in enumerate(events) if placements[e].end == placements[n].end
        )
    return ends, end_stage


def _first_stages(
    instance: Instance,
    placements: tuple[Placement, ...],
    last: dict[int, int],
    end_stage: list[int],
) -> list[int]:
    """Return by placement the first stage in which its devices and its task are free for it."""
    count = [sum(p.task == i for p in placements) for i in range(len(instance.tasks))]
    device_free: dict[int, int] = {}
    begun: dict[int, int] = {}
    ended: dict[int, int] = {}
    result = []
    for n, p in enumerate(placements):
        stage = max([ended.get(p.task, 0), *(device_free.get(d, 0) for d in p.devices)])
        for lag in instance.producers(p.task):
            stage = max(stage, begun[lag.producer])
            if count[p.task] > 1:
                stage = max(stage, end_stage[last[lag.producer]] + 1)
        result.append(stage)
        begun.setdefault(p.task, stage)
        ended[p.task] = end_stage[n] + 1
        for d in p.devices:
            device_free[d] = end_stage[n] + 1
    return result
