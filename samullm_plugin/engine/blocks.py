"""KV blocks by identity, as prefix caching needs them: free list, hashes, reference counts.

The order in which vLLM hands out and forgets blocks decides what is found again, so it is kept to
the letter (vllm/v1/core/block_pool.py, kv_cache_utils.py): freed blocks without a hash go to the
front of the free list, those with one to its back; handing out a block forgets its hash; of blocks
with equal hashes the one that got it first is found.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import layout as at
from samullm_plugin.engine.arrays import Array
from samullm_plugin.engine.jit import compiled
from samullm_plugin.engine.prefixes import GENERATED, mix


@compiled
def fill_pool(kv: Array) -> None:
    """Put all blocks but the null block 0 on the free list, in order."""
    end = len(kv) - 1
    for b in range(1, end + 1):
        kv[b, at.FREE_AFTER] = b + 1
        kv[b, at.FREE_BEFORE] = b - 1
    kv[end, at.FREE_AFTER] = 1
    kv[1, at.FREE_BEFORE] = end


@compiled
def forget_hash(kv: Array, hashes: Array, buckets: Array, b: int) -> None:
    """Remove block ``b`` from the cache."""
    h = hashes[b]
    if h != 0:
        before, after = kv[b, at.BUCKET_BEFORE], kv[b, at.BUCKET_AFTER]
        if before >= 0:
            kv[before, at.BUCKET_AFTER] = after
        else:
            buckets[h & (len(buckets) - 1)] = after
        if after >= 0:
            kv[after, at.BUCKET_BEFORE] = before
        hashes[b] = 0


@compiled
def remember_hash(kv: Array, hashes: Array, buckets: Array, b: int, h: int) -> None:
    """Enter block ``b`` into the cache under hash ``h``, as the last of its bucket."""
    i = h & (len(buckets) - 1)
    last = -1
    after = buckets[i]
    while after >= 0:
        last = after
        after = kv[after, at.BUCKET_AFTER]
    if last >= 0:
        kv[last, at.BUCKET_AFTER] = b
    else:
        buckets[i] = b
    kv[b, at.BUCKET_BEFORE] = last
    kv[b, at.BUCKET_AFTER] = -1
    hashes[b] = h


@compiled
def find_hash(kv: Array, hashes: Array, buckets: Array, h: int) -> Any:
    """Return the block that got hash ``h`` first, or -1."""
    b = buckets[h & (len(buckets) - 1)]
    while b >= 0 and hashes[b] != h:
        b = kv[b, at.BUCKET_AFTER]
    return b


@compiled
def take_block(z: Array, kv: Array, hashes: Array, buckets: Array) -> Any:
    """Hand out the first free block."""
    end = len(kv) - 1
    b = kv[end, at.FREE_AFTER]
    after = kv[b, at.FREE_AFTER]
    kv[end, at.FREE_AFTER] = after
    kv[after, at.FREE_BEFORE] = end
    z[at.FREE_BLOCKS] -= 1
    forget_hash(kv, hashes, buckets, b)
    kv[b, at.USERS] = 1
    return b


@compiled
def use_block(z: Array, kv: Array, b: int) -> None:
    """Let one more sequence use the cached block ``b``."""
    if kv[b, at.USERS] == 0:
        before, after = kv[b, at.FREE_BEFORE], kv[b, at.FREE_AFTER]
        kv[before, at.FREE_AFTER] = after
        kv[after, at.FREE_BEFORE] = before
        z[at.FREE_BLOCKS] -= 1
    kv[b, at.USERS] += 1


@compiled
def give_back_blocks(z: Array, kv: Array, hashes: Array, table: Array, s: int, count: int) -> None:
    """Free the ``count`` blocks of seat ``s``, the last one first."""
    end = len(kv) - 1
    front = end  # blocks without a hash go here one after the other
    for j in range(count - 1, -1, -1):
        b = table[s, j]
        kv[b, at.USERS] -= 1
        if kv[b, at.USERS] > 0:
            continue
        hashed = hashes[b] != 0
        before = kv[end, at.FREE_BEFORE] if hashed else front
        after = kv[before, at.FREE_AFTER]
        kv[before, at.FREE_AFTER] = b
        kv[b, at.FREE_BEFORE] = before
        kv[b, at.FREE_AFTER] = after
        kv[after, at.FREE_BEFORE] = b
        if not hashed:
            front = b
        z[at.FREE_BLOCKS] += 1


@compiled
def block_hash(
    z: Array, requests: Array, prompt_hash: Array, request: int, j: int, before: int
) -> Any:
    """Return the hash of block ``j`` of ``request`` whose block ``j - 1`` has hash ``before``."""
    tokens = requests[request, at.PROMPT] - j * z[at.BLOCK]
    if tokens >= z[at.BLOCK]:
        return prompt_hash[requests[request, at.HASHES_FROM] + j]
    return mix(before, requests[request, at.TAIL_HASH] if tokens > 0 else GENERATED)


@compiled
def remember_blocks(
    z: Array,
    requests: Array,
    seats: Array,
    kv: Array,
    hashes: Array,
    buckets: Array,
    table: Array,
    prompt_hash: Array,
    s: int,
    tokens: int,
) -> None:
    """Hash the blocks of seat ``s`` that its first ``tokens`` tokens fill."""
    full = tokens // z[at.BLOCK]
    j = seats[s, at.HASHED]
    if j >= full:
        return
    seats[s, at.HASHED] = full
    if z[at.CACHING] == at.OWN_BLOCKS:
        return
    request = seats[s, at.REQUEST]
    h = hashes[table[s, j - 1]] if j > 0 else 0
    while j < full:
        h = block_hash(z, requests, prompt_hash, request, j, h)
        remember_hash(kv, hashes, buckets, table[s, j], h)
        j += 1


@compiled
def find_prefix(
    z: Array,
    requests: Array,
    kv: Array,
    hashes: Array,
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
    limit = (tokens - 1) // z[at.BLOCK]  # the last token is always computed
    h = 0
    unused = 0
    for j in range(limit):
        h = block_hash(z, requests, prompt_hash, request, j, h)
        b = find_hash(kv, hashes, buckets, h)
        if b < 0:
            return j, unused
        table[len(table) - 1, j] = b
        if kv[b, at.USERS] == 0:
            unused += 1
    return limit, unused
