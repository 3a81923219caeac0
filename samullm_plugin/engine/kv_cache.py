"""KV blocks: whose they are, and what prefix caching finds again.

With prefix caching, the order in which vLLM hands out and forgets blocks decides what is found
again, so it is kept to the letter (vllm/v1/core/block_pool.py, kv_cache_utils.py): freed blocks
without a hash go to the front of the free list, those with one to its back; handing out a block
forgets its hash; of blocks with equal hashes the one that got it first is found.

Where no two requests have a block in common, a request can find again only blocks of its own, after
a preemption, and it does not matter which block is which (``PRIVATE_BLOCKS``). Free blocks without
a hash are handed out first, then those with one, the longest unused first; of one request's the
last ones first, as vLLM frees them in reverse. What is left of a request's cached blocks is
therefore always a prefix: a number is enough.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import records as at
from samullm_plugin.engine.jit import compiled, inner
from samullm_plugin.engine.prefixes import GENERATED, mix
from samullm_plugin.engine.records import Array, Record


@inner
def blocks_for(tokens: int, block: int) -> Any:
    """Return the blocks that hold ``tokens`` tokens."""
    return (tokens + block - 1) // block


@compiled
def fill_pool(blocks: Array) -> None:
    """Put all blocks but the null block 0 on the free list, in order."""
    end = len(blocks) - 1
    for b in range(1, end + 1):
        blocks[b].free_after = b + 1
        blocks[b].free_before = b - 1
    blocks[end].free_after = 1
    blocks[1].free_before = end


@inner
def forget_hash(blocks: Array, buckets: Array, b: int) -> None:
    """Remove block ``b`` from the cache."""
    h = blocks[b].hash
    if h != 0:
        before, after = blocks[b].bucket_before, blocks[b].bucket_after
        if before >= 0:
            blocks[before].bucket_after = after
        else:
            buckets[h & (len(buckets) - 1)] = after
        if after >= 0:
            blocks[after].bucket_before = before
        blocks[b].hash = 0


@inner
def remember_hash(blocks: Array, buckets: Array, b: int, h: int) -> None:
    """Enter block ``b`` into the cache under hash ``h``, as the last of its bucket."""
    i = h & (len(buckets) - 1)
    last = -1
    after = buckets[i]
    while after >= 0:
        last = after
        after = blocks[after].bucket_after
    if last >= 0:
        blocks[last].bucket_after = b
    else:
        buckets[i] = b
    blocks[b].bucket_before = last
    blocks[b].bucket_after = -1
    blocks[b].hash = h


@inner
def find_hash(blocks: Array, buckets: Array, h: int) -> Any:
    """Return the block that got hash ``h`` first, or -1."""
    b = buckets[h & (len(buckets) - 1)]
    while b >= 0 and blocks[b].hash != h:
        b = blocks[b].bucket_after
    return b


@inner
def take_block(s: Record, blocks: Array, buckets: Array) -> Any:
    """Hand out the first free block."""
    end = len(blocks) - 1
    b = blocks[end].free_after
    after = blocks[b].free_after
    blocks[end].free_after = after
    blocks[after].free_before = end
    s.free_blocks -= 1
    forget_hash(blocks, buckets, b)
    blocks[b].ref_cnt = 1
    return b


@inner
def use_block(s: Record, blocks: Array, b: int) -> None:
    """Let one more sequence use the cached block ``b``."""
    if blocks[b].ref_cnt == 0:
        before, after = blocks[b].free_before, blocks[b].free_after
        blocks[before].free_after = after
        blocks[after].free_before = before
        s.free_blocks -= 1
    blocks[b].ref_cnt += 1


@inner
def free_block(s: Record, blocks: Array, b: int, front: int) -> Any:
    """Let one sequence less use block ``b``; return after which block the next unhashed one goes.

    Args:
        s: the state.
        blocks: KV blocks.
        b: the block.
        front: where an unhashed one goes: blocks freed together keep their order at the front of
            the free list; the last row for the first of them.
    """
    blocks[b].ref_cnt -= 1
    if blocks[b].ref_cnt > 0:
        return front
    end = len(blocks) - 1
    hashed = blocks[b].hash != 0
    before = blocks[end].free_before if hashed else front
    after = blocks[before].free_after
    blocks[before].free_after = b
    blocks[b].free_before = before
    blocks[b].free_after = after
    blocks[after].free_before = b
    s.free_blocks += 1
    return front if hashed else b


@inner
def give_back_blocks(s: Record, blocks: Array, table: Array, i: int, count: int) -> None:
    """Free the ``count`` blocks of slot ``i``, the last one first."""
    front = len(blocks) - 1
    for j in range(count - 1, -1, -1):
        front = free_block(s, blocks, table[i, j], front)


@inner
def block_hash(
    s: Record, requests: Array, prompt_hash: Array, request: int, j: int, before: int
) -> Any:
    """Return the hash of block ``j`` of ``request`` whose block ``j - 1`` has hash ``before``."""
    tokens = requests[request].prompt_tokens - j * s.block_size
    if tokens >= s.block_size:
        return prompt_hash[requests[request].first_hash + j]
    return mix(before, requests[request].tail_hash if tokens > 0 else GENERATED)


@inner
def remember_blocks(
    s: Record,
    requests: Array,
    slots: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    i: int,
    tokens: int,
) -> None:
    """Hash the blocks of slot ``i`` that its first ``tokens`` tokens fill."""
    full = tokens // s.block_size
    j = slots[i].hashed_blocks
    if j >= full:
        return
    slots[i].hashed_blocks = full
    if s.caching == at.PRIVATE_BLOCKS:
        return
    request = slots[i].request
    h = blocks[table[i, j - 1]].hash if j > 0 else 0
    while j < full:
        h = block_hash(s, requests, prompt_hash, request, j, h)
        remember_hash(blocks, buckets, table[i, j], h)
        j += 1


@inner
def find_prefix(
    s: Record,
    requests: Array,
    blocks: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    request: int,
    tokens: int,
) -> tuple[int, int]:
    """Find the cached blocks that begin ``request``, of which ``tokens`` tokens are known.

    Returns:
        Their number, and how many of them no sequence uses. They are left in the last row of
        ``table``.
    """
    limit = (tokens - 1) // s.block_size  # the last token is always computed
    h = 0
    unused = 0
    for j in range(limit):
        h = block_hash(s, requests, prompt_hash, request, j, h)
        b = find_hash(blocks, buckets, h)
        if b < 0:
            return j, unused
        table[len(table) - 1, j] = b
        if blocks[b].ref_cnt == 0:
            unused += 1
    return limit, unused


@inner
def take_blocks(s: Record, requests: Array, count: int) -> None:
    """Hand out ``count`` free blocks whose identity does not matter."""
    s.free_blocks -= count
    if s.caching != at.PRIVATE_BLOCKS:
        return
    plain = min(count, s.unhashed_free_blocks)
    s.unhashed_free_blocks -= plain
    count -= plain
    while count > 0:
        request = s.oldest_kept
        n = min(count, requests[request].kept_blocks)
        requests[request].kept_blocks -= n
        count -= n
        if requests[request].kept_blocks == 0:
            unlink_kept(s, requests, request)


@inner
def unlink_kept(s: Record, requests: Array, request: int) -> None:
    """Take ``request`` out of the list of those with cached free blocks."""
    before, after = requests[request].kept_before, requests[request].kept_after
    if before >= 0:
        requests[before].kept_after = after
    else:
        s.oldest_kept = after
    if after >= 0:
        requests[after].kept_before = before
    else:
        s.newest_kept = before


@inner
def keep_blocks(s: Record, requests: Array, request: int, count: int, hashed: int) -> None:
    """Free ``count`` blocks of ``request``, the first ``hashed`` of which stay in the cache."""
    s.free_blocks += count
    s.unhashed_free_blocks += count - hashed
    if hashed > 0:
        requests[request].kept_blocks = hashed
        newest = s.newest_kept
        requests[request].kept_before = newest
        requests[request].kept_after = -1
        if newest >= 0:
            requests[newest].kept_after = request
        else:
            s.oldest_kept = request
        s.newest_kept = request


@inner
def reuse_blocks(s: Record, requests: Array, request: int) -> None:
    """Take the cached blocks of ``request`` into use again."""
    if requests[request].kept_blocks > 0:
        s.free_blocks -= requests[request].kept_blocks
        requests[request].kept_blocks = 0
        unlink_kept(s, requests, request)


@inner
def hashed_blocks(s: Record, slots: Array, i: int, computed: int, extra: int) -> Any:
    """Return how many blocks of slot ``i`` have a hash.

    Args:
        s: the state.
        slots: running sequences.
        i: the slot.
        computed: its computed tokens.
        extra: tokens scheduled in the step at hand.
    """
    known = computed + extra
    decoded = slots[i].state == at.DECODE or slots[i].state == at.FINISHING
    if s.async_scheduling and decoded:
        known -= 1  # when the last token was scheduled, it was not known yet
    return max(slots[i].hashed_blocks, known // s.block_size)


@inner
def release_blocks(
    s: Record,
    requests: Array,
    slots: Array,
    blocks: Array,
    table: Array,
    i: int,
    computed: int,
    extra: int,
) -> None:
    """Free the blocks of slot ``i``: of computed tokens, and of ``extra`` ones of this step."""
    count = blocks_for(computed + extra, s.block_size)
    if s.caching == at.SHARED_BLOCKS:
        give_back_blocks(s, blocks, table, i, count)
    elif s.caching == at.PRIVATE_BLOCKS:
        hashed = hashed_blocks(s, slots, i, computed, extra)
        keep_blocks(s, requests, slots[i].request, count, hashed)
    else:
        s.free_blocks += count
