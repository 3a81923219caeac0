"""Iteration time of any batch, interpolated between points the package was asked for once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from samullm_aiconfigurator.package import Operators
from samullm_plugin import StepTable
from samullm_plugin.model.types import Floats
from samullm_plugin.profiling.grid import Grid


@dataclass(frozen=True, slots=True)
class HostTime:
    """Seconds of an iteration that operator tables leave out: scheduling, sampling, output.

    Attributes:
        base_s: per iteration.
        sequence_s: per scheduled sequence.
    """

    base_s: float = 0.0
    sequence_s: float = 0.0


class OperatorSteps:
    """Seconds of iterations from operator tables.

    Everything but attention by the scheduled tokens, which has tile steps and is asked for at every
    count, plus the attention of the decode sequences (as many of mean length) and of the prefills
    (as many of mean length after the mean number of earlier tokens). Iterations with and without a
    prefill have operators of their own, as in the package.
    """

    def __init__(
        self,
        operators: Operators,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        host: HostTime | None = None,
    ) -> None:
        """Ask the package for all points.

        Args:
            operators: the deployment.
            max_num_seqs: most sequences of an iteration.
            max_num_batched_tokens: most tokens of an iteration.
            max_model_len: longest sequence.
            host: seconds to add.

        Raises:
            InputError: the package cannot answer for a point.
        """
        self._host = host or HostTime()
        every = _stepped(max_num_seqs, ((2048, 1), (10**9, 16)))
        sequences = _stepped(max_num_seqs, ((16, 1), (64, 4), (512, 16), (10**9, 64)))
        context = _spaced(2, max(max_model_len, 4), 1.2)
        tokens = _stepped(max_num_batched_tokens, ((4096, 1), (10**9, 8)))
        attention = np.array(
            [[operators.decode_attention_s(int(n), int(c)) for c in context] for n in sequences]
        )
        self._decode_attention = Grid((sequences, context), attention)
        # Decode iterations have attention operators of their own (latent attention above all).
        shortest = int(context[0])
        alone = np.array([operators.decode_s(int(n), shortest) for n in every])
        self._decode_alone = Grid((every,), alone)
        longer = np.array(
            [[operators.decode_s(int(n), int(c)) for c in context] for n in sequences]
        )
        self._decode_longer = Grid((sequences, context), longer - longer[:, :1])
        self._shared = Grid((tokens,), np.array([operators.shared_s(int(t)) for t in tokens]))
        prefills = _spaced(1, max(min(max_num_seqs, 32), 2), 2.0)
        chunk = _spaced(1, max(min(max_num_batched_tokens, max_model_len), 2), 1.4)
        before = np.append(0.0, _spaced(16, max(max_model_len, 32), 1.6))
        self._prefill_attention = Grid(
            (prefills, chunk, before), self._attention(operators, prefills, chunk, before)
        )

    def step_seconds(self, steps: StepTable) -> Floats:
        """Return the seconds of each iteration, shape ``(len(steps),)``."""
        decode = (steps.num_seqs - steps.prefill_seqs).astype(np.float64)
        mean = steps.context_tokens / np.maximum(decode, 1)
        result = self._decode_alone.at(decode) + self._decode_longer.at(decode, mean)
        mixed = np.flatnonzero(steps.prefill_seqs > 0)
        if len(mixed):
            prefills = steps.prefill_seqs[mixed].astype(np.float64)
            total = steps.prefill_tokens[mixed]
            chunk = total / prefills
            before = steps.prefill_pairs[mixed] / np.maximum(total, 1) - (chunk + 1) / 2
            beside = self._decode_attention.at(decode[mixed], mean[mixed])
            result[mixed] = (
                self._shared.at(steps.num_tokens[mixed].astype(np.float64))
                + self._prefill_attention.at(prefills, chunk, np.maximum(before, 0.0))
                + np.where(decode[mixed] > 0, beside, 0.0)
            )
        host = self._host.base_s + self._host.sequence_s * steps.num_seqs
        return np.asarray(result + host)

    def _attention(
        self, operators: Operators, prefills: Floats, chunk: Floats, before: Floats
    ) -> Floats:
        """Return the seconds of prefill attention: a prefill without everything else."""
        values = np.empty((len(prefills), len(chunk), len(before)))
        largest = max(prefills[-1], chunk[-1]) * 2
        for (i, s), (j, n) in product(enumerate(prefills), enumerate(chunk)):
            if s * n > largest:  # beyond the token budget; goes on as the last one within
                share = values[i - 1, j] if i else values[i, j - 1]
                values[i, j] = share * (s / prefills[i - 1] if i else n / chunk[j - 1])
                continue
            rest = operators.shared_s(int(s * n))
            for k, c in enumerate(before):
                whole = operators.prefill_s(int(s), int(n), int(c))
                values[i, j, k] = max(whole - rest, 0.0)
        return values


def _spaced(first: int, last: int, ratio: float) -> Floats:
    """Return whole numbers from ``first`` to ``last``, each about ``ratio`` times the last."""
    count = int(np.ceil(np.log(last / first) / np.log(ratio))) + 1
    return np.unique(np.round(np.geomspace(first, last, max(count, 2))))


def _stepped(last: int, parts: tuple[tuple[int, int], ...]) -> Floats:
    """Return 1 to ``last`` (at least 2) in steps that widen at bounds."""
    found, at = [1], 1
    for bound, step in parts:
        while at < min(bound, last):
            at = min((at // step + 1) * step, last)
            found.append(at)
    return np.array(found if len(found) > 1 else [1, 2], dtype=np.float64)
