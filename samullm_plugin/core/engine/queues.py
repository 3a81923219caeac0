"""Requests that do not run: not yet arrived, released but not due, waiting."""

from __future__ import annotations

from samullm_plugin.core.engine.jit import compiled
from samullm_plugin.core.engine.layout import (
    LINK,
    NEXT_ARRIVAL,
    NUM_ARRIVALS,
    NUM_PENDING,
    NUM_WAITING,
    PENDING_COUNT,
    PRIORITY,
    RANK,
    WAIT_HEAD,
    WAIT_TAIL,
)


@compiled
def heap_push(heap, size, key):
    """Push ``key`` on the binary heap ``heap[:size]``."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if heap[parent] <= key:
            break
        heap[i] = heap[parent]
        i = parent
    heap[i] = key


@compiled
def heap_drop(heap, size):
    """Remove the least element of ``heap[:size]``."""
    last = heap[size - 1]
    size -= 1
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= last:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = last


@compiled
def wait_last(Z, R, ranked, request):
    """Add an arriving request to the waiting queue."""
    if Z[PRIORITY]:
        heap_push(ranked, Z[NUM_WAITING], R[request, RANK])
    else:
        R[request, LINK] = -1
        if Z[WAIT_TAIL] >= 0:
            R[Z[WAIT_TAIL], LINK] = request
        else:
            Z[WAIT_HEAD] = request
        Z[WAIT_TAIL] = request
    Z[NUM_WAITING] += 1


@compiled
def wait_first(Z, R, ranked, request):
    """Put a preempted request back to the front of the waiting queue."""
    if Z[PRIORITY]:
        heap_push(ranked, Z[NUM_WAITING], R[request, RANK])
    else:
        R[request, LINK] = Z[WAIT_HEAD]
        Z[WAIT_HEAD] = request
        if Z[WAIT_TAIL] < 0:
            Z[WAIT_TAIL] = request
    Z[NUM_WAITING] += 1


@compiled
def peek_waiting(Z, ranked, by_rank):
    """Return the first request of the waiting queue."""
    if Z[PRIORITY]:
        return by_rank[ranked[0]]
    return Z[WAIT_HEAD]


@compiled
def drop_waiting(Z, R, ranked):
    """Remove the first request of the waiting queue."""
    if Z[PRIORITY]:
        heap_drop(ranked, Z[NUM_WAITING])
    else:
        after = R[Z[WAIT_HEAD], LINK]
        Z[WAIT_HEAD] = after
        if after < 0:
            Z[WAIT_TAIL] = -1
    Z[NUM_WAITING] -= 1


@compiled
def pend(Z, pending_key, pending, key, request):
    """Keep a released request until ``key``; equal keys in the order of release."""
    count = Z[PENDING_COUNT]
    Z[PENDING_COUNT] += 1
    i = Z[NUM_PENDING]
    Z[NUM_PENDING] += 1
    while i > 0:
        parent = (i - 1) >> 1
        if pending_key[parent] <= key:  # an equal key was released before
            break
        pending_key[i] = pending_key[parent]
        pending[i, 0] = pending[parent, 0]
        pending[i, 1] = pending[parent, 1]
        i = parent
    pending_key[i] = key
    pending[i, 0] = count
    pending[i, 1] = request


@compiled
def unpend(Z, pending_key, pending):
    """Remove and return the first pending request."""
    result = pending[0, 1]
    Z[NUM_PENDING] -= 1
    size = Z[NUM_PENDING]
    key, count, request = pending_key[size], pending[size, 0], pending[size, 1]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and (
            pending_key[child + 1] < pending_key[child]
            or (
                pending_key[child + 1] == pending_key[child]
                and pending[child + 1, 0] < pending[child, 0]
            )
        ):
            child += 1
        if key < pending_key[child] or (key == pending_key[child] and count < pending[child, 0]):
            break
        pending_key[i] = pending_key[child]
        pending[i, 0] = pending[child, 0]
        pending[i, 1] = pending[child, 1]
        i = child
    pending_key[i] = key
    pending[i, 0] = count
    pending[i, 1] = request
    return result


@compiled
def next_arrival_key(Z, arrival_key, pending_key):
    """Return when the next request arrives, inf if none is known."""
    key = float("inf")
    if Z[NEXT_ARRIVAL] < Z[NUM_ARRIVALS]:
        key = arrival_key[Z[NEXT_ARRIVAL]]
    if Z[NUM_PENDING] > 0 and pending_key[0] < key:
        key = pending_key[0]
    return key


@compiled
def admit_arrivals(
    Z, R, ranked, arrival_key, arrival_request, pending_key, pending, now
):
    """Move what has arrived by ``now`` to the waiting queue, in order of arrival."""
    while True:
        key = float("inf")
        if Z[NEXT_ARRIVAL] < Z[NUM_ARRIVALS]:
            key = arrival_key[Z[NEXT_ARRIVAL]]
        if Z[NUM_PENDING] > 0 and pending_key[0] < key:
            if pending_key[0] > now:
                break
            wait_last(Z, R, ranked, unpend(Z, pending_key, pending))
        else:
            if not key <= now:
                break
            wait_last(Z, R, ranked, arrival_request[Z[NEXT_ARRIVAL]])
            Z[NEXT_ARRIVAL] += 1
