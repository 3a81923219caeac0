"""Fingerprints of prompt blocks, chained over the whole prefix, for prefix caching."""

from __future__ import annotations

import numpy as np

from samullm_plugin.core.engine.jit import compiled


@compiled
def mix(before, value):
    """Return a 62-bit hash, never 0, of a chain ``before`` continued by ``value``."""
    x = np.uint64(before) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(value)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.int64(x >> np.uint64(2)) | np.int64(1 << 61)


@compiled
def hash_token_ids(token_ids, token_start, block, prompt_hash, prompt_at):
    """Fill in the hashes of prompts given by token ids.

    Args:
        token_ids: all prompts one after the other.
        token_start: where each begins, shape ``(n + 1,)``.
        block: block size.
        prompt_hash: result, chained hashes of full prompt blocks.
        prompt_at: shape ``(n, 2)``: where the full blocks of each request begin in
            ``prompt_hash``, and, as a result, the hash of the block that holds the end of its
            prompt, filled up with generated tokens (id 7).
    """
    generated = np.int64(0)  # the hash of a block's tokens, all generated
    for _ in range(block):
        generated = mix(generated, 7)
    for r in range(len(prompt_at)):
        p, end = token_start[r], token_start[r + 1]
        h = np.int64(0)
        for j in range(prompt_at[r, 0], prompt_at[r, 0] + (end - p) // block):
            content = np.int64(0)
            for _ in range(block):
                content = mix(content, token_ids[p])
                p += 1
            h = mix(h, 7 if content == generated else content)
            prompt_hash[j] = h
        content = np.int64(0)
        left = block
        while p < end:
            content = mix(content, token_ids[p])
            p += 1
            left -= 1
        for _ in range(left):
            content = mix(content, 7)
        prompt_at[r, 1] = 7 if content == generated else content


@compiled
def hash_prefixes(prompt, prefix_id, prefix_tokens, block, prompt_hash, prompt_at):
    """Fill in the hashes of prompts of which only the shared prefix is known.

    Requests of equal ``prefix_id`` (not -1) share their first ``prefix_tokens`` tokens; all others
    differ between any two requests.
    """
    for r in range(len(prompt)):
        h = np.int64(0)
        shared = prefix_tokens[r] if prefix_id[r] >= 0 else 0
        blocks = prompt[r] // block
        for j in range(blocks + 1):
            tokens = block if j < blocks else prompt[r] - blocks * block
            if j * block + tokens <= shared:
                content = mix(mix(2 * prefix_id[r], j), tokens)
            else:
                content = mix(mix(2 * r + 1, j), tokens)
            if j < blocks:
                h = mix(h, content)
                prompt_hash[prompt_at[r, 0] + j] = h
            else:
                prompt_at[r, 1] = content
