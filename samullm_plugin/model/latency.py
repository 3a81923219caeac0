"""Iteration latency in the two forms the engine simulation can evaluate.

A :class:`StepLatency` is data: the compiled loop evaluates it step by step and in closed form over
runs of unchanged decode steps. Anything else that answers :class:`StepModel` is called with whole
tables of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.types import Floats, Ints

LONGEST_S = 86_400.0
"""What no term of an iteration comes to: sums of much longer ones leave the range of compiled code,
which checks nothing."""


@dataclass(frozen=True, slots=True)
class StepTable:
    """Composition of iterations, one row per iteration, columns of equal length ``m``.

    A *decode* sequence computes exactly its one newest token; every other scheduled sequence is a
    *prefill* (a prompt, a chunk of one, or the recomputation after a preemption).

    Attributes:
        num_seqs: scheduled sequences (prefill and decode).
        num_tokens: scheduled tokens (prefill tokens plus one per decode sequence).
        prefill_seqs: scheduled prefill sequences.
        prefill_tokens: tokens of the prefill sequences.
        prefill_pairs: query-key pairs of the prefill sequences: the sum over them of
            ``n * c + n * (n + 1) / 2`` for ``n`` tokens after ``c`` computed ones.
        context_tokens: sum over decode sequences of their length including the current token.
        longest_tokens: longest such length (0 without decode sequences).
    """

    num_seqs: Ints
    num_tokens: Ints
    prefill_seqs: Ints
    prefill_tokens: Ints
    prefill_pairs: Floats
    context_tokens: Floats
    longest_tokens: Floats

    def __len__(self) -> int:
        """Return the number of iterations."""
        return len(self.num_seqs)


@runtime_checkable
class StepModel(Protocol):
    """Seconds of iterations, asked for a whole table at a time."""

    def step_seconds(self, steps: StepTable) -> Floats:
        """Return the seconds of each iteration, shape ``(len(steps),)``."""
        ...


@dataclass(frozen=True, slots=True)
class Rescaled:
    """Another model's latencies, times a factor."""

    model: StepModel
    factor: float

    def step_seconds(self, steps: StepTable) -> Floats:
        """Return the seconds of each iteration, shape ``(len(steps),)``."""
        return np.asarray(self.model.step_seconds(steps) * self.factor)


@dataclass(frozen=True, slots=True)
class Curve:
    """A function of a whole number given at knots, linear between them.

    Before the first knot its value is the first value; beyond the last knot the last segment goes
    on. Because arguments are whole numbers, a tile step after 16 is the two knots 16 and 17.

    Attributes:
        knots: increasing arguments, shape ``(k,)``, ``k >= 1``.
        values: seconds at the knots, shape ``(k,)``.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse knots that do not increase or values that are not finite.

        Raises:
            InputError: naming what is wrong.
        """
        if not self.knots or len(self.knots) != len(self.values):
            raise InputError("latency curve: knots and values must be of one length, at least 1")
        if any(b <= a for a, b in zip(self.knots, self.knots[1:], strict=False)):
            raise InputError("latency curve: knots must increase")
        if not np.isfinite(self.values).all():
            raise InputError("latency curve: values must be finite")

    @classmethod
    def constant(cls, value_s: float) -> Curve:
        """Return the curve that is ``value_s`` everywhere."""
        return cls((0.0,), (float(value_s),))

    @classmethod
    def line(cls, base_s: float, slope_s: float) -> Curve:
        """Return ``base_s + slope_s * x``."""
        return cls((0.0, 1.0), (float(base_s), float(base_s + slope_s)))

    def at(self, x: Ints | Floats) -> Floats:
        """Return the values at ``x`` (any shape)."""
        arguments = np.asarray(x, dtype=np.float64)
        result = np.interp(arguments, self.knots, self.values)
        if len(self.knots) > 1:
            slope = (self.values[-1] - self.values[-2]) / (self.knots[-1] - self.knots[-2])
            beyond = arguments - self.knots[-1]
            result = np.where(beyond > 0, self.values[-1] + slope * beyond, result)
        return np.asarray(result, dtype=np.float64)

    def table(self, largest: int) -> Floats:
        """Return the values at 0, 1, ..., ``largest``, shape ``(largest + 1,)``."""
        return self.at(np.arange(largest + 1))


def iteration_seconds(
    latency: Any,
    by_tokens_s: Any,
    by_seqs_s: Any,
    host_s: Any,
    decode_seqs: Any,
    prefill_seqs: Any,
    prefill_tokens: Any,
    prefill_pairs: Any,
    context_tokens: Any,
    longest_tokens: Any,
) -> Any:
    """Return the seconds of iterations: the formula of :class:`StepLatency`.

    For numbers or arrays alike, so that tables of iterations, the compiled engine loop and emulated
    engines share it.

    Args:
        latency: has the scalar fields of a ``StepLatency`` as attributes.
        by_tokens_s: its curve ``by_tokens`` at the scheduled tokens.
        by_seqs_s: its curve ``by_seqs`` at the scheduled sequences.
        host_s: its curve ``host_by_seqs`` there.
        decode_seqs: decode sequences.
        prefill_seqs: see :class:`StepTable`, as the others.
        prefill_tokens: of prefill sequences.
        prefill_pairs: query-key pairs of the prefill sequences.
        context_tokens: of all decode sequences.
        longest_tokens: of the longest decode sequence.
    """
    prefills = prefill_seqs > 0
    lone_s = latency.longest_token_s * (decode_seqs > latency.longest_over_seqs) * longest_tokens
    work = (
        by_tokens_s
        + by_seqs_s
        + latency.prefill_token_s * prefill_tokens
        + latency.prefill_seq_s * prefill_seqs
        + latency.prefill_pair_s * prefill_pairs
        + latency.prefill_step_s * prefills
        + np.maximum(latency.context_token_s * context_tokens, lone_s)
    )
    # One of the two products is 0 and the other the launch time as it is.
    launch = latency.launch_s * (prefill_seqs == 0) + latency.prefill_launch_s * prefills
    device = np.maximum(work, launch)
    return np.maximum(device, host_s) if latency.overlap_host else device + host_s


