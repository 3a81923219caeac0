"""The parts of ``exact``: first solution, bounds, stages, instances."""

from __future__ import annotations

import json
import random
from itertools import product

import pytest
from samullm_cpsat.bounding import branch, simple_bound
from samullm_cpsat.branching import Branching, tables_of
from samullm_cpsat.constraints import dual_feasible
from samullm_cpsat.instance import Instance, Lag, Mode, Pool, Task, pools_of
from samullm_cpsat.options import ExactOptions
from samullm_cpsat.planning import solve_instance
from samullm_cpsat.schedule import Placement, Schedule, best_list_schedule
from samullm_cpsat.solver import Outcome, SolveOptions, solve
from samullm_cpsat.stages import plan_of

from samullm_plugin.errors import InputError
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.model.parallel import ParallelConfig
from tests.strategies.exact_brute_force import random_instance


def malleable(seed: int, tasks: int, devices: int, group: int = 2, chain: bool = False) -> Instance:
    """Return models as they are: nearly linear speed-up, a load, tensor parallelism at a cost."""
    rng = random.Random(seed)
    made = []
    for i in range(tasks):
        work, load = rng.uniform(2000, 9000), rng.uniform(200, 500)
        modes = []
        for tp in (1, 2):
            speed = 1.0 if tp == 1 else rng.uniform(1.4, 2.1)
            for dp in range(1, devices // tp + 1):
                duration = int(load + work / (dp * speed) + 150) + 1
                modes.append(Mode(ParallelConfig(dp, tp), int(load), duration))
        made.append(Task(f"t{i}", tuple(modes)))
    lags = []
    for i in range(1, tasks if chain else 0):
        tail = tuple(tuple(m.duration // 3 for m in made[i].modes) for _ in made[i - 1].modes)
        lags.append(Lag(i - 1, i, tail))
    pools = tuple(Pool(tuple(range(d, d + group))) for d in range(0, devices, group))
    return Instance("malleable", tuple(made), tuple(lags), pools)


MACHINES = Instance(  # two machines; a replica of two pipeline stages lies on one of them
    "machines",
    (
        Task("a", (Mode(ParallelConfig(1, 1, 2), 1, 9), Mode(ParallelConfig(2, 1, 2), 1, 5))),
        Task("b", (Mode(ParallelConfig(1, 1, 3), 2, 7),)),
        Task("c", (Mode(ParallelConfig(1, 2, 1), 2, 7), Mode(ParallelConfig(1, 1, 1), 2, 14))),
    ),
    (),
    (Pool((0, 1), "", 0), Pool((2,), "", 0), Pool((3, 4), "", 1), Pool((5,), "", 1)),
)


def solved(instance: Instance, segments: int = 1, limit: float = 3.0) -> tuple[Outcome, str]:
    log: list[str] = []
    simple = instance.simplified(switching=segments > 1)
    first = best_list_schedule(simple)
    how = SolveOptions(
        segments=segments,
        units=1 if segments == 1 else 50,
        workers=1,
        deterministic_limit=limit,
        on_log=log.append,
    )
    return solve(simple, first, simple_bound(simple, switching=segments > 1), how), "\n".join(log)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    "instance",
    [
        malleable(1, 4, 4),
        malleable(2, 5, 8, chain=True),
        malleable(3, 3, 4, group=4),
        malleable(4, 3, 3, group=1),
        MACHINES,
    ],
    ids=["pairs", "chain", "one group", "single devices", "machines"],
)
def test_first_solution_is_complete_and_taken(instance: Instance, segments: int) -> None:
    _, log = solved(instance, segments, 0.2)
    assert "The solution hint is complete and is feasible." in log


def test_first_solutions_of_random_instances_are_taken() -> None:
    for seed in range(60):
        _, log = solved(random_instance(random.Random(seed), 4, 6), 1 + seed % 3, 0.2)
        assert "The solution hint is complete and is feasible." in log, seed


def test_replicas_stay_on_one_machine() -> None:
    """Of six devices on two machines no two hold b and two replicas of a at once."""
    result = solve_instance(MACHINES, ExactOptions(workers=1))
    assert result.outcome.optimal
    for p in result.outcome.schedule.placements:
        mode = MACHINES.tasks[p.task].modes[p.mode]
        size = mode.parallel.devices_per_replica
        for first in range(0, len(p.devices), size):
            assert len({d // 3 for d in p.devices[first : first + size]}) == 1


def test_replicas_larger_than_a_machine_have_equally_many_stages_on_each() -> None:
    """Three machines of two devices; of two replicas of four stages no two parts lie together."""
    instance = Instance(
        "wide",
        (
            Task("a", (Mode(ParallelConfig(1, 1, 4), 1, 9, "", 2),)),
            Task("b", (Mode(ParallelConfig(3, 1, 2), 1, 4, "", 2), Mode(ParallelConfig(1), 1, 9))),
        ),
        (),
        tuple(Pool((d, d + 1), "", m) for m, d in enumerate((0, 2, 4))),
    )
    assert Instance.from_json(instance.to_json()) == instance
    result = solve_instance(instance, ExactOptions(workers=1))
    assert result.outcome.optimal
    assert result.outcome.schedule.makespan == 9
    three = instance.with_modes(1, [0])
    for schedule in (solve_instance(three, ExactOptions(workers=1)).outcome.schedule,
                     best_list_schedule(three)):  # fmt: skip
        assert schedule.makespan == 13
        for p in schedule.placements:
            mode = three.tasks[p.task].modes[p.mode]
            together = mode.stages_together
            machines = [d // 2 for d in p.devices]
            assert len(p.devices) == mode.devices
            for first in range(0, len(machines), mode.parallel.devices_per_replica):
                replica = machines[first : first + mode.parallel.devices_per_replica]
                parts = [set(replica[n : n + together]) for n in range(0, len(replica), together)]
                assert [len(part) for part in parts] == [1, 1]
                assert len(set(replica)) == 2


def test_nine_models_on_eight_gpus_are_proven() -> None:
    """What the issue of size is about: a proof, not only a good schedule, within seconds."""
    for seed in range(4):
        result = solve_instance(malleable(seed, 9, 8), ExactOptions(time_limit_s=30))
        assert result.outcome.optimal, seed
        assert result.outcome.objective == result.outcome.bound


def test_interrupted_branch_and_bound_gives_a_valid_bound() -> None:
    instance = malleable(5, 7, 8, group=8).simplified()
    first = best_list_schedule(instance)
    full = branch(instance, first, nodes=10**8)
    assert full.bound == full.schedule.makespan
    bounds = [branch(instance, first, nodes=n).bound for n in (0, 10, 1000, 30_000)]
    assert all(b <= full.bound for b in bounds)
    assert bounds[-1] > bounds[0] >= simple_bound(instance, switching=False)


def test_branch_and_bound_goes_on_where_it_stopped() -> None:
    instance = malleable(6, 6, 8, group=8).simplified()
    limit = best_list_schedule(instance).makespan
    tables = tables_of(instance, list(range(6)), [0] * 6)
    assert tables is not None
    whole, pieces = Branching(tables, limit), Branching(tables, limit)
    whole.run(10**9, lambda: True)
    while not pieces.exhausted:
        pieces.run(777, lambda: True)
    assert (pieces.best, pieces.nodes) == (whole.best, whole.nodes)
    assert pieces.modes_and_starts() == whole.modes_and_starts()


def test_branch_and_bound_agrees_with_the_solver_alone() -> None:
    """On instances large enough that states recur, and with too few lengths to tell them apart."""
    for seed in range(40):
        rng = random.Random(100 + seed)
        tasks = []
        for i in range(rng.randint(4, 6)):
            work = rng.choice([4, 6, 8, 12])
            sizes = rng.sample(range(1, 5), 3)
            modes = [
                Mode(ParallelConfig(d), 1, 1 + -(-work // d) + rng.choice([0, 1])) for d in sizes
            ]
            tasks.append(Task(f"t{i}", tuple(modes)))
        lags = []
        for c in range(1, len(tasks)):
            if rng.random() < 0.3:
                tail = tuple(
                    tuple(rng.randint(0, m.duration) for m in tasks[c].modes) for _ in range(3)
                )
                lags.append(Lag(rng.randrange(c), c, tail))
        instance = Instance("x", tuple(tasks), tuple(lags), (Pool((0, 1, 2, 3)),))
        alone = solve_instance(instance, ExactOptions(workers=1, branch_nodes=0)).outcome
        simple = instance.simplified()
        proof = branch(simple, best_list_schedule(simple), nodes=10**8)
        assert alone.optimal, seed
        assert proof.bound == proof.schedule.makespan == alone.objective, seed


def test_equal_tasks_are_not_permuted() -> None:
    """Equal models are interchangeable: the search starts them in one order only."""
    task = malleable(7, 1, 4, group=4).tasks[0]
    pools = (Pool((0, 1, 2, 3)),)
    equal = Instance("equal", tuple(Task(f"t{i}", task.modes) for i in range(5)), (), pools)
    near = tuple(
        Task(t.name, (*t.modes, Mode(ParallelConfig(4), 0, 50_000 + n)))
        for n, t in enumerate(equal.tasks)
    )
    different = Instance("different", near, (), pools)
    found = []
    for instance in (equal, different):
        tables = tables_of(instance, list(range(5)), [0] * 5)
        assert tables is not None
        search = Branching(tables, best_list_schedule(equal).makespan)
        search.run(10**9, lambda: True)
        found.append(search)
    assert found[0].best == found[1].best
    assert found[0].nodes * 5 < found[1].nodes


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 7, 8, 16])
def test_dual_feasible_functions(capacity: int) -> None:
    """Whatever demands fit together, their measures do."""

    def fitting(left: int, largest: int) -> list[list[int]]:
        found: list[list[int]] = [[]]
        for d in range(1, min(left, largest) + 1):
            found += [[d, *rest] for rest in fitting(left - d, d)]
        return found

    for measure in dual_feasible(capacity):
        assert all(
            sum(measure[d] for d in demands) <= measure[capacity]
            for demands in fitting(capacity, capacity)
        )


def placement(task: int, devices: tuple[int, ...], start: int, end: int, done: float = 1.0):  # type: ignore[no-untyped-def]
    return Placement(task, len(devices) - 1, devices, start, end, done)


def named(count: int, devices: int) -> Instance:
    modes = tuple(Mode(ParallelConfig(d), 0, 5) for d in range(1, devices + 1))
    tasks = tuple(Task("abcdef"[i], modes) for i in range(count))
    return Instance("named", tasks, (), (Pool(tuple(range(devices))),))


def shape(instance: Instance, *placements: Placement) -> list[tuple[str, str]]:
    """Return the stages as text: assignments, end event."""
    plan = plan_of(instance, Schedule(placements), lambda p: p.done)
    return [
        (
            " ".join(f"{a.node}{''.join(map(str, a.devices))}" for a in s.assignments),
            f"{s.end.kind} {s.end.node or ''}".strip()
            + (f" {s.end.fraction}" if s.end.fraction < 1 else ""),
        )
        for s in plan.stages
    ]


def test_stages_end_where_somebody_waits() -> None:
    """b takes over a's device while c runs on; nothing starts after that."""
    stages = shape(
        named(3, 2), placement(0, (0,), 0, 3), placement(2, (1,), 0, 9), placement(1, (0,), 3, 5)
    )
    assert stages == [("a0 c1", "node_finished a"), ("c1 b0", "all_finished")]


def test_stages_of_nodes_that_end_together() -> None:
    """Each successor waits for its own predecessor, whichever really ends first."""
    stages = shape(
        named(4, 2),
        placement(0, (0,), 0, 3),
        placement(1, (1,), 0, 3),
        placement(2, (0,), 3, 6),
        placement(3, (1,), 3, 8),
    )
    assert stages == [
        ("a0 b1", "node_finished a"),
        ("b1 c0", "node_finished b"),
        ("c0 d1", "all_finished"),
    ]


def test_stages_of_a_node_that_is_broken_off_for_another() -> None:
    """a gives up a device at b's start, which nothing but a's progress tells, and grows after b."""
    stages = shape(
        named(2, 2),
        placement(0, (0, 1), 0, 4, 0.5),
        placement(0, (0,), 4, 6, 0.625),
        placement(1, (1,), 4, 6),
        placement(0, (0, 1), 6, 9),
    )
    assert stages == [
        ("a01", "node_progress a 0.5"),
        ("a0 b1", "node_finished b"),
        ("a01", "all_finished"),
    ]


def test_consumer_ends_last_even_in_the_same_tick() -> None:
    """The verifier wants a producer's last stage to be no later than its consumer's."""
    instance = named(3, 3)
    tail = tuple((0,) * 3 for _ in range(3))
    lagged = Instance("lag", instance.tasks, (Lag(2, 0, tail),), instance.pools)
    stages = shape(
        lagged,
        placement(2, (1,), 0, 5),
        placement(0, (0,), 0, 5),
        placement(1, (0,), 5, 7),
    )
    assert stages == [
        ("c1 a0", "node_finished c"),
        ("a0", "node_finished a"),
        ("b0", "all_finished"),
    ]


def test_consumer_waits_for_its_producers_start() -> None:
    """Its device is free from the beginning; it is listed from the stage of its producer on."""
    instance = named(3, 2)
    tail = tuple((0,) * 2 for _ in range(2))
    lagged = Instance("lag", instance.tasks, (Lag(1, 2, tail),), instance.pools)
    stages = shape(
        lagged, placement(0, (0,), 0, 3), placement(1, (0,), 3, 8), placement(2, (1,), 3, 9)
    )
    assert stages == [("a0", "node_finished a"), ("b0 c1", "all_finished")]


def test_json_round_trip() -> None:
    instance = malleable(8, 3, 4, chain=True)
    again = Instance.from_json(json.loads(json.dumps(instance.to_json())))
    assert again == instance
    with pytest.raises(InputError, match="format 99"):
        Instance.from_json({**instance.to_json(), "format": 99})


def test_pools_of_a_mixed_cluster() -> None:
    a, b = Gpu("a", 1), Gpu("b", 1)
    cluster = Cluster((a, a, b, a), ((0, 1), (2, 3)), ((0, 1), (2, 3)))
    assert pools_of(cluster) == (Pool((0, 1), "a", 0), Pool((2,), "b", 1), Pool((3,), "a", 1))


def test_modes_beaten_by_others_are_left_out() -> None:
    """A tensor-parallel pair that two replicas beat goes, and with it the groups; others stay."""
    modes = (
        Mode(ParallelConfig(1, 1), 2, 20),
        Mode(ParallelConfig(2, 1), 2, 11),
        Mode(ParallelConfig(1, 2), 2, 12),
        Mode(ParallelConfig(4, 1), 2, 11),
    )
    pools = (Pool((0, 1)), Pool((2, 3)))
    simple = Instance("x", (Task("a", modes),), (), pools).simplified()
    assert simple.tasks[0].modes == modes[:2]
    assert simple.pools == (Pool((0, 1, 2, 3)),)
    # Four single devices fit where two pairs do, two pairs not where four single devices do.
    pair, four = Mode(ParallelConfig(2, 2), 2, 5), Mode(ParallelConfig(4, 1), 2, 7)
    simple = Instance("x", (Task("a", (pair, four)),), (), pools).simplified()
    assert simple.tasks[0].modes == (pair, four)


def test_tail_that_a_slower_producer_shortens_keeps_its_mode() -> None:
    producer = (Mode(ParallelConfig(1), 0, 10), Mode(ParallelConfig(1), 0, 12))
    consumer = (Mode(ParallelConfig(1), 0, 8),)
    for tails, kept in ((((8,), (6,)), 1), (((8,), (5,)), 2)):
        lag = Lag(0, 1, tails)
        instance = Instance(
            "x", (Task("p", producer), Task("c", consumer)), (lag,), (Pool((0, 1)),)
        )
        assert len(instance.simplified().tasks[0].modes) == kept
        assert len(instance.simplified(switching=True).tasks[0].modes) == 2


def test_consumer_keeps_the_mode_of_the_shorter_tail() -> None:
    producer = (Mode(ParallelConfig(1), 0, 10),)
    consumer = (Mode(ParallelConfig(1), 0, 8), Mode(ParallelConfig(1), 0, 9))
    for tails, kept in ((((4, 4),), 1), (((4, 3),), 2)):
        lag = Lag(0, 1, tails)
        instance = Instance(
            "x", (Task("p", producer), Task("c", consumer)), (lag,), (Pool((0, 1)),)
        )
        assert len(instance.simplified().tasks[1].modes) == kept


def test_impossible_instances_are_refused() -> None:
    pools = (Pool((0,)), Pool((1,)))
    wide = Task("wide", (Mode(ParallelConfig(1, 2), 0, 5),))
    with pytest.raises(InputError, match="wide: none of its modes fits"):
        Instance("x", (wide,), (), pools)
    with pytest.raises(InputError, match="load <= duration"):
        Mode(ParallelConfig(1), 6, 5)
    one = Task("one", (Mode(ParallelConfig(1), 0, 5),))
    lags = (Lag(0, 1, ((0,),)), Lag(1, 0, ((0,),)))
    with pytest.raises(InputError, match="cycle"):
        Instance("x", (one, one), lags, pools).order()


def test_more_segments_never_hurt() -> None:
    for seed, tasks in product(range(3), (2, 3)):
        instance = malleable(seed, tasks, 4, group=4)
        whole, _ = solved(instance, 1)
        parts, _ = solved(instance, 2)
        assert parts.bound <= whole.objective
        assert parts.objective <= whole.objective
