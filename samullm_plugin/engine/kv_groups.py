"""Block tables of several KV cache groups that draw from one pool.

The rules are those of vllm/v1/core/single_type_kv_cache_manager.py and kv_cache_coordinator.py:
what a window or a chunk has left behind is freed before a sequence gets more; prefix caching finds
what all groups have in common. ``held`` has what each group holds of each running slot; the blocks
themselves are in ``group_table``, block 0 (the null block) where one was given up. The last slot of
both is for the request at hand that does not run yet.
"""

from __future__ import annotations

from typing import Any

from samullm_plugin.engine import records as at
from samullm_plugin.engine.jit import inner
from samullm_plugin.engine.kv_cache import (
    block_hash,
    blocks_for,
    find_hash,
    free_block,
    remember_hash,
    take_block,
    use_block,
)
from samullm_plugin.engine.prefixes import mix
from samullm_plugin.engine.records import Array, Record


@inner
def skipped_blocks(group: Record, computed: int) -> Any:
    """Return the blocks that no token after the first ``computed`` ones needs."""
    if group.kind == at.SLIDING_WINDOW:
        return max(0, computed - group.window_tokens + 1) // group.block_size
    if group.kind == at.CHUNKED_LOCAL:
        chunk = group.window_tokens
        return computed // chunk * chunk // group.block_size
    return 0


@inner
def drop_skipped(
    s: Record, blocks: Array, groups: Array, held: Array, group_table: Array, i: int, settled: int
) -> None:
    """Free what the first ``settled`` tokens of slot ``i`` have left behind."""
    for g in range(len(groups)):
        end = min(skipped_blocks(groups[g], settled), held[g, i].num_blocks)
        front = len(blocks) - 1
        for j in range(end - 1, -1, -1):
            b = group_table[g, i, j]
            if b == 0:
                break
            front = free_block(s, blocks, b, front)
            group_table[g, i, j] = 0


@inner
def blocks_to_grow(groups: Array, held: Array, i: int, tokens: int) -> Any:
    """Return the blocks that slot ``i`` needs in addition to hold ``tokens`` tokens."""
    needed = 0
    for g in range(len(groups)):
        needed += max(blocks_for(tokens, groups[g].block_size) - held[g, i].num_blocks, 0)
    return needed


@inner
def blocks_to_start(
    blocks: Array, groups: Array, held: Array, group_table: Array, computed: int, tokens: int,
    capped: bool,
) -> Any:  # fmt: skip
    """Return the blocks that the request at hand needs to start with ``computed`` cached tokens.

    Args:
        blocks: KV blocks.
        groups: KV cache groups.
        held: cached blocks found, in its last slot.
        group_table: the same.
        computed: cached tokens.
        tokens: tokens that must find room.
        capped: by what a sequence holds at most at one time.
    """
    spare = held.shape[1] - 1
    needed = 0
    for g in range(len(groups)):
        required = blocks_for(tokens, groups[g].block_size)
        if capped:
            required = min(required, groups[g].most_blocks)
        skipped = skipped_blocks(groups[g], computed)
        hits = held[g, spare].num_blocks
        needed += max(required - max(skipped, hits), 0)
        for j in range(skipped, hits):
            b = group_table[g, spare, j]
            if b != 0 and blocks[b].ref_cnt == 0:
                needed += 1
    return needed


@inner
def adopt_hits(
    s: Record, blocks: Array, groups: Array, held: Array, group_table: Array, i: int, computed: int
) -> None:
    """Let slot ``i`` begin with the cached blocks that were found."""
    spare = held.shape[1] - 1
    for g in range(len(groups)):
        skipped = skipped_blocks(groups[g], computed)
        hits = held[g, spare].num_blocks
        for j in range(hits):
            b = group_table[g, spare, j] if j >= skipped else 0
            group_table[g, i, j] = b
            if b != 0:
                use_block(s, blocks, b)
        held[g, i].num_blocks = hits
        held[g, i].num_cached = hits


@inner
def grow(
    s: Record, blocks: Array, buckets: Array, groups: Array, held: Array, group_table: Array,
    i: int, tokens: int,
) -> None:  # fmt: skip
    """Give slot ``i`` blocks for ``tokens`` tokens."""
    for g in range(len(groups)):
        end = blocks_for(tokens, groups[g].block_size)
        for j in range(held[g, i].num_blocks, end):
            group_table[g, i, j] = take_block(s, blocks, buckets)
        held[g, i].num_blocks = max(held[g, i].num_blocks, end)


@inner
def give_up(
    s: Record, blocks: Array, groups: Array, held: Array, group_table: Array, i: int
) -> None:
    """Free all blocks of slot ``i``, group by group, the last one first."""
    for g in range(len(groups)):
        front = len(blocks) - 1
        for j in range(held[g, i].num_blocks - 1, -1, -1):
            b = group_table[g, i, j]
            if b != 0:
                front = free_block(s, blocks, b, front)
        held[g, i].num_blocks = 0
        held[g, i].num_cached = 0


@inner
def extend_chain(
    s: Record, requests: Array, prompt_hash: Array, chain: Array, i: int, request: int, tokens: int
) -> None:
    """Hash the first ``tokens`` tokens of ``request`` into row ``i``; entry 0 counts the hashes."""
    done, end = chain[i, 0], tokens // s.block_size
    h = chain[i, done] if done > 0 else 0
    for j in range(done, end):
        h = block_hash(s, requests, prompt_hash, request, j, h)
        chain[i, j + 1] = h
    chain[i, 0] = max(done, end)


