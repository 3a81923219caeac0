"""Which requests to give an engine so that few iterations determine the latency of any.

One iteration per setting would take an engine to each of them. Instead each workload sweeps a line
through them: requests of different output lengths leave group by group, so that a single run
decodes batches of every size at growing context; prompts of different lengths that arrive together
are prefilled in chunks of the whole token budget and of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

_RUNGS = 10
"""Batch sizes of a ladder."""

_HOLD = 12
"""Iterations of a ladder at each batch size: whoever leaves costs the next iteration something, and
in real runs few iterations follow a leaving."""

_SWEPT = 256
"""Most batch sizes that the warm-up goes through."""

_LADDER_BUDGETS = 8
"""Most prompt tokens of a ladder, in budgets of an iteration: long contexts take long to build."""


@dataclass(frozen=True, slots=True)
class ProbeWorkload:
    """Requests that are submitted together.

    Attributes:
        prompt_tokens: of each.
        output_tokens: of each.
        shape: ``uniform``, or ``skew`` where one sequence is far longer than the rest.
    """

    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    shape: str = "uniform"

    def longer(self, tokens: int) -> ProbeWorkload:
        """Return the workload with so many tokens more in every prompt."""
        return replace(self, prompt_tokens=tuple(p + tokens for p in self.prompt_tokens))


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine takes.

    Attributes:
        max_num_seqs: sequences at once.
        max_num_batched_tokens: tokens of an iteration.
        max_model_len: longest sequence.
        kv_cache_tokens: of all sequences.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_cache_tokens: int

    @property
    def longest(self) -> int:
        """Return the longest prompt plus output that a workload may have."""
        return self.max_model_len - 8

    def most(self, length: int) -> int:
        """Return how many sequences of a length fit at once."""
        return max(1, min(self.max_num_seqs, self.kv_cache_tokens // (length + 64)))


def warm_up(limits: Limits) -> ProbeWorkload:
    """Return a workload that meets everything once: a full batch, and then every batch size.

    The first batch of a kind may compile or allocate something; the first of a size generates
    kernels for it on a CPU.
    """
    budget = max(1, min(limits.max_num_batched_tokens, limits.longest // 2))
    prompt = min(16, budget)
    count = limits.most(2 * prompt + min(limits.max_num_seqs, _SWEPT))
    step = -(-count // _SWEPT)
    room = max(1, limits.longest - budget)
    outputs = tuple(min(1 + k // step, room) for k in range(count))
    return ProbeWorkload((budget, *[prompt] * (count - 1)), outputs)


def probes(limits: Limits, variant: int = 0) -> list[ProbeWorkload]:
    """Return the workloads to measure.

    Args:
        limits: what the engine takes.
        variant: prompts differ by a few tokens from variant to variant, as prompts do: a number of
            tokens that was computed before can be faster than one that was not.
    """
    longest, budget = limits.longest, min(limits.max_num_batched_tokens, limits.longest)

    def about(tokens: float, less: int = variant) -> int:
        return max(1, int(tokens) - less)

    result = [_ladder(limits, about(n)) for n in (16 + 2 * variant, longest // 8, longest // 3)]
    lengths = sorted({int(budget * share) for share in (1, 0.5, 0.25, 0.1, 0.04, 0.01)})
    result += [ProbeWorkload((about(n, 2 * variant + k),), (1,)) for n in lengths for k in (0, 1)]
    part = about(budget // 4)
    many = min(limits.most(part), 8)
    result.append(ProbeWorkload((part,) * many, (2,) * many))
    # Short ones decode while a long prompt is still being prefilled.
    few = min(limits.max_num_seqs - 1, 8)
    if few > 0 and longest > 48:
        prompts = (8,) * few + (about(longest - 40),)
        result.append(ProbeWorkload(prompts, (24,) * (few + 1), shape="skew"))
    result.append(_stream(limits, variant))
    return result


def _ladder(limits: Limits, prompt_tokens: int) -> ProbeWorkload:
    """Return requests that end group by group, so that every batch size is decoded for a while."""
    hold = max(1, min(_HOLD, (limits.longest - prompt_tokens) // _RUNGS))
    fit = limits.most(prompt_tokens + hold * _RUNGS)
    count = max(1, min(fit, _LADDER_BUDGETS * limits.max_num_batched_tokens // prompt_tokens))
    sizes = np.unique(np.round(np.geomspace(1, count, min(count, _RUNGS)))).astype(int)
    lasts = np.zeros(count, dtype=int)
    for k, size in enumerate(sizes[::-1], start=1):
        lasts[:size] = k * hold
    return ProbeWorkload((prompt_tokens,) * count, tuple(lasts.tolist()))


def _stream(limits: Limits, variant: int) -> ProbeWorkload:
    """Return more requests than run at once: prompts are prefilled beside whoever decodes."""
    count = 2 * min(limits.max_num_seqs, 48)
    prompts = np.geomspace(8, max(8, limits.longest // 3), 7).astype(int)
    prompts[1:] = np.maximum(prompts[1:] - variant, 1)
    outputs = np.minimum((12, 34, 22, 62, 8), max(1, limits.longest // 3))
    return ProbeWorkload(
        tuple(int(prompts[i % 7]) for i in range(count)),
        tuple(int(outputs[i % 5]) for i in range(count)),
    )


def unseen(limits: Limits, rng: np.random.Generator) -> Mapping[str, ProbeWorkload]:
    """Return workloads of different kinds, none like :func:`probes`, to measure a fit's error on.

    ``mixed``: more requests than run at once, of very different lengths. ``long prompts``: read
    much, write little. ``long outputs``: read little, write much, all at once. ``few``: small
    batches.
    """
    longest, seqs = limits.longest, limits.max_num_seqs

    def lengths(median: float, spread: float, count: int, most: int) -> tuple[int, ...]:
        drawn = rng.lognormal(np.log(max(median, 1.0)), spread, count)
        return tuple(int(n) for n in np.clip(drawn, 1, max(1, most)))

    def workload(
        count: int, prompt: tuple[float, float], output: tuple[float, float]
    ) -> ProbeWorkload:
        """Return requests of lengths with the given medians and spreads of their logarithm."""
        prompts = lengths(*prompt, count, longest // 2)
        return ProbeWorkload(prompts, lengths(*output, count, longest // 2), "unseen")

    return {
        "mixed": workload(seqs * 3 // 2 + 1, (longest / 16, 0.9), (longest / 32, 0.7)),
        "long prompts": workload(seqs // 4 + 1, (longest / 3, 0.4), (longest / 128, 0.5)),
        "long outputs": workload(seqs, (32, 0.5), (longest / 16, 0.4)),
        "few": workload(min(seqs, 4), (longest / 8, 0.6), (longest / 24, 0.4)),
    }
