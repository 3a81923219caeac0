"""KV blocks by identity, as prefix caching needs them: free list, hashes, reference counts.

The order in which vLLM hands out and forgets blocks decides what is found again, so it is kept to
the letter (vllm/v1/core/block_pool.py, kv_cache_utils.py): freed blocks without a hash go to the
front of the free list, those with one to its back; handing out a block forgets its hash; of blocks
with equal hashes the one that got it first is found.
"""

from __future__ import annotations

from samullm_plugin.core.engine.jit import compiled
from samullm_plugin.core.engine.layout import (
    BLOCK,
    BUCKET_AFTER,
    BUCKET_BEFORE,
    BUCKET_MASK,
    FREE_AFTER,
    FREE_BEFORE,
    FREE_BLOCKS,
    HASH,
    HASHED,
    PROMPT,
    REQUEST,
    USABLE,
    USERS,
)
from samullm_plugin.core.engine.prefixes import mix


@compiled
def fill_pool(Z, K, buckets):
    """Put all blocks but the null block 0 on the free list, in order."""
    end = Z[USABLE] + 1  # the list is a ring through this row
    for b in range(1, end + 1):
        K[b, FREE_AFTER] = b + 1
        K[b, FREE_BEFORE] = b - 1
    K[end, FREE_AFTER] = 1
    K[1, FREE_BEFORE] = end
    buckets[:] = -1


@compiled
def forget_hash(Z, K, buckets, b):
    """Remove block ``b`` from the cache."""
    h = K[b, HASH]
    if h != 0:
        before, after = K[b, BUCKET_BEFORE], K[b, BUCKET_AFTER]
        i = h & Z[BUCKET_MASK]
        if before >= 0:
            K[before, BUCKET_AFTER] = after
        else:
            buckets[i, 0] = after
        if after >= 0:
            K[after, BUCKET_BEFORE] = before
        else:
            buckets[i, 1] = before
        K[b, HASH] = 0


@compiled
def remember_hash(Z, K, buckets, b, h):
    """Enter block ``b`` into the cache under hash ``h``."""
    i = h & Z[BUCKET_MASK]
    last = buckets[i, 1]
    K[b, HASH] = h
    K[b, BUCKET_BEFORE] = last
    K[b, BUCKET_AFTER] = -1
    if last >= 0:
        K[last, BUCKET_AFTER] = b
    else:
        buckets[i, 0] = b
    buckets[i, 1] = b


@compiled
def find_hash(Z, K, buckets, h):
    """Return the block that got hash ``h`` first, or -1."""
    b = buckets[h & Z[BUCKET_MASK], 0]
    while b >= 0 and K[b, HASH] != h:
        b = K[b, BUCKET_AFTER]
    return b


@compiled
def take_block(Z, K, buckets):
    """Hand out the first free block."""
    end = Z[USABLE] + 1
    b = K[end, FREE_AFTER]
    after = K[b, FREE_AFTER]
    K[end, FREE_AFTER] = after
    K[after, FREE_BEFORE] = end
    Z[FREE_BLOCKS] -= 1
    forget_hash(Z, K, buckets, b)
    K[b, USERS] = 1
    return b


@compiled
def use_block(Z, K, b):
    """Let one more sequence use the cached block ``b``."""
    if K[b, USERS] == 0:
        before, after = K[b, FREE_BEFORE], K[b, FREE_AFTER]
        K[before, FREE_AFTER] = after
        K[after, FREE_BEFORE] = before
        Z[FREE_BLOCKS] -= 1
    K[b, USERS] += 1


@compiled
def give_back_blocks(Z, K, table, s, count):
    """Free the ``count`` blocks of seat ``s``, the last one first."""
    end = Z[USABLE] + 1
    front = end  # blocks without a hash go here one after the other
    for j in range(count - 1, -1, -1):
        b = table[s, j]
        K[b, USERS] -= 1
        if K[b, USERS] == 0:
            before = front if K[b, HASH] == 0 else K[end, FREE_BEFORE]
            after = K[before, FREE_AFTER]
            K[before, FREE_AFTER] = b
            K[b, FREE_BEFORE] = before
            K[b, FREE_AFTER] = after
            K[after, FREE_BEFORE] = b
            if K[b, HASH] == 0:
                front = b
            Z[FREE_BLOCKS] += 1


@compiled
def block_hash(Z, R, prompt_hash, prompt_at, request, j, before):
    """Return the hash of block ``j`` of ``request`` whose block ``j - 1`` has hash ``before``."""
    block = Z[BLOCK]
    full = R[request, PROMPT] // block
    if j < full:
        return prompt_hash[prompt_at[request, 0] + j]
    if j == full and R[request, PROMPT] % block:
        return mix(before, prompt_at[request, 1])
    return mix(before, 7)  # generated tokens only


@compiled
def remember_blocks(Z, R, S, K, buckets, table, prompt_hash, prompt_at, s, tokens):
    """Hash the blocks of seat ``s`` that its first ``tokens`` tokens fill."""
    full = tokens // Z[BLOCK]
    request = S[s, REQUEST]
    for j in range(S[s, HASHED], full):
        before = K[table[s, j - 1], HASH] if j > 0 else 0
        h = block_hash(Z, R, prompt_hash, prompt_at, request, j, before)
        remember_hash(Z, K, buckets, table[s, j], h)
        S[s, HASHED] = j + 1


@compiled
def find_prefix(Z, R, K, buckets, found, prompt_hash, prompt_at, request, tokens):
    """Find the cached blocks that begin ``request``, of which ``tokens`` tokens are known.

    Returns:
        Their number (they are left in ``found``), and how many of them no sequence uses.
    """
    limit = (tokens - 1) // Z[BLOCK]  # the last token is always computed
    h = 0
    unused = 0
    for j in range(limit):
        h = block_hash(Z, R, prompt_hash, prompt_at, request, j, h)
        b = find_hash(Z, K, buckets, h)
        if b < 0:
            return j, unused
        found[j] = b
        if K[b, USERS] == 0:
            unused += 1
    return max(limit, 0), unused
