"""No packing of work and engine starts into devices is shorter than the bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samullm_plugin.rules.packing import DIVIDED, Demand, InOneGo, fitting_s


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_packing_is_shorter(data: st.DataObject) -> None:
    """Work of each node split at random among devices, a start for each share."""
    gpus = data.draw(st.integers(1, 5))
    count = data.draw(st.integers(1, 6))
    starts_s = data.draw(st.lists(st.floats(0.0, 20.0), min_size=count, max_size=count))
    busy_s = [0.0] * gpus
    work = [0.0] * count
    for i in range(count):
        used = data.draw(st.lists(st.integers(0, gpus - 1), min_size=1, max_size=4))
        for device in used:  # the same device again: started again
            seconds = data.draw(st.floats(0.0, 50.0))
            busy_s[device] += starts_s[i] + seconds
            work[i] += seconds
    demands = [Demand(w, s, s, s) for w, s in zip(work, starts_s, strict=True)]
    assert fitting_s(demands, gpus) <= max(busy_s) * (1 + 1e-6) + 1e-9


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_packing_of_engines_of_several_devices_is_shorter(data: st.DataObject) -> None:
    """Engines, one or more of each node in turn, one after another where devices are free."""
    gpus = data.draw(st.integers(1, 5))
    free_s = np.zeros(gpus)
    demands = []
    for _ in range(data.draw(st.integers(1, 5))):
        size = data.draw(st.integers(1, gpus))
        start_s = data.draw(st.floats(0.0, 20.0))
        work = wasted = before_s = 0.0
        ready_s = []
        engines = data.draw(st.integers(1, 3))
        for _ in range(engines):
            devices = data.draw(st.permutations(range(gpus)))[: size * data.draw(st.integers(1, 2))]
            seconds, idle_s = data.draw(st.floats(0.0, 50.0)), data.draw(st.floats(0.0, 5.0))
            used = len(devices) // size * size
            before_s = max(before_s, free_s[devices[:used]].max()) + start_s + seconds + idle_s
            free_s[devices[:used]] = before_s
            ready_s.append(before_s - seconds - idle_s)
            work, wasted = work + used * seconds, used * (seconds + idle_s)
        counts = np.arange(size, gpus + 1, size)
        held_s = start_s + wasted / counts
        held_s = held_s if engines == 1 else np.full(len(counts), 1e6)
        ways = InOneGo(counts, held_s, held_s)
        parted = Demand(work, size * start_s, start_s, start_s, whole=ways)
        demands.append(replace(parted, parted_head_s=ready_s[0] + start_s))
    assert fitting_s(demands, gpus) <= free_s.max() * (1 + 1e-6) + 1e-9


def test_what_is_parted_is_done_at_once_on_as_many_devices_as_there_is_a_way_for() -> None:
    """Replicas of two devices: 130 s of work, two starts of 10 s, of which one comes between."""
    never = np.full(3, 1e6)
    node = Demand(130.0, 20.0, 10.0, 10.0, 5.0, InOneGo(np.array([2, 4, 6]), never, never))
    node = replace(node, parted_head_s=20.0)
    assert node.shares(20.0 + 5.0) == np.inf
    assert [node.shares(20.0 + 5.0 + room_s) for room_s in (21.0, 26.0, 44.0, 70.0)] == [
        np.inf,
        6,
        4,
        2,
    ]
    assert node.parted(20.0 + 5.0 + 26.0) == pytest.approx(130.0 + 6 * 10.0 + 20.0)
    assert node.parted(20.0 + 5.0 + 26.0, 4.0) == pytest.approx(130.0 + (6 * 10.0 + 20.0) * 0.6)


def test_one_of_three_models_on_two_devices_starts_twice() -> None:
    three = [Demand(30.0, 10.0, 10.0, 10.0)] * 3
    assert fitting_s(three, 2) == pytest.approx((3 * 40 + 10) / 2, rel=1e-5)
    assert fitting_s(three[:2], 2) == pytest.approx(40.0, rel=1e-5)


def test_a_large_model_starts_on_as_many_devices_as_it_needs() -> None:
    """Beside it many small ones: more nodes than are divided."""
    small = [Demand(1.0, 1.0, 1.0, 1.0)] * (DIVIDED + 1)
    (large,) = [Demand(300.0, 10.0, 10.0, 10.0)]
    found = fitting_s([large, *small], 4)
    assert large.shares(found) == 4
    assert found == pytest.approx((300 + 4 * 10 + len(small) * 2) / 4, rel=1e-6)


def test_nothing_takes_no_time() -> None:
    assert fitting_s([], 4) == 0.0
