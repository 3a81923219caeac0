"""Requests that do not run: not yet arrived, released but not due, waiting."""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine.jit import inner
from samullm_plugin.engine.records import Array, Record


@inner
def heap_push(requests: Array, size: int, key: int) -> None:
    """Push ``key`` on the binary heap of ``size`` ranks."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if requests[parent].heap_rank <= key:
            break
        requests[i].heap_rank = requests[parent].heap_rank
        i = parent
    requests[i].heap_rank = key


@inner
def heap_drop(requests: Array, size: int) -> None:
    """Remove the least of the binary heap of ``size`` ranks."""
    last = requests[size - 1].heap_rank
    size -= 1
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and requests[child + 1].heap_rank < requests[child].heap_rank:
            child += 1
        if requests[child].heap_rank >= last:
            break
        requests[i].heap_rank = requests[child].heap_rank
        i = child
    requests[i].heap_rank = last


@inner
def append_waiting(s: Record, requests: Array, request: int) -> None:
    """Add an arriving request to the waiting queue."""
    if s.priority:
        first = requests[request].first_rank
        rank = first + requests[first].num_ranked
        requests[first].num_ranked += 1
        requests[request].rank = rank
        requests[rank].of_rank = request
        heap_push(requests, s.num_waiting, requests[request].rank)
    else:
        requests[request].after_waiting = -1
        if s.waiting_tail >= 0:
            requests[s.waiting_tail].after_waiting = request
        else:
            s.waiting_head = request
        s.waiting_tail = request
    s.num_waiting += 1


@inner
def prepend_waiting(s: Record, requests: Array, request: int) -> None:
    """Put a preempted request back to the front of the waiting queue."""
    if s.priority:
        heap_push(requests, s.num_waiting, requests[request].rank)
    else:
        requests[request].after_waiting = s.waiting_head
        s.waiting_head = request
        if s.waiting_tail < 0:
            s.waiting_tail = request
    s.num_waiting += 1


@inner
def peek_waiting(s: Record, requests: Array) -> Any:
    """Return the first request of the waiting queue."""
    if s.priority:
        return requests[requests[0].heap_rank].of_rank
    return s.waiting_head


@inner
def pop_waiting(s: Record, requests: Array) -> None:
    """Remove the first request of the waiting queue."""
    if s.priority:
        heap_drop(requests, s.num_waiting)
    else:
        after = requests[s.waiting_head].after_waiting
        s.waiting_head = after
        if after < 0:
            s.waiting_tail = -1
    s.num_waiting -= 1


@inner
def remove_waiting(s: Record, requests: Array, request: int) -> None:
    """Take ``request`` out of the waiting queue, wherever it is."""
    if s.priority:
        size = s.num_waiting
        place = 0
        while requests[place].heap_rank != requests[request].rank:
            place += 1
        while place > 0:  # to the top, then off it
            parent = (place - 1) >> 1
            requests[place].heap_rank = requests[parent].heap_rank
            place = parent
        heap_drop(requests, size)
    else:
        before, at_hand = -1, s.waiting_head
        while at_hand != request:
            before, at_hand = at_hand, requests[at_hand].after_waiting
        after = requests[request].after_waiting
        if before < 0:
            s.waiting_head = after
        else:
            requests[before].after_waiting = after
        if after < 0:
            s.waiting_tail = before
    s.num_waiting -= 1


@inner
def push_arrival(s: Record, requests: Array, key: float, order: int, request: int) -> None:
    """Keep a released request until ``key``; equal keys by ``order``."""
    i = s.num_due_later
    s.num_due_later += 1
    while i > 0:
        parent = (i - 1) >> 1
        before = requests[parent].due_key
        if before < key or (before == key and requests[parent].due_order < order):
            break
        requests[i].due_key = requests[parent].due_key
        requests[i].due_order = requests[parent].due_order
        requests[i].due_request = requests[parent].due_request
        i = parent
    requests[i].due_key = key
    requests[i].due_order = order
    requests[i].due_request = request


@inner
def pop_arrival(s: Record, requests: Array) -> int:
    """Remove and return the first pending request."""
    result: int = requests[0].due_request
    s.num_due_later -= 1
    size = s.num_due_later
    key, count, request = (
        requests[size].due_key,
        requests[size].due_order,
        requests[size].due_request,
    )
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and (
            requests[child + 1].due_key < requests[child].due_key
            or (
                requests[child + 1].due_key == requests[child].due_key
                and requests[child + 1].due_order < requests[child].due_order
            )
        ):
            child += 1
        if key < requests[child].due_key or (
            key == requests[child].due_key and count < requests[child].due_order
        ):
            break
        requests[i].due_key = requests[child].due_key
        requests[i].due_order = requests[child].due_order
        requests[i].due_request = requests[child].due_request
        i = child
    requests[i].due_key = key
    requests[i].due_order = count
    requests[i].due_request = request
    return result


@inner
def next_arrival_key(s: Record, requests: Array) -> Any:
    """Return when the next request arrives, inf if none is known."""
    key = float("inf")
    if s.next_arrival < s.num_arrivals:
        key = requests[s.next_arrival].arrival_key
    if s.num_due_later > 0 and requests[0].due_key < key:
        key = requests[0].due_key
    return key


@inner
def admit_arrivals(s: Record, requests: Array, now: float) -> None:
    """Move what has arrived by ``now`` to the waiting queue, in order of arrival.

    What arrives at one moment comes in the order of the table, as a coordinator submits it.
    """
    while True:
        key, order = float("inf"), 0
        if s.next_arrival < s.num_arrivals:
            key = requests[s.next_arrival].arrival_key
            order = requests[s.next_arrival].arriving
        due = requests[0].due_key if s.num_due_later > 0 else float("inf")
        if due < key or (due == key < float("inf") and requests[0].due_order < order):
            if due > now:
                break
            append_waiting(s, requests, pop_arrival(s, requests))
        else:
            if not key <= now:
                break
            append_waiting(s, requests, requests[s.next_arrival].arriving)
            s.next_arrival += 1
