"""Items cross a transport that drops, repeats and reorders once each and in order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from samullm_ray.link import Batch, Incoming, Outgoing


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.just(0)),
            st.tuples(st.just("send"), st.integers(0, 3)),
            st.tuples(st.just("deliver"), st.integers(0, 5)),
            st.tuples(st.just("drop"), st.integers(0, 5)),
            st.tuples(st.just("acknowledge"), st.integers(0, 5)),
        ),
        max_size=80,
    )
)
@settings(max_examples=300, deadline=None)
def test_every_item_once_and_in_order(steps: list[tuple[str, int]]) -> None:
    out: Outgoing[int] = Outgoing()
    incoming: Incoming[int] = Incoming()
    flying: list[Batch[int]] = []
    acknowledgements: list[int] = []
    added, got = 0, []
    for step, number in steps:
        if step == "add":
            out.add(added)
            added += 1
        elif step == "send":
            flying += [out.since(out.acknowledged + number)] * (1 + number % 2)
        elif step == "deliver" and flying:
            got += incoming.take(flying.pop(number % len(flying)))
            acknowledgements.append(incoming.received)
        elif step == "drop" and flying:
            flying.pop(number % len(flying))
        elif step == "acknowledge" and acknowledgements:
            out.acknowledge(acknowledgements.pop(number % len(acknowledgements)))
        assert got == list(range(len(got)))
        assert out.acknowledged <= len(got)
        assert out.acknowledged + len(out) == added
    got += incoming.take(out.batch())  # one call that arrives repairs everything
    assert got == list(range(added))


def test_old_acknowledgements_change_nothing() -> None:
    out: Outgoing[str] = Outgoing()
    for item in "abc":
        out.add(item)
    out.acknowledge(2)
    out.acknowledge(1)
    assert out.batch() == Batch(2, ("c",))
