"""What the tokens of a node cost at least, whatever iterations a plan computes them in.

Every token is given a *price*, such that in no iteration that an engine can have, the prices of its
tokens add up to more than the iteration takes. Then all of a node's tokens at their prices are no
more than all its iterations, over all replicas and stages. Prices are:

* of prompt tokens, one for each but the last of a request, a slope ``y``;
* of context tokens read, by what reading takes, and, where it is filled, by the KV cache: the
  sequences of an iteration hold no more than its capacity, in whole blocks;
* of a request, what its prompt takes beside its tokens, less what it can save: prompts are divided
  only where an iteration's budget ends, so that an iteration without the end of a prompt computes
  decodes alone, or what was computed before, or it is full;
* of output tokens, by *rank*: requests that follow one another are in no iteration together, so
  that a node's requests are chains, and an iteration has one token of each at most. The longest
  chain's tokens have the first price, those of the second longest the second, and so on, falling.
  If the first ``b`` prices add up to no more than an iteration of ``b`` sequences takes, for every
  ``b``, then no iteration is too cheap: the first prices are the highest (Lovász' extension of a
  submodular function; with a concave sum of prices no others are better).

The sum of the first ``b`` prices is to be concave and nowhere above the seconds of an iteration
with ``b`` sequences. It is made of lines, the least of which counts, each of them below these
seconds in a part of the sizes, so that in every part one is. Several parts are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.model.chains import lines_of
from samullm_plugin.model.engine_config import EngineConfig
from samullm_plugin.model.latency import StepLatency
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Floats

# Any values give a valid bound; these are choices between its height and the seconds that it takes.
RANKS = 256
"""Chains that have prices of their own; all others have the price of the last of them."""

BENDS = (1, 2, 4, 8, 16, 32, 64)
"""Sizes of batches, each up to which lines join neighbouring ones; one line follows."""

SLOPES, MIXED = 20, 1 / 16
"""Slopes of prompt tokens that are tried; the least of them, as a share of the steepest."""

UNITS, REQUEST = 5, 2
"""Prices of a row before those of output tokens; which of them is that of a request."""

LASTS = 4
"""Lines that are tried for the batches beyond the bend."""

CHARGED = (0.0, 1.0)
"""Shares of what an iteration takes beside its sequences that are charged to the KV cache."""


@dataclass(frozen=True, slots=True)
class Work:
    """What of a node certainly has to be computed.

    Attributes:
        chains: output tokens of its ``RANKS`` longest chains, longest first, filled with zeros;
            those of all others are added to the last.
        prefill: prompt tokens that no cache can hold, but the last of each request.
        context: sum over decode tokens of the context they read.
        requests: requests taken.
        pairs: query-key pairs of the prompts.
        blocks: sum over output tokens of what their sequence's KV blocks hold beyond ``context``.
    """

    chains: Floats
    prefill: float
    context: float
    requests: float
    pairs: float
    blocks: float

    def least_s(self, offers: Sequence[Floats]) -> float:
        """Return the least device seconds where each token may be computed in any of some sizes.

        Args:
            offers: prices by size, see :func:`unit_prices`.
        """
        if not offers:
            return 0.0
        amounts = np.concatenate(
            [[self.prefill, self.context, self.requests, self.pairs, self.blocks], self.chains]
        )
        cheapest = offers[0]
        for offer in offers[1:]:
            cheapest = np.minimum(cheapest, offer)
        # Or what is best for each size by itself: any prices of each size will do. What a prompt
        # saves in one of them (a price below 0) is taken off those of all.
        most = float(_sums_of(cheapest, amounts).max())
        for saving in (True, False) if len(offers) > 1 else ():
            sums = [
                np.where(saving | (offer[:, REQUEST] >= 0.0), _sums_of(offer, amounts), -np.inf)
                for offer in offers
            ]
            own = np.min([o[np.argmax(s)] for o, s in zip(offers, sums, strict=True)], axis=0)
            most = max(most, float(own @ amounts))
        return max(0.0, most)


def _sums_of(rows: Floats, amounts: Floats) -> Floats:
    """Return what the amounts cost at each row of prices, in one thread: several wait for it."""
    return np.asarray(np.einsum("ij,j->i", rows, amounts))


def work_of(problem: Problem, scenario: LengthScenario, node: int) -> Work:
    """Return what of a node certainly has to be computed."""
    model, table = problem.app.nodes[node].model, problem.app.nodes[node].requests
    room = np.maximum(model.max_model_len - scenario.prompt_tokens[node], 0)
    outputs = np.minimum(scenario.output_tokens[node], room).astype(np.float64)
    taken = outputs > 0
    prompts = scenario.prompt_tokens[node][taken].astype(np.float64)
    decode = outputs[taken] - 1
    fresh = prompts
    if model.engine.enable_prefix_caching:
        # Any full block may be found in the cache; the last token never is.
        block = model.engine.block_size
        fresh = prompts - ((prompts - 1) // block) * block
    context = decode * prompts + decode * (decode + 1) / 2
    pairs = fresh * (fresh + 1) / 2
    # With its output tokens a sequence is prompts, ..., prompts + decode long, in whole blocks.
    ends = [_in_blocks(n, model.engine.block_size) for n in (prompts - 1, prompts + decode)]
    held = ends[1] - ends[0]
    own = table.input_node == node
    lengths: NDArray[Any] = outputs
    if own.any():
        line = lines_of(outputs, table.input_row[own], table.input_request[own])
        lengths = np.bincount(line, weights=outputs)
    lengths = np.sort(lengths)[::-1]
    chains = np.zeros(RANKS)
    chains[: min(RANKS, len(lengths))] = lengths[:RANKS]
    chains[-1] += lengths[RANKS:].sum()
    return Work(
        chains,
        float(fresh.sum() - taken.sum()),
        float(context.sum()),
        float(taken.sum()),
        float(pairs.sum()),
        float(held.sum() - context.sum()),
    )


def _in_blocks(tokens: Floats, block: int) -> Floats:
    """Return the sum of 1, 2, ..., ``tokens``, each rounded up to whole blocks."""
    full = tokens // block
    return np.asarray(
        block * (block * full * (full + 1) / 2 + (tokens - full * block) * (full + 1))
    )


@dataclass(frozen=True, slots=True)
class IterationParts:
    """Seconds of the parts of an iteration, at 1, 2, ... tokens or sequences.

    Attributes:
        tokens: device seconds by scheduled tokens, what prefills may save taken off.
        seqs: device seconds by sequences.
        host: host seconds by sequences that are not hidden behind the device.
        launch: least device seconds of any iteration.
    """

    tokens: Floats
    seqs: Floats
    host: Floats
    launch: float


def iteration_parts(latency: StepLatency, config: EngineConfig) -> IterationParts:
    """Return the parts of iterations that any engine of this kind can have."""
    tokens = latency.by_tokens.table(config.max_num_batched_tokens)[1:]
    credit = min(0.0, latency.prefill_token_s) + min(0.0, latency.prefill_seq_s)
    if credit < 0:  # prefill tokens and sequences are at most all scheduled tokens
        tokens = tokens + credit * np.arange(1, len(tokens) + 1)
    tokens = tokens + min(0.0, latency.prefill_step_s)
    seqs = latency.by_seqs.table(config.max_num_seqs)[1:]
    host = latency.host_by_seqs.table(config.max_num_seqs)[1:]
    if latency.overlap_host:
        host = np.zeros_like(host)
    launch = max(0.0, min(latency.launch_s, latency.prefill_launch_s))
    return IterationParts(tokens, seqs, host, launch)


@lru_cache(maxsize=48)
def unit_prices(size: int, latency: StepLatency, config: EngineConfig) -> Floats:
    """Return device seconds per unit of work, and of output tokens by rank.

    One row for each of several choices, each valid by itself, shape ``(n, UNITS + RANKS)``; the
    same row is the same choice for all sizes. Units are a prefill token, a context token, a
    request, a pair, and a token more that blocks hold.
    """
    parts = iteration_parts(latency, config)
    most = min(config.max_num_seqs, config.max_num_batched_tokens)
    batch = np.arange(1, most + 1)
    seqs = _at_least((parts.seqs + parts.host)[:most])
    host = _at_least(parts.host[:most])
    knots = latency.by_tokens.knots
    caching = config.enable_prefix_caching
    capacity = 0.0 if caching else _capacity(config)
    pair_s = max(0.0, latency.prefill_pair_s)
    rows: list[Floats] = []
    for slope in _slopes(parts.tokens, knots):
        prefill_s = slope + max(0.0, latency.prefill_token_s)
        # A request that is resumed with n tokens computes n - 1 that were computed before (n >= 2)
        # instead of reading n; of cached ones it makes n pairs.
        resumed_s = pair_s if caching else prefill_s / 2 + pair_s
        context_s = max(0.0, min(latency.context_token_s, resumed_s))
        request_s = max(0.0, latency.prefill_seq_s)
        for saved_s, beyond in _beyond(parts.tokens, most, slope, context_s, config):
            seconds = np.maximum(beyond + slope * batch + seqs, 0.0)
            units = (prefill_s, context_s, request_s - saved_s, pair_s)
            rows += _priced(seconds, slope, units, capacity)
    # Or by what an iteration takes whatever it computes.
    least = np.maximum(_at_least(parts.tokens)[:most], 0.0) + _at_least(parts.seqs[:most])
    seconds = np.maximum(least, parts.launch) + host
    rows += _priced(np.maximum(seconds, 0.0), 0.0, (0.0,) * 4, capacity)
    return size * np.concatenate(rows)


def _capacity(config: EngineConfig) -> float:
    """Return tokens that the sequences of an iteration hold at most, in blocks of its size.

    0: not known. Of groups of layers one with full attention counts: it holds every token.
    """
    sizes = [config.block_size]
    if config.kv_cache_groups:
        sizes = [g.block_size for g in config.kv_cache_groups if g.kind == "full"]
    # Whole blocks of a larger size are whole blocks of ours too.
    sizes = [n for n in sizes if n % config.block_size == 0]
    return float((config.num_blocks - 1) * min(sizes)) if sizes else 0.0


def _beyond(
    tokens: Floats, most: int, slope: float, context_s: float, config: EngineConfig
) -> list[tuple[float, Floats]]:
    """Return seconds of iterations by sequences, less their tokens at a slope, in two ways.

    Either at least, whatever their tokens; or so that an iteration may be shorter that has the last
    tokens of prompts, by the seconds that come with it, taken off each of their requests.

    Args:
        tokens: device seconds by scheduled tokens.
        most: sequences.
        slope: price of a token.
        context_s: price of a context token.
        config: the engine's settings.
    """
    numbers = np.arange(1, len(tokens) + 1)
    any_s = _at_least(tokens - slope * numbers)
    # Under priorities one that is preempted after its turn leaves its tokens unused.
    full = config.max_num_batched_tokens - config.max_num_seqs
    divided = config.pipeline_parallel_size > 1 or config.long_prefill_token_threshold > 0
    if divided or full < 1:
        return [(0.0, any_s[:most])] * 2
    least = _at_least(tokens)
    # What is computed anew in place of context may take less than reading that, in a tile.
    anew = least - 2 * context_s * numbers
    unread_s = float((anew - _at_least(anew))[:most].max()) + context_s
    without = least[:most] - slope * numbers[:most] - unread_s
    without = np.minimum(without, any_s[full - 1])
    saved_s = max(0.0, float((without - any_s[:most]).max()))
    return [(0.0, any_s[:most]), (saved_s, np.maximum(without, any_s[:most]))]


def _at_least(values: Floats) -> Floats:
    """Return the least value at this place or a later one."""
    return np.asarray(np.minimum.accumulate(values[::-1])[::-1])


def _slopes(values: Floats, knots: tuple[float, ...]) -> Floats:
    """Return slopes of prompt tokens: those of lines under ``values`` at 1, 2, ..., and others.

    ``values`` is linear between ``knots``. Always ``SLOPES`` slopes, so that sizes can be compared.
    """
    hull: list[int] = []
    around = {int(f(k)) - 1 for k in knots for f in (np.floor, np.ceil)}
    corners = sorted({0, len(values) - 1} | {i for i in around if 0 <= i < len(values)})
    for i in corners:
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (i - a) >= (values[i] - values[a]) * (b - a):
                hull.pop()
            else:
                break
        hull.append(i)
    steepest = max(0.0, float((values / np.arange(1, len(values) + 1)).min()))
    # A little of the steepest makes up for context that recomputation may save.
    tried = {0.0, MIXED * steepest, steepest}
    lines = {float(values[b] - values[a]) / (b - a) for a, b in pairwise(hull)}
    between = sorted(x for x in lines if 0 < x < steepest)
    several = np.linspace(0, len(between) - 1, min(SLOPES - 3, len(between)))
    found = sorted(tried | {between[round(k)] for k in several})
    return np.array([*found, *([found[-1]] * (SLOPES - len(found)))])


def _priced(
    seconds: Floats, slope: float, units: tuple[float, float, float, float], capacity: float
) -> list[Floats]:
    """Return rows of prices.

    Args:
        seconds: that an iteration of so many sequences takes at least, for 1, 2, ... of them.
        slope: by which they grow at least, about.
        units: prices of a prefill token, a context token, a request and a pair.
        capacity: tokens of the KV cache; 0: cached blocks may count for several sequences.
    """
    prefill_s, context_s, request_s, pair_s = units
    sums = _sums(seconds, slope)
    prices = np.diff(sums, axis=1, prepend=0.0)
    rows = []
    for share in CHARGED if capacity else CHARGED[:1]:
        # At most what the first rank has more than the second, so that prices still fall.
        charged = share * np.maximum(prices[:, 0] - prices[:, 1 % prices.shape[1]], 0.0)
        row = np.empty((len(prices), UNITS + RANKS))
        row[:, :4] = prefill_s, context_s, request_s, pair_s
        row[:, 4] = charged / capacity if capacity else 0.0
        row[:, 1] += row[:, 4]
        mine = prices.copy()
        mine[:, 0] -= charged
        mine = np.minimum.accumulate(mine, axis=1)  # falling, if by rounding they did not
        ranks = min(RANKS, mine.shape[1])
        row[:, UNITS : UNITS + ranks] = mine[:, :ranks]
        row[:, UNITS + ranks :] = mine[:, -1:]
        row[:, -1] = mine[:, -1]  # of all chains after these, too
        rows.append(row)
    return rows


def _sums(seconds: Floats, slope: float) -> Floats:
    """Return concave sums of prices, each nowhere above ``seconds``, one a row."""
    most = len(seconds)
    batch = np.arange(1, most + 1, dtype=np.float64)
    joined = np.full(most, np.inf)
    from_0 = float((seconds / batch).min())
    rows = [from_0 * batch]
    for bend in BENDS:
        if bend > most:
            rows += rows[-LASTS:]  # always as many
            continue
        if bend > 1:
            first = bend // 2
            gain = (seconds[first:bend] - seconds[first - 1]) / (batch[first:bend] - first)
            joined = np.minimum(joined, seconds[first - 1] + float(gain.min()) * (batch - first))
        ends = float(seconds[-1] - seconds[bend - 1]) / max(most - bend, 1)
        middle = min(most, max(64, 2 * bend))
        near = float(seconds[middle - 1] - seconds[bend - 1]) / max(middle - bend, 1)
        for rise in (0.0, slope, near, ends):
            below = float((seconds[bend - 1 :] - rise * batch[bend - 1 :]).min())
            rows.append(np.minimum(joined, below + rise * batch))
    return np.clip(np.array(rows), 0.0, seconds)
