"""Fit the iteration latency of one model at one size from measured iterations.

The form is :class:`~samullm_plugin.model.latency.StepLatency`. Its parameters:

==================  ============================================================================
base                weights read once, and whatever else an iteration costs at least
per token           matrix products of one token, by how many there are: a slope between each two
                    of few token counts, so that small batches on a CPU cost their own
tile steps          extra at every 64, 128 and 256 tokens (matrix products work on tiles)
per sequence        logits, attention set-up
per prefill         extra per prefill sequence, per query-key pair, and once an iteration with any
context             per token of context read, or the longest sequence alone if that takes longer
launch              least device time of a decode and of a prefill iteration
host                preparation, sampling and output handling, by sequences
==================  ============================================================================

All are non-negative and minimise the relative error, robustly: in the measurements about one
iteration in 25 is held up on the host by garbage collection and the like.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.latency import Curve, StepLatency, StepTable
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.profiling.iterations import Iterations
from samullm_plugin.profiling.regression import least_absolute, nonnegative_least_squares

# Knots, grids, limits: choices. ``benchmarks/latency_accuracy.py`` shows the errors with them.
TILES = (64, 128, 256)
TILED_TOKENS = 1024
TOKEN_KNOTS = (4, 32, 128, 256, 512, 1024, 2048)
HOST_KNOTS = (1, 64, 256)
SHORT_CONTEXT = 16
"""Tokens of context per decode sequence of which reading cannot be told from noise."""
_RATIOS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)
_MOST_EXCESS = 4.0
_MOST_INTERRUPTED = 0.25
_THRESHOLDS = (0, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class AttentionPrior:
    """What to assume about attention where no row tells.

    Attributes:
        ratio: seconds per token of the longest sequence over seconds per token of all context.
        over_seqs: decode sequences up to which it does not apply.
        context_token_s: seconds per token of context, where all contexts are short.
    """

    ratio: float
    over_seqs: int
    context_token_s: float


@dataclass(frozen=True, slots=True)
class StepFit:
    """A fitted latency and what the rows could tell.

    Attributes:
        latency: the fit.
        num_rows: number of rows behind it.
        mape_pct: mean absolute percentage error on these rows, host stalls taken out.
        undetermined: terms the rows say nothing about, one sentence each.
        interruption_pct: by how much the summed time of decode rows exceeds the fit's, in percent:
            the mean cost of interruptions (swaps, other processes, requests that end) that no
            single iteration shows. 0 where separate device times let host stalls be taken out.
    """

    latency: StepLatency
    num_rows: int
    mape_pct: float
    undetermined: tuple[str, ...]
    interruption_pct: float = 0.0


def tile_count(tokens: Floats, tile: int) -> Floats:
    """Return the tiles that tokens fill; smooth beyond 1024 tokens, where steps are small."""
    exact = np.ceil(tokens / tile)
    return np.where(tokens <= TILED_TOKENS, exact, tokens / tile + 0.5)


def fit_iterations(rows: Iterations, prior: AttentionPrior | None = None) -> StepFit:
    """Return the latency that fits measured iterations of one model at one size.

    Args:
        rows: the iterations, of at least two batch sizes.
        prior: used for the longest sequence if all decode rows have sequences of equal length, and
            for context if none has much of it.

    Raises:
        InputError: if the rows are too few to fit anything, naming what is missing.
    """
    who = f"{rows.model}, tensor-parallel size {rows.tensor_parallel_size}"
    sizes = np.unique(rows.batch_size)
    if len(sizes) < 2:
        raise InputError(
            f"{who}: all rows have batch size {sizes[0] if len(sizes) else '-'}; measure at least "
            "two batch sizes (some small, some near max_num_seqs)"
        )
    decode = rows.steps.num_seqs > rows.steps.prefill_seqs
    undetermined: list[str] = []
    host, host_s = _fit_host(rows, undetermined)
    clean = rows.seconds - rows.host_stalls()
    target = np.maximum(rows.seconds - host_s, 0.05 * rows.seconds)
    steps = rows.steps
    form, x, floors = _fit_device(steps, target, decode, prior, undetermined)
    if not decode.any():
        undetermined.append("no decode rows: decode is priced as a prefill of one token each")
    if not (steps.prefill_seqs > 0).any():
        undetermined.append("no prefill rows: a prefill token is priced as a decode token")
    latency = form.latency(x, floors, host)
    predicted = latency.step_seconds(steps)
    error = np.abs(predicted / clean - 1)
    interruptions = 0.0
    if not np.isfinite(rows.device_s).any():
        interruptions, latency = _with_interruptions(latency, predicted, rows)
    return StepFit(
        latency, len(rows), float(100 * error.mean()), tuple(undetermined), interruptions
    )


def _with_interruptions(
    latency: StepLatency, predicted: Floats, rows: Iterations
) -> tuple[float, StepLatency]:
    """Return the percentage that decode iterations take longer on average than usual ones.

    What iterations with prefills take longer beyond that goes into the latency: they usually meet
    a number of tokens for the first time, so that an engine that prepares itself for each takes
    longer in some, and the usual one says nothing of the sum.
    """
    # One mishap of many times an iteration must not price every iteration.
    excess = np.minimum(rows.seconds - predicted, _MOST_EXCESS * predicted)
    prefill = rows.steps.prefill_seqs > 0
    usual = ~prefill if (~prefill).any() else prefill
    share = float(np.clip(excess[usual].sum() / predicted[usual].sum(), 0.0, _MOST_INTERRUPTED))
    if not (usual & ~prefill).any() or not prefill.any():
        return 100 * share, latency
    more_s = float((excess - share * predicted)[prefill].mean()) / (1 + share)
    return 100 * share, replace(latency, prefill_step_s=latency.prefill_step_s + max(0.0, more_s))


@dataclass(frozen=True, slots=True)
class _Form:
    """The device terms, linear in their coefficients.

    Attributes:
        knots: token counts at which the seconds of one more token may change.
        longest: seconds per token of the longest sequence over those of all context.
        over: decode sequences up to which the longest sequence does not apply.
    """

    knots: tuple[int, ...]
    longest: float = 0.0
    over: int = 0

    @classmethod
    def of(cls, tokens: Floats) -> _Form:
        """Return the form of which rows with these token counts determine every slope."""
        knots: list[int] = []
        below = 0
        for knot in TOKEN_KNOTS:
            if ((tokens > below) & (tokens <= knot)).any() and (tokens >= 1.2 * knot).any():
                knots.append(knot)
                below = knot
        return cls(tuple(knots))

    def _segments(self, tokens: Floats) -> list[Floats]:
        """Return how many of the tokens lie between each two knots."""
        ends = (0, *self.knots, np.inf)
        return [np.clip(tokens - a, 0, b - a) for a, b in pairwise(ends)]

    def columns(self, steps: StepTable) -> Floats:
        """Return what each coefficient is multiplied with, shape ``(n, number of them)``."""
        tokens = steps.num_tokens.astype(np.float64)
        decode_seqs = steps.num_seqs - steps.prefill_seqs
        attention = np.maximum(
            steps.context_tokens,
            np.where(decode_seqs > self.over, self.longest, 0.0) * steps.longest_tokens,
        )
        columns: list[Ints | Floats] = [np.ones(len(tokens)), *self._segments(tokens)]
        columns += [tile_count(tokens, tile) for tile in TILES]
        columns += [steps.num_seqs, (steps.prefill_seqs > 0).astype(float), steps.prefill_seqs]
        columns += [steps.prefill_pairs, attention]
        return np.column_stack(columns)

    def latency(self, x: Floats, floors: Floats, host: Curve) -> StepLatency:
        """Return the latency of coefficients, least device times and host time."""
        per_seq, prefilling, per_prefill, per_pair, per_context = map(float, x[-5:])
        return StepLatency(
            by_tokens=self._curve(x[:-5]),
            by_seqs=Curve.line(0.0, per_seq),
            prefill_step_s=prefilling,
            prefill_seq_s=per_prefill,
            prefill_pair_s=per_pair,
            context_token_s=per_context,
            longest_token_s=per_context * self.longest,
            host_by_seqs=host,
            launch_s=float(floors[0]),
            prefill_launch_s=float(floors[1]),
            longest_over_seqs=self.over,
        )

    def _curve(self, x: Floats) -> Curve:
        """Return the curve over scheduled tokens as few knots."""
        tiles = x[-len(TILES) :]
        edges = [0, 1, *self.knots, TILED_TOKENS, TILED_TOKENS + 1, 2 * TILED_TOKENS]
        if tiles.any():
            smallest = TILES[int(np.argmax(tiles > 0))]
            for edge in range(smallest, TILED_TOKENS + 1, smallest):
                edges += [edge, edge + 1]
        knots = np.unique(np.array([*edges, max(edges) + TILED_TOKENS], dtype=np.float64))
        columns = [np.ones(len(knots)), *self._segments(knots)]
        columns += [tile_count(knots, tile) for tile in TILES]
        values = np.column_stack(columns) @ x
        return Curve(tuple(map(float, knots)), tuple(map(float, values)))


def _fit_host(rows: Iterations, undetermined: list[str]) -> tuple[Curve, Floats]:
    """Return the host time by sequences, and its value in each row."""
    host = rows.host_s
    known = np.isfinite(host)
    if not known.any():
        undetermined.append(
            "no separate device times: host time is part of the device terms, so asynchronous "
            "scheduling cannot be told from synchronous"
        )
        return Curve.constant(0.0), np.zeros(len(rows))
    steps = rows.steps
    # Old engines prepare padded inputs; the excess at long contexts belongs to the context terms.
    short = known & (steps.context_tokens + steps.prefill_tokens <= 2 * rows.batch_size + 1)
    use = short if len(np.unique(rows.batch_size[short])) >= 2 else known
    seqs = steps.num_seqs.astype(np.float64)
    knots = [k for k in HOST_KNOTS if k < seqs[use].max()]
    sizes = len(np.unique(rows.batch_size[use]))
    while len(knots) > max(sizes // 3, 1):
        knots.pop(len(knots) // 2)
    basis = [np.ones(len(seqs)), seqs] + [np.minimum(seqs, k) for k in knots[1:]]
    matrix = np.column_stack(basis)
    x = least_absolute(matrix[use], host[use], floor=1e-4)
    ends = np.unique(np.array([0.0, *knots, seqs[use].max(), seqs[use].max() + 1]))
    values = x[0] + x[1] * ends
    for k, seconds in zip(knots[1:], x[2:], strict=True):
        values = values + seconds * np.minimum(ends, k)
    curve = Curve(tuple(map(float, ends)), tuple(float(max(v, 0.0)) for v in values))
    return curve, curve.at(seqs)


def _solve(
    matrix: Floats, target: Floats, prefill: np.ndarray, rounds: int
) -> tuple[Floats, Floats, float]:
    """Return coefficients, the two launch floors, and the mean relative error.

    Alternates between the coefficients, from the rows above the floor, and the floors.
    """
    phase = prefill.astype(np.int64)
    floors = np.array(
        [np.percentile(target[phase == p], 10) if (phase == p).any() else 0.0 for p in (0, 1)]
    )
    active = np.ones(len(target), dtype=bool)
    weight = np.ones(len(target))
    relative = matrix / target[:, None]
    x = np.zeros(matrix.shape[1])
    error = np.inf
    for _ in range(rounds):
        x = nonnegative_least_squares(relative[active] * weight[active, None], weight[active])
        work = matrix @ x
        for p in (0, 1):
            below = (phase == p) & (work < floors[p])
            if np.count_nonzero(below) >= 2:
                floors[p] = np.median(target[below])
        floor = floors[phase]
        residual = np.abs(np.maximum(work, floor) / target - 1)
        error = float(residual.mean())
        weight = 1 / np.sqrt(np.maximum(residual, 0.01))
        active = (work >= floor) | (target > 1.15 * floor)
        if np.count_nonzero(active) < matrix.shape[1]:
            active[:] = True
    floors[[p for p in (0, 1) if not ((phase == p) & (matrix @ x < floors[p])).any()]] = 0.0
    return x, floors, error


def _fit_device(
    steps: StepTable,
    target: Floats,
    decode: np.ndarray,
    prior: AttentionPrior | None,
    undetermined: list[str],
) -> tuple[_Form, Floats, Floats]:
    """Return the form of the device terms, its coefficients and the least device times."""
    prefill = steps.prefill_seqs > 0
    decode_seqs = steps.num_seqs - steps.prefill_seqs
    padded = steps.longest_tokens * decode_seqs
    uneven = decode & (padded > 1.5 * steps.context_tokens + 2 * decode_seqs + 64)
    form = _Form.of(steps.num_tokens.astype(np.float64))
    if np.count_nonzero(uneven) >= 4:
        form = _search(form, steps, target, prefill, decode_seqs[uneven])
    elif prior is not None:
        form = replace(form, longest=prior.ratio, over=prior.over_seqs)
        undetermined.append("no decode rows of uneven length: the longest-sequence term is assumed")
    else:
        undetermined.append("no decode rows of uneven length: no longest-sequence term")
    columns = form.columns(steps)
    short = decode.any() and (steps.context_tokens <= SHORT_CONTEXT * decode_seqs)[decode].all()
    if short:
        columns[:, -1] = 0.0
    x, floors, _ = _solve(columns, target, prefill, 14)
    if short:
        x[-1] = 0.0 if prior is None else prior.context_token_s
        undetermined.append(
            f"no decode rows of more than {SHORT_CONTEXT} tokens a sequence: reading context is "
            + ("free" if prior is None else "priced by the device's memory bandwidth")
        )
    return form, x, floors


def _search(
    form: _Form, steps: StepTable, target: Floats, prefill: np.ndarray, sizes: np.ndarray
) -> _Form:
    """Return the form with the best longest sequence: its ratio and threshold in turn."""
    thresholds = [t for t in _THRESHOLDS if t < sizes.max()] or [0]
    errors: dict[_Form, float] = {}

    def error(form: _Form) -> float:
        if form not in errors:
            errors[form] = _solve(form.columns(steps), target, prefill, 5)[2]
        return errors[form]

    current = replace(form, longest=8.0, over=thresholds[len(thresholds) // 3])
    for _ in range(3):
        before = current
        current = min((replace(current, longest=r) for r in _RATIOS), key=error)
        current = min((replace(current, over=t) for t in thresholds), key=error)
        if current == before:
            break
    return current
