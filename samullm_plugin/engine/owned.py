"""Prefix caching where no two requests have a block in common.

Then a request can find again only blocks of its own, after a preemption, and it does not matter
which block is which. Free blocks without a hash are handed out first, then those with one, the
longest unused first; of one request's the last ones first, as vLLM frees them in reverse. What is
left of a request's cached blocks is therefore always a prefix: a number is enough.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.arrays import Array
from samullm_plugin.engine.jit import compiled


@compiled
def take_blocks(z: Array, requests: Array, count: int) -> None:
    """Hand out ``count`` free blocks whose identity does not matter."""
    z[at.FREE_BLOCKS] -= count
    if z[at.CACHING] != at.OWN_BLOCKS:
        return
    plain = min(count, z[at.PLAIN_BLOCKS])
    z[at.PLAIN_BLOCKS] -= plain
    count -= plain
    while count > 0:
        request = z[at.OLDEST]
        n = min(count, requests[request, at.KEPT])
        requests[request, at.KEPT] -= n
        count -= n
        if requests[request, at.KEPT] == 0:
            unlink_kept(z, requests, request)


@compiled
def unlink_kept(z: Array, requests: Array, request: int) -> None:
    """Take ``request`` out of the list of those with cached free blocks."""
    before, after = requests[request, at.KEPT_BEFORE], requests[request, at.KEPT_AFTER]
    if before >= 0:
        requests[before, at.KEPT_AFTER] = after
    else:
        z[at.OLDEST] = after
    if after >= 0:
        requests[after, at.KEPT_BEFORE] = before
    else:
        z[at.NEWEST] = before


@compiled
def keep_blocks(z: Array, requests: Array, request: int, count: int, hashed: int) -> None:
    """Free ``count`` blocks of ``request``, the first ``hashed`` of which stay in the cache."""
    z[at.FREE_BLOCKS] += count
    z[at.PLAIN_BLOCKS] += count - hashed
    if hashed > 0:
        requests[request, at.KEPT] = hashed
        newest = z[at.NEWEST]
        requests[request, at.KEPT_BEFORE] = newest
        requests[request, at.KEPT_AFTER] = -1
        if newest >= 0:
            requests[newest, at.KEPT_AFTER] = request
        else:
            z[at.OLDEST] = request
        z[at.NEWEST] = request


@compiled
def reuse_blocks(z: Array, requests: Array, request: int) -> None:
    """Take the cached blocks of ``request`` into use again."""
    if requests[request, at.KEPT] > 0:
        z[at.FREE_BLOCKS] -= requests[request, at.KEPT]
        requests[request, at.KEPT] = 0
        unlink_kept(z, requests, request)


@compiled
def hashed_blocks(z: Array, seats: Array, s: int, computed: int, extra: int) -> Any:
    """Return how many blocks of seat ``s`` have a hash.

    Args:
        z: whole numbers.
        seats: running sequences.
        s: the seat.
        computed: its computed tokens.
        extra: tokens scheduled in the step at hand.
    """
    known = computed + extra
    decoded = seats[s, at.STATE] == at.DECODE or seats[s, at.STATE] == at.FINISHING
    if z[at.ASYNC] and decoded:
        known -= 1  # when the last token was scheduled, it was not known yet
    return max(seats[s, at.HASHED], known // z[at.BLOCK])
