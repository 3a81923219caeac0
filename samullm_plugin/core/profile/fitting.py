"""Fit the iteration latency of one model at one size from measured iterations.

The form is :class:`~samullm_plugin.core.engine.latency.StepLatency`. Its parameters:

==================  ============================================================================
base                weights read once, and whatever else an iteration costs at least
per token           matrix products of one token, with a kink at 512 tokens
tile steps          extra at every 64, 128 and 256 tokens (matrix products work on tiles)
per sequence        logits, attention set-up
per prefill         extra per prefill sequence and per query-key pair
context             per token of context read, or the longest sequence alone if that takes longer
launch              least device time of a decode and of a prefill iteration
host                preparation, sampling and output handling, by sequences
==================  ============================================================================

All are non-negative and minimise the relative error, robustly: in the measurements about one
iteration in 25 is held up on the host by garbage collection and the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin.core.engine.latency import Curve, Floats, StepLatency, StepTable
from samullm_plugin.core.profile.iterations import Iterations
from samullm_plugin.core.profile.regression import Matrix, least_absolute, nonnegative_least_squares
from samullm_plugin.errors import InputError

TILES = (64, 128, 256)
TILED_TOKENS = 1024
KINK_TOKENS = 512
HOST_KNOTS = (1, 64, 256)
_RATIOS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)
_MOST_EXCESS = 4.0
_THRESHOLDS = (0, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class LongestPrior:
    """What to assume about the longest sequence where no row tells.

    Attributes:
        ratio: seconds per token of the longest sequence over seconds per token of all context.
        over_seqs: decode sequences up to which it does not apply.
    """

    ratio: float
    over_seqs: int


@dataclass(frozen=True, slots=True)
class StepFit:
    """A fitted latency and what the rows could tell.

    Attributes:
        latency: the fit.
        num_rows: rows it rests on.
        mape_pct: mean absolute percentage error on these rows, host stalls taken out.
        undetermined: terms the rows say nothing about, one sentence each.
        interruption_pct: by how much the rows' summed time exceeds the fit's, in percent: the mean
            cost of interruptions (swaps, other processes) that no single iteration shows. 0 where
            separate device times let host stalls be taken out.
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


def fit_iterations(rows: Iterations, prior: LongestPrior | None = None) -> StepFit:
    """Return the latency that fits measured iterations of one model at one size.

    Args:
        rows: the iterations, of at least two batch sizes.
        prior: used for the longest sequence if all decode rows have sequences of equal length.

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
    longest, over, solution = _fit_device(steps, target, decode, prior, undetermined)
    x, floors = solution
    if not decode.any():
        undetermined.append("no decode rows: decode is priced as a prefill of one token each")
    if not (steps.prefill_seqs > 0).any():
        undetermined.append("no prefill rows: a prefill token is priced as a decode token")
    latency = StepLatency(
        by_tokens=_token_curve(x[0], x[1], x[2], x[3 : 3 + len(TILES)]),
        by_seqs=Curve.line(0.0, float(x[3 + len(TILES)])),
        prefill_seq_s=float(x[4 + len(TILES)]),
        prefill_pair_s=float(x[5 + len(TILES)]),
        context_token_s=float(x[6 + len(TILES)]),
        longest_token_s=float(x[6 + len(TILES)] * longest),
        host_by_seqs=host,
        launch_s=float(floors[0]),
        prefill_launch_s=float(floors[1]),
        longest_over_seqs=over,
    )
    predicted = latency.step_seconds(steps)
    error = np.abs(predicted / clean - 1)
    interruptions = 0.0
    if not np.isfinite(rows.device_s).any():
        # One mishap of many times an iteration must not price every iteration.
        excess = np.minimum(rows.seconds - predicted, _MOST_EXCESS * predicted)
        interruptions = float(np.clip(100 * excess.sum() / predicted.sum(), 0.0, 25.0))
    return StepFit(
        latency, len(rows), float(100 * error.mean()), tuple(undetermined), interruptions
    )


def _token_curve(base: float, slope: float, kink: float, tiles: Floats) -> Curve:
    """Return the curve over scheduled tokens as few knots."""
    edges = [0, 1]
    smallest = TILES[0] if tiles[0] > 0 else TILES[1] if tiles[1] > 0 else TILES[2]
    if tiles.any():
        for edge in range(smallest, TILED_TOKENS + 1, smallest):
            edges += [edge, edge + 1]
    edges += [KINK_TOKENS, TILED_TOKENS, TILED_TOKENS + 1, 2 * TILED_TOKENS]
    knots = np.unique(np.array(edges, dtype=np.float64))
    values = base + slope * knots + kink * np.maximum(knots - KINK_TOKENS, 0)
    for tile, seconds in zip(TILES, tiles, strict=True):
        values = values + seconds * tile_count(knots, tile)
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


def _columns(steps: StepTable, longest: float, over: int) -> Matrix:
    """Return the columns of the device terms, shape ``(n, 10)``."""
    tokens = steps.num_tokens.astype(np.float64)
    decode_seqs = steps.num_seqs - steps.prefill_seqs
    attention = np.maximum(
        steps.context_tokens, np.where(decode_seqs > over, longest, 0.0) * steps.longest_tokens
    )
    columns = [np.ones(len(tokens)), tokens, np.maximum(tokens - KINK_TOKENS, 0)]
    columns += [tile_count(tokens, tile) for tile in TILES]
    columns += [steps.num_seqs, steps.prefill_seqs, steps.prefill_pairs, attention]
    return np.column_stack(columns)


def _solve(
    matrix: Matrix, target: Floats, prefill: np.ndarray, rounds: int
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
    prior: LongestPrior | None,
    undetermined: list[str],
) -> tuple[float, int, tuple[Floats, Floats]]:
    """Return ratio and threshold of the longest sequence, and the solution under them."""
    prefill = steps.prefill_seqs > 0
    decode_seqs = steps.num_seqs - steps.prefill_seqs
    padded = steps.longest_tokens * decode_seqs
    uneven = decode & (padded > 1.5 * steps.context_tokens + 2 * decode_seqs + 64)
    choice = (0.0, 0)
    if np.count_nonzero(uneven) >= 4:
        choice = _search(steps, target, prefill, decode_seqs[uneven])
    elif prior is not None:
        choice = (prior.ratio, prior.over_seqs)
        undetermined.append("no decode rows of uneven length: the longest-sequence term is assumed")
    else:
        undetermined.append("no decode rows of uneven length: no longest-sequence term")
    x, floors, _ = _solve(_columns(steps, *choice), target, prefill, 14)
    return *choice, (x, floors)


def _search(
    steps: StepTable, target: Floats, prefill: np.ndarray, sizes: np.ndarray
) -> tuple[float, int]:
    """Return the best ratio and threshold of the longest sequence, one after the other."""
    thresholds = [t for t in _THRESHOLDS if t < sizes.max()] or [0]
    errors: dict[tuple[float, int], float] = {}

    def error(choice: tuple[float, int]) -> float:
        if choice not in errors:
            errors[choice] = _solve(_columns(steps, *choice), target, prefill, 5)[2]
        return errors[choice]

    def best(candidates: Sequence[tuple[float, int]]) -> tuple[float, int]:
        return min(candidates, key=error)

    current = (8.0, thresholds[len(thresholds) // 3])
    for _ in range(3):
        before = current
        current = best([(r, current[1]) for r in _RATIOS])
        current = best([(current[0], t) for t in thresholds])
        if current == before:
            break
    return current
