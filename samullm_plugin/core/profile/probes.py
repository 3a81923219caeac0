"""Which requests to give an engine so that few iterations tell what any iteration takes.

One iteration per setting would take an engine to each of them. Instead each workload sweeps a line
through them: requests of different output lengths leave one by one, so that a single run decodes
batches of every size at growing context; prompts of different lengths that arrive together are
prefilled in chunks of the whole token budget and of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are submitted together.

    Attributes:
        prompt_tokens: of each.
        output_tokens: of each.
        shape: ``uniform``, or ``skew`` where one sequence is far longer than the rest.
    """

    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    shape: str = "uniform"


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

    def most(self, length: int) -> int:
        """Return how many sequences of a length fit at once."""
        return max(1, min(self.max_num_seqs, self.kv_cache_tokens // (length + 64)))


def probes(limits: Limits) -> list[Workload]:
    """Return the workloads to measure, cheap and informative ones first."""
    longest = limits.max_model_len - 8
    result = [_ladder(limits, 16, 64), _ladder(limits, longest // 3, 32)]
    budget = min(limits.max_num_batched_tokens, longest)
    lengths = sorted({max(1, int(budget * share)) for share in (1, 0.5, 0.25, 0.1, 0.04, 0.01)})
    result += [Workload((length,), (1,)) for length in lengths for _ in range(2)]
    many = limits.most(budget // 4)
    result.append(Workload((max(1, budget // 4),) * min(many, 8), (2,) * min(many, 8)))
    # Short ones decode while a long prompt is still being prefilled.
    few = min(limits.max_num_seqs - 1, 8)
    if few > 0:
        result.append(Workload((8,) * few + (longest - 40,), (24,) * few + (24,), shape="skew"))
    result.append(_stream(limits))
    result.append(_ladder(limits, longest // 8, 48))
    result.append(_ladder(limits, 16, 64))
    return result


def _stream(limits: Limits) -> Workload:
    """Return more requests than run at once: prompts are prefilled beside whoever decodes."""
    count = 2 * min(limits.max_num_seqs, 64)
    longest = (limits.max_model_len - 8) // 2
    prompts = np.geomspace(8, longest, 7).astype(int)
    outputs = (6, 17, 11, 31, 4)
    return Workload(
        tuple(int(prompts[i % 7]) for i in range(count)),
        tuple(outputs[i % 5] for i in range(count)),
    )


def held_out(limits: Limits, rng: np.random.Generator) -> Workload:
    """Return a workload unlike those of :func:`probes`, to measure a fit's error on."""
    longest = limits.max_model_len - 8
    count = 2 * limits.max_num_seqs
    prompts = np.clip(rng.lognormal(np.log(longest / 8), 0.8, count), 4, longest * 2 // 3)
    outputs = np.clip(rng.lognormal(np.log(longest / 16), 0.7, count), 2, longest // 3)
    return Workload(
        tuple(int(p) for p in prompts), tuple(int(o) for o in outputs), shape="held-out"
    )


def _ladder(limits: Limits, prompt_tokens: int, outputs: int) -> Workload:
    """Return requests that end one after another, so that every batch size is decoded."""
    count = limits.most(prompt_tokens + outputs)
    steps = np.unique(np.round(np.geomspace(1, count, min(count, 12)))).astype(int)
    # The k-th batch size lasts its share of the run: as many leave between as sizes differ.
    lasts = np.zeros(count, dtype=int)
    for k, size in enumerate(steps[::-1]):
        lasts[:size] = 4 + (k + 1) * max(1, outputs // len(steps))
    prompts = np.full(count, max(1, prompt_tokens))
    return Workload(tuple(prompts.tolist()), tuple(lasts.tolist()))