@inner
def is_reachable(s: Record, group: Record, j: int) -> Any:
    """Return whether block ``j`` can ever be part of a hit: hits end at multiples of all sizes."""
    if group.kind != at.SLIDING_WINDOW:
        return True
    per_segment = s.hit_alignment // group.block_size
    need = blocks_for(group.window_tokens - 1, group.block_size)
    return need >= per_segment or j % per_segment >= per_segment - need


@inner
def cache_tokens(
    s: Record, requests: Array, slots: Array, blocks: Array, buckets: Array, groups: Array,
    held: Array, group_table: Array, chain: Array, prompt_hash: Array, i: int, tokens: int,
) -> None:  # fmt: skip
    """Enter the blocks of slot ``i`` that its first ``tokens`` tokens fill into the cache."""
    if len(groups) > 1:
        tokens -= tokens % s.hit_alignment
    extend_chain(s, requests, prompt_hash, chain, i, slots[i].request, tokens)
    for g in range(len(groups)):
        size = groups[g].block_size
        full = tokens // size
        for j in range(held[g, i].num_cached, full):
            b = group_table[g, i, j]
            if b != 0 and is_reachable(s, groups[g], j):
                h = chain[i, (j + 1) * size // s.block_size]
                remember_hash(blocks, buckets, b, mix(h, g + 1))
        held[g, i].num_cached = max(held[g, i].num_cached, full)


@inner
def look_up(
    s: Record, blocks: Array, buckets: Array, groups: Array, group_table: Array, chain: Array,
    spec: int, j: int,
) -> Any:  # fmt: skip
    """Look block ``j`` up in every group of one kind; return whether all have it."""
    spare = group_table.shape[1] - 1
    for g in range(len(groups)):
        if groups[g].spec != spec:
            continue
        h = chain[spare, (j + 1) * groups[g].block_size // s.block_size]
        b = find_hash(blocks, buckets, mix(h, g + 1))
        if b < 0:
            return False
        group_table[g, spare, j] = b
    return True


@inner
def find_in_groups(
    s: Record, blocks: Array, buckets: Array, groups: Array, group_table: Array, chain: Array,
    spec: int, first: int, longest: int,
) -> Any:  # fmt: skip
    """Return the blocks of the longest hit of at most ``longest`` tokens in groups of one kind.

    Args:
        s: the state.
        blocks: KV blocks.
        buckets: of their hashes.
        groups: KV cache groups.
        group_table: the blocks found are left in its last slot.
        chain: hashes of the request at hand, in its last row.
        spec: the kind.
        first: a group of it.
        longest: tokens.
    """
    kind, size = groups[first].kind, groups[first].block_size
    spare = group_table.shape[1] - 1
    count = longest // size
    if kind == at.SLIDING_WINDOW:
        need = blocks_for(groups[first].window_tokens - 1, size)
        run = 0
        for j in range(count - 1, -1, -1):
            if not look_up(s, blocks, buckets, groups, group_table, chain, spec, j):
                run = 0
                continue
            if run == 0 and (j + 1) * size % s.hit_alignment != 0:
                continue
            run += 1
            if run >= need:
                for g in range(len(groups)):
                    if groups[g].spec == spec:
                        group_table[g, spare, :j] = 0
                return j + run
        while run * size % s.hit_alignment != 0:
            run -= 1
        return run
    begin = 0
    if kind == at.CHUNKED_LOCAL:
        chunk = groups[first].window_tokens
        begin = longest // chunk * chunk // size
        for g in range(len(groups)):
            if groups[g].spec == spec:
                group_table[g, spare, :begin] = 0
    hits = begin
    while hits < count and look_up(s, blocks, buckets, groups, group_table, chain, spec, hits):
        hits += 1
    if kind == at.FULL:
        while hits * size % s.hit_alignment != 0:
            hits -= 1
    return hits


@inner
def find_common_prefix(
    s: Record, requests: Array, blocks: Array, buckets: Array, groups: Array, held: Array,
    group_table: Array, chain: Array, prompt_hash: Array, request: int, tokens: int,
) -> Any:  # fmt: skip
    """Find the cached tokens that all groups have of ``request``, and leave their blocks.

    Every kind accepts the length so far or shortens it, until none does. Of full attention what is
    shorter is a hit as well, so it is looked up once.
    """
    spare = held.shape[1] - 1
    chain[spare, 0] = 0
    extend_chain(s, requests, prompt_hash, chain, spare, request, tokens)
    hit = tokens - 1  # the last token is always computed
    for g in range(len(groups)):
        held[g, spare].num_cached = -1
    while True:
        length = hit
        for spec in range(s.num_specs):
            first = 0
            while groups[first].spec != spec:
                first += 1
            size = groups[first].block_size
            if groups[first].kind == at.FULL and held[first, spare].num_cached >= 0:
                length = min(length, held[first, spare].num_cached * size)
                continue
            found = find_in_groups(
                s, blocks, buckets, groups, group_table, chain, spec, first, length
            )
            length = found * size
            for g in range(len(groups)):
                if groups[g].spec == spec:
                    held[g, spare].num_blocks = found
                    held[g, spare].num_cached = found
        if length >= hit:
            break
        hit = length
        if s.is_simple_hybrid:
            break
    for g in range(len(groups)):
        if groups[g].kind == at.FULL:
            held[g, spare].num_blocks = min(
                held[g, spare].num_blocks, blocks_for(hit, groups[g].block_size)
            )
    return hit
