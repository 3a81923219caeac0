"""Fingerprints of prompt blocks, chained over the whole prefix, for prefix caching."""

from __future__ import annotations

from typing import Any

import numpy as np

from samullm_plugin.engine.jit import compiled, inner
from samullm_plugin.engine.records import Array

GENERATED = 7
"""Id of every generated token, and by agreement the hash of a block of nothing else."""


@inner
def mix(before: Any, value: Any) -> Any:
    """Return a 62-bit hash, never 0, of a chain ``before`` continued by ``value``."""
    x = np.uint64(before) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(value)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.int64(x >> np.uint64(2)) | np.int64(1 << 61)


@compiled
def hash_token_ids(requests: Array, token_ids: Array, block: int, prompt_hash: Array) -> None:
    """Fill in the hashes of prompts given by token ids.

    Args:
        requests: lengths, and where the hashes of each prompt go; ``TAIL_HASH`` is filled in.
        token_ids: all prompts one after the other.
        block: block size.
        prompt_hash: result, chained hashes of full prompt blocks.
    """
    generated = np.int64(0)
    for _ in range(block):
        generated = mix(generated, GENERATED)
    p = 0
    for r in range(len(requests)):
        end = p + requests[r].prompt_tokens
        start = requests[r].first_hash
        h = np.int64(0)
        for j in range(start, start + requests[r].prompt_tokens // block):
            content = np.int64(0)
            for _ in range(block):
                content = mix(content, token_ids[p])
                p += 1
            h = mix(h, GENERATED if content == generated else content)
            prompt_hash[j] = h
        content = np.int64(0)
        left = block
        while p < end:
            content = mix(content, token_ids[p])
            p += 1
            left -= 1
        for _ in range(left):
            content = mix(content, GENERATED)
        requests[r].tail_hash = GENERATED if content == generated else content


@compiled
def hash_prefixes(
    requests: Array, prefix_id: Array, prefix_tokens: Array, block: int, prompt_hash: Array
) -> None:
    """Fill in the hashes of prompts of which only the shared prefix is known.

    Requests of equal ``prefix_id`` (not -1) share their first ``prefix_tokens`` tokens; all others
    differ between any two requests.
    """
    for r in range(len(requests)):
        prompt = requests[r].prompt_tokens
        start = requests[r].first_hash
        full = prompt // block
        shared = prefix_tokens[r] if prefix_id[r] >= 0 else 0
        both = min(shared // block, full)
        h = np.int64(0)
        for j in range(both):
            h = mix(h, mix(2 * prefix_id[r], j))
            prompt_hash[start + j] = h
        own = mix(h, mix(1, r))  # no number that stands for something else, such as GENERATED
        for j in range(both, full):
            prompt_hash[start + j] = mix(own, j)
        tail = own
        if shared >= prompt:
            tail = mix(mix(2 * prefix_id[r], full), prompt - full * block)
        requests[r].tail_hash = tail


@compiled
def first_block_hashes(requests: Array, prompt_hash: Array, block: int, result: Array) -> None:
    """Fill in the hash of each request's first block, which generated tokens may complete."""
    for r in range(len(requests)):
        if requests[r].prompt_tokens >= block:
            result[r] = prompt_hash[requests[r].first_hash]
        else:
            result[r] = mix(np.int64(0), requests[r].tail_hash)
