"""The transition rule, case by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage, StageEnd
from samullm_plugin.rules.transition import Running, RunState, next_transition, stage_ended


def cluster_of(gpus: int) -> Cluster:
    return Cluster.uniform(Gpu("g", 1), gpus, nvlink=2)


def on(node: str, *devices: int, tp: int = 1) -> Assignment:
    return Assignment(node, ParallelConfig(len(devices) // tp, tp), devices)


def plan_of(*stages: Sequence[Assignment], ends: Sequence[StageEnd] = ()) -> Plan:
    padded = [*ends, *[StageEnd()] * (len(stages) - len(ends))]
    return Plan(tuple(Stage(tuple(s), e) for s, e in zip(stages, padded, strict=True)))


class Run:
    """Carries transitions out at the command of a test."""

    def __init__(
        self, plan: Plan, upstreams: Mapping[str, Sequence[str]] | None = None, *, gpus: int = 4
    ) -> None:
        self.plan, self.upstreams, self.state = plan, upstreams or {}, RunState()
        self.cluster = cluster_of(gpus)

    def go(self, *finished: str, stalled: bool = False) -> dict[str, tuple[int, ...]]:
        """Finish nodes, apply the rule, return who runs where."""
        for node in finished:
            self.state.finished.add(node)
            self.state.running.pop(node, None)
        move = next_transition(self.plan, self.cluster, self.upstreams, self.state, stalled=stalled)
        for node in move.stop:
            del self.state.running[node]
        for running in move.start:
            assert running.planned.node not in self.state.running
            self.state.running[running.planned.node] = running
        held = [d for r in self.state.running.values() for d in r.devices]
        assert len(held) == len(set(held))
        return {n: r.devices for n, r in self.state.running.items()}


def test_first_finisher_ends_a_stage_and_equal_assignments_stay() -> None:
    run = Run(plan_of([on("a", 0), on("b", 1)], [on("b", 1), on("c", 0)]), gpus=2)
    assert run.go() == {"a": (0,), "b": (1,)}
    before = run.state.running["b"]
    assert run.go("a") == {"b": (1,), "c": (0,)}
    assert run.state.running["b"] is before
    assert run.state.stage == 1


def test_a_node_that_finished_before_the_stage_does_not_end_it() -> None:
    stage = Stage((on("a", 0), on("b", 1)))
    state = RunState(stage=1, finished={"a"}, finished_before={"a"})
    assert not stage_ended(stage, state)
    state.finished_before = set()
    assert stage_ended(stage, state)


@pytest.mark.parametrize(
    ("end", "ended_by_a", "ended_by_b"),
    [
        (StageEnd("first_finisher"), True, True),
        (StageEnd("node_finished", "b"), False, True),
        (StageEnd("all_finished"), False, False),
    ],
)
def test_end_events(end: StageEnd, ended_by_a: bool, ended_by_b: bool) -> None:
    stage = Stage((on("a", 0), on("b", 1)), end)
    assert stage_ended(stage, RunState(finished={"a"})) == ended_by_a
    assert stage_ended(stage, RunState(finished={"b"})) == ended_by_b
    assert stage_ended(stage, RunState(finished={"a", "b"}))


def test_progress_ends_a_stage_at_the_very_share() -> None:
    stage = Stage((on("a", 0),), StageEnd("node_progress", "a", 0.3))
    assert not stage_ended(stage, RunState(done_fraction={"a": 0.29}))
    assert stage_ended(stage, RunState(done_fraction={"a": 3 * 0.1}))  # 0.30000000000000004
    assert stage_ended(stage, RunState(done_fraction={"a": 0.3 - 1e-12}))


def test_several_stages_pass_at_once() -> None:
    run = Run(plan_of([on("a", 0), on("b", 1)], [on("b", 1)], [on("c", 0)]), gpus=2)
    run.go()
    assert run.go("a", "b") == {"c": (0,)}
    assert run.state.stage == 2


def test_a_node_in_its_last_stage_runs_to_its_end() -> None:
    run = Run(plan_of([on("a", 0), on("b", 1)], [on("c", 0)]), gpus=2)
    run.go()
    assert run.go("a") == {"b": (1,), "c": (0,)}


def test_a_node_that_is_assigned_again_later_is_paused() -> None:
    first = [on("a", 0), on("b", 1), on("x", 2)]
    run = Run(plan_of(first, [on("c", 0), on("x", 2)], [on("b", 0, 1)]), gpus=3)
    run.go()
    assert run.go("a") == {"c": (0,), "x": (2,)}
    assert run.go("c") == {"b": (0, 1), "x": (2,)}


def test_a_node_is_moved_and_resized() -> None:
    run = Run(plan_of([on("a", 0), on("b", 1)], [on("b", 0, 1)]))
    run.go()
    assert run.go("a") == {"b": (0, 1)}


def test_a_blocked_node_takes_other_devices_of_the_same_shape() -> None:
    run = Run(plan_of([on("a", 0), on("b", 1)], [on("c", 1)]), gpus=2)
    run.go()
    assert run.go("a") == {"b": (1,), "c": (0,)}  # b still holds what c was to have


def test_a_blocked_pair_waits_for_a_whole_group() -> None:
    stage = [on("a", 0), on("b", 1), on("d", 2)]
    run = Run(plan_of(stage, [on("c", 0, 1, tp=2)], [on("e", 3)]))
    run.go()
    assert run.go("a") == {"b": (1,), "d": (2,)}  # 0 and 3 are free, in different groups
    assert run.go("b") == {"c": (0, 1), "d": (2,), "e": (3,)}


def test_nobodys_detour_takes_anothers_place() -> None:
    first = [on("a", 0), on("b", 1), on("x", 2)]
    run = Run(plan_of(first, [on("c", 1), on("d", 0)]), gpus=3)
    run.go()
    assert run.go("a", "x") == {"b": (1,), "d": (0,), "c": (2,)}


def test_nodes_of_the_next_stage_start_early_where_they_can() -> None:
    run = Run(plan_of([on("a", 0)], [on("b", 1), on("c", 0)]), {"b": ["a"], "c": ["a"]}, gpus=2)
    assert run.go() == {"a": (0,), "b": (1,)}  # a runs, so b may wait for its outputs
    assert run.state.running["b"].stage == 1
    assert run.go("a") == {"b": (1,), "c": (0,)}


def test_who_has_started_early_goes_on() -> None:
    first = [on("a", 0), on("x", 1)]
    run = Run(plan_of(first, [on("b", 2)], ends=[StageEnd("all_finished")]), {"b": ["a"]})
    run.go()
    before = run.state.running["b"]
    assert run.go("x") == {"a": (0,), "b": (2,)}
    assert run.state.running["b"] is before  # not stopped, and started again


def test_who_finishes_out_of_turn_leaves_no_device_idle() -> None:
    """Models finish in another order than foreseen: those that follow take what is free."""
    run = Run(
        plan_of(
            [on("a", 0), on("b", 1)],
            [on("b", 1), on("c", 0)],
            [on("c", 0), on("d", 1)],
            ends=[StageEnd("node_finished", "a"), StageEnd("node_finished", "b")],
        ),
        gpus=2,
    )
    run.go()
    assert run.go("b") == {"a": (0,), "c": (1,)}  # not on a's device, which it was to have
    assert run.state.stage == 0
    assert run.go("a") == {"c": (1,), "d": (0,)}


def test_later_stages_start_early_once_those_before_them_run() -> None:
    stages = [[on("a", 0)], [on("b", 0)], [on("c", 0)], [on("d", 0)]]
    run = Run(plan_of(*stages), gpus=3)
    assert run.go() == {"a": (0,), "b": (1,), "c": (2,)}
    assert [run.state.running[n].stage for n in "abc"] == [0, 1, 2]
    assert run.go("c") == {"a": (0,), "b": (1,), "d": (2,)}


def test_nothing_starts_early_past_a_stage_that_lacks_devices() -> None:
    run = Run(plan_of([on("a", 0)], [on("b", 0, 1, 2)], [on("c", 0)]), gpus=3)
    assert run.go() == {"a": (0,)}  # c would take what b waits for


def test_nothing_starts_early_past_a_change_that_is_planned() -> None:
    run = Run(plan_of([on("a", 0)], [on("a", 0, 1)], [on("c", 1)]), gpus=2)
    assert run.go() == {"a": (0,)}  # device 1 is where a will grow


def test_nothing_starts_early_before_what_it_waits_for() -> None:
    run = Run(plan_of([on("a", 0)], [on("x", 0, 1, tp=2), on("b", 2)]), {"b": ["x"]}, gpus=3)
    assert run.go() == {"a": (0,)}  # x needs a's device


def test_a_node_that_waited_throughout_its_last_stage_still_runs() -> None:
    run = Run(plan_of([on("a", 0), on("b", 1)], [on("c", 0, 1, 2, 3)], [on("d", 0)]))
    run.go()
    assert run.go("a") == {"b": (1,)}  # c needs b's device
    run.state.stage = 2  # as if the stage had ended nevertheless
    assert run.go() == {"b": (1,), "d": (0,)}
    run.go("d")
    assert run.go("b") == {"c": (0, 1, 2, 3)}


def test_who_waits_does_not_start_before_what_it_waits_for() -> None:
    first = [on("a", 0), on("b", 1), on("x", 3)]
    run = Run(plan_of(first, [on("down", 2), on("up", 0, 1, tp=2)]), {"down": ["up"]})
    run.go()
    # up lacks a device, so down leaves its own free.
    assert run.go("a") == {"b": (1,), "x": (3,)}
    assert run.go("b") == {"x": (3,), "up": (0, 1), "down": (2,)}


def test_a_stalled_stage_gives_way() -> None:
    everything = on("down", 0, 1, 2, 3)
    run = Run(plan_of([on("up", 0)], [everything], [on("up", 0)]), {"down": ["up"]})
    run.go()
    run.state.stage, run.state.running = 1, {"down": Running(everything, (0, 1, 2, 3), 1)}
    assert run.go(stalled=True) == {"down": (0, 1, 2, 3)}  # the last stage, and no room for up
    assert run.state.stage == 2
    assert run.go(stalled=True) == {"up": (0,)}
    assert run.go("up") == {"down": (0, 1, 2, 3)}


def test_a_detour_stays_on_devices_of_the_same_kind() -> None:
    mixed = Cluster((Gpu("g", 1), Gpu("g", 1), Gpu("other", 1), Gpu("g", 1)))
    state = RunState(stage=0, running={"b": Running(on("b", 1), (1,), 0)})
    plan = plan_of([on("b", 1), on("c", 1)])
    move = next_transition(plan, mixed, {}, state)
    assert [r.devices for r in move.start] == [(0,)]
    state.running["x"] = Running(on("x", 0), (0,), 0)
    state.running["y"] = Running(on("y", 3), (3,), 0)
    plan = plan_of([on("b", 1), on("c", 1), on("x", 0), on("y", 3)])
    assert next_transition(plan, mixed, {}, state).start == ()