@dataclass(frozen=True, slots=True)
class StepLatency:
    """Piecewise-linear iteration latency, evaluated inside the compiled loop.

    ``work_s = by_tokens(num_tokens) + by_seqs(num_seqs) + prefill_token_s * prefill_tokens
    + prefill_seq_s * prefill_seqs + prefill_pair_s * prefill_pairs
    + prefill_step_s (if anything is prefilled)
    + max(context_token_s * context_tokens, longest_token_s * longest_tokens)``, where the longest
    sequence counts only with more than ``longest_over_seqs`` decode sequences;
    ``device_s = max(work_s, launch_s)``, or ``prefill_launch_s`` if anything is prefilled;
    ``host_s = host_by_seqs(num_seqs)``; an iteration takes their sum, or with
    ``overlap_host`` (asynchronous scheduling) the larger of the two.

    Attributes:
        by_tokens: weights read once, matrix products and their tile steps, by scheduled tokens.
        by_seqs: logits and whatever else the device does per sequence.
        prefill_token_s: extra seconds per prefill token.
        prefill_pair_s: seconds per query-key pair of prefill attention.
        context_token_s: seconds per token of context read by decode attention.
        longest_token_s: seconds per token of the longest decode sequence (a lone long sequence
            cannot use the whole device).
        host_by_seqs: preparation, sampling and output handling on the host.
        overlap_host: host time is hidden behind the device (asynchronous scheduling).
        prefill_seq_s: extra seconds per prefill sequence.
        launch_s: least device time of a decode iteration: launching its kernels one by one.
        prefill_launch_s: the same with a prefill in the iteration.
        prefill_step_s: extra seconds of an iteration in which anything is prefilled: kernels for
            a number of tokens that was not met before, no recorded graph of the decode step.
        longest_over_seqs: decode sequences up to which a long one is spread over the device, so
            that ``longest_token_s`` does not apply.
    """

    by_tokens: Curve
    by_seqs: Curve = Curve((0.0,), (0.0,))
    prefill_token_s: float = 0.0
    prefill_pair_s: float = 0.0
    context_token_s: float = 0.0
    longest_token_s: float = 0.0
    host_by_seqs: Curve = Curve((0.0,), (0.0,))
    overlap_host: bool = False
    prefill_seq_s: float = 0.0
    launch_s: float = 0.0
    prefill_launch_s: float = 0.0
    longest_over_seqs: int = 0
    prefill_step_s: float = 0.0

    def step_seconds(self, steps: StepTable) -> Floats:
        """Return the seconds of each iteration, shape ``(len(steps),)``."""
        seconds = iteration_seconds(
            self,
            self.by_tokens.at(steps.num_tokens),
            self.by_seqs.at(steps.num_seqs),
            self.host_by_seqs.at(steps.num_seqs),
            steps.num_seqs - steps.prefill_seqs,
            steps.prefill_seqs,
            steps.prefill_tokens,
            steps.prefill_pairs,
            steps.context_tokens,
            steps.longest_tokens,
        )
        return np.asarray(seconds)

    def aggregated(self, factor: float) -> StepLatency:
        """Return the latency of iterations whose every sequence and token counts ``factor`` times.

        The longest sequence is as long as it was.
        """

        def of(curve: Curve) -> Curve:
            return Curve(tuple(k / factor for k in curve.knots), curve.values)

        return replace(
            self,
            by_tokens=of(self.by_tokens),
            by_seqs=of(self.by_seqs),
            host_by_seqs=of(self.host_by_seqs),
            prefill_token_s=self.prefill_token_s * factor,
            prefill_pair_s=self.prefill_pair_s * factor,
            prefill_seq_s=self.prefill_seq_s * factor,
            context_token_s=self.context_token_s * factor,
            longest_over_seqs=round(self.longest_over_seqs / factor),
        )

    def scaled(self, factor: float) -> StepLatency:
        """Return this latency with every duration multiplied by ``factor``."""

        def times(name: str, kind: object) -> Any:
            value = getattr(self, name)
            if isinstance(value, Curve):
                return Curve(value.knots, tuple(v * factor for v in value.values))
            return value * factor if kind == "float" else value

        return StepLatency(**{f.name: times(f.name, f.type) for f in fields(self)})


CURVES = tuple(f.name for f in fields(StepLatency) if f.type == "Curve")
"""Fields of a :class:`StepLatency` that are curves; the others are numbers."""


def rescaled(model: StepModel, factor: float) -> StepModel:
    """Return a model all of whose iterations take longer by a factor."""
    return model.scaled(factor) if isinstance(model, StepLatency) else Rescaled(model, factor)
