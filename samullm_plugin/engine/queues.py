"""Requests that do not run: not yet arrived, released but not due, waiting."""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.arrays import Array
from samullm_plugin.engine.jit import compiled


@compiled
def heap_push(requests: Array, size: int, key: int) -> None:
    """Push ``key`` on the binary heap of ``size`` ranks."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if requests[parent, at.RANKED] <= key:
            break
        requests[i, at.RANKED] = requests[parent, at.RANKED]
        i = parent
    requests[i, at.RANKED] = key


@compiled
def heap_drop(requests: Array, size: int) -> None:
    """Remove the least of the binary heap of ``size`` ranks."""
    last = requests[size - 1, at.RANKED]
    size -= 1
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and requests[child + 1, at.RANKED] < requests[child, at.RANKED]:
            child += 1
        if requests[child, at.RANKED] >= last:
            break
        requests[i, at.RANKED] = requests[child, at.RANKED]
        i = child
    requests[i, at.RANKED] = last


@compiled
def wait_last(z: Array, requests: Array, request: int) -> None:
    """Add an arriving request to the waiting queue."""
    if z[at.PRIORITY]:
        heap_push(requests, z[at.NUM_WAITING], requests[request, at.RANK])
    else:
        requests[request, at.LINK] = -1
        if z[at.WAIT_TAIL] >= 0:
            requests[z[at.WAIT_TAIL], at.LINK] = request
        else:
            z[at.WAIT_HEAD] = request
        z[at.WAIT_TAIL] = request
    z[at.NUM_WAITING] += 1


@compiled
def wait_first(z: Array, requests: Array, request: int) -> None:
    """Put a preempted request back to the front of the waiting queue."""
    if z[at.PRIORITY]:
        heap_push(requests, z[at.NUM_WAITING], requests[request, at.RANK])
    else:
        requests[request, at.LINK] = z[at.WAIT_HEAD]
        z[at.WAIT_HEAD] = request
        if z[at.WAIT_TAIL] < 0:
            z[at.WAIT_TAIL] = request
    z[at.NUM_WAITING] += 1


@compiled
def peek_waiting(z: Array, requests: Array) -> Any:
    """Return the first request of the waiting queue."""
    if z[at.PRIORITY]:
        return requests[requests[0, at.RANKED], at.BY_RANK]
    return z[at.WAIT_HEAD]


@compiled
def drop_waiting(z: Array, requests: Array) -> None:
    """Remove the first request of the waiting queue."""
    if z[at.PRIORITY]:
        heap_drop(requests, z[at.NUM_WAITING])
    else:
        after = requests[z[at.WAIT_HEAD], at.LINK]
        z[at.WAIT_HEAD] = after
        if after < 0:
            z[at.WAIT_TAIL] = -1
    z[at.NUM_WAITING] -= 1


@compiled
def pend(z: Array, requests: Array, times: Array, key: float, request: int) -> None:
    """Keep a released request until ``key``; equal keys in the order of release."""
    count = z[at.PENDING_COUNT]
    z[at.PENDING_COUNT] += 1
    i = z[at.NUM_PENDING]
    z[at.NUM_PENDING] += 1
    while i > 0:
        parent = (i - 1) >> 1
        if times[parent, at.PENDING_KEY] <= key:  # an equal key was released before
            break
        times[i, at.PENDING_KEY] = times[parent, at.PENDING_KEY]
        requests[i, at.PENDING_ORDER] = requests[parent, at.PENDING_ORDER]
        requests[i, at.PENDING] = requests[parent, at.PENDING]
        i = parent
    times[i, at.PENDING_KEY] = key
    requests[i, at.PENDING_ORDER] = count
    requests[i, at.PENDING] = request


@compiled
def unpend(z: Array, requests: Array, times: Array) -> int:
    """Remove and return the first pending request."""
    result: int = requests[0, at.PENDING]
    z[at.NUM_PENDING] -= 1
    size = z[at.NUM_PENDING]
    key, count, request = (
        times[size, at.PENDING_KEY],
        requests[size, at.PENDING_ORDER],
        requests[size, at.PENDING],
    )
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and (
            times[child + 1, at.PENDING_KEY] < times[child, at.PENDING_KEY]
            or (
                times[child + 1, at.PENDING_KEY] == times[child, at.PENDING_KEY]
                and requests[child + 1, at.PENDING_ORDER] < requests[child, at.PENDING_ORDER]
            )
        ):
            child += 1
        if key < times[child, at.PENDING_KEY] or (
            key == times[child, at.PENDING_KEY] and count < requests[child, at.PENDING_ORDER]
        ):
            break
        times[i, at.PENDING_KEY] = times[child, at.PENDING_KEY]
        requests[i, at.PENDING_ORDER] = requests[child, at.PENDING_ORDER]
        requests[i, at.PENDING] = requests[child, at.PENDING]
        i = child
    times[i, at.PENDING_KEY] = key
    requests[i, at.PENDING_ORDER] = count
    requests[i, at.PENDING] = request
    return result


@compiled
def next_arrival_key(z: Array, times: Array) -> Any:
    """Return when the next request arrives, inf if none is known."""
    key = float("inf")
    if z[at.NEXT_ARRIVAL] < z[at.NUM_ARRIVALS]:
        key = times[z[at.NEXT_ARRIVAL], at.ARRIVAL_KEY]
    if z[at.NUM_PENDING] > 0 and times[0, at.PENDING_KEY] < key:
        key = times[0, at.PENDING_KEY]
    return key


@compiled
def admit_arrivals(z: Array, requests: Array, times: Array, now: float) -> None:
    """Move what has arrived by ``now`` to the waiting queue, in order of arrival."""
    while True:
        key = float("inf")
        if z[at.NEXT_ARRIVAL] < z[at.NUM_ARRIVALS]:
            key = times[z[at.NEXT_ARRIVAL], at.ARRIVAL_KEY]
        if z[at.NUM_PENDING] > 0 and times[0, at.PENDING_KEY] < key:
            if times[0, at.PENDING_KEY] > now:
                break
            wait_last(z, requests, unpend(z, requests, times))
        else:
            if not key <= now:
                break
            wait_last(z, requests, requests[z[at.NEXT_ARRIVAL], at.ARRIVING])
            z[at.NEXT_ARRIVAL] += 1
