"""Measured engine iterations of one model at one tensor-parallel size, as columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.model.latency import StepTable
from samullm_plugin.model.types import Bools, Floats, Ints

_STALL_RATIO = 2.0
_STALL_MIN_S = 0.003
"""A host stalled if it took so many times the usual time, and so much longer (choices)."""


@dataclass(frozen=True, slots=True, eq=False)
class Iterations:
    """Measured iterations, one row each.

    Attributes:
        model: model name.
        tensor_parallel_size: devices it ran on.
        device: device name, as the table gives it.
        phase: ``decode``, ``prefill`` or ``mixed``, shape ``(n,)``.
        shape: what the rows were made as, such as ``uniform`` or ``skew``, shape ``(n,)``.
        batch_size: scheduled sequences, shape ``(n,)``.
        steps: composition of the iterations as they were computed. An engine that pads prompts
            computes ``padded_tokens``; those are the tokens here, because vLLM V1 computes only
            real ones: a fit on padded tokens evaluated on real tokens is what V1 would take.
        seconds: whole iteration on the engine, the measuring code's own logging subtracted.
        device_s: device-synchronised model forward, or NaN where it was not measured.
    """

    model: str
    tensor_parallel_size: int
    device: str
    phase: NDArray[np.str_]
    shape: NDArray[np.str_]
    batch_size: Ints
    steps: StepTable
    seconds: Floats
    device_s: Floats

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.seconds)

    def where(self, keep: Bools) -> Iterations:
        """Return the rows for which ``keep`` is true."""
        steps = self.steps
        chosen = StepTable(
            steps.num_seqs[keep],
            steps.num_tokens[keep],
            steps.prefill_seqs[keep],
            steps.prefill_tokens[keep],
            steps.prefill_pairs[keep],
            steps.context_tokens[keep],
            steps.longest_tokens[keep],
        )
        return Iterations(
            self.model,
            self.tensor_parallel_size,
            self.device,
            self.phase[keep],
            self.shape[keep],
            self.batch_size[keep],
            chosen,
            self.seconds[keep],
            self.device_s[keep],
        )

    @property
    def host_s(self) -> Floats:
        """Return the seconds outside the model forward (NaN where that was not measured)."""
        return self.seconds - self.device_s

    def host_stalls(self) -> Floats:
        """Return the seconds by which the host stalled in each row, 0 in most, shape ``(n,)``.

        A row stalled if its host time exceeds twice the usual one of rows with about as many
        sequences in the same phase, and that by at least 3 ms: garbage collection and the like, of
        the measuring process. Rows without a separate device time have no known stall.
        """
        host = self.host_s
        stalls = np.zeros(len(self))
        bands = np.floor(4 * np.log2(np.maximum(self.batch_size, 1))).astype(np.int64)
        for phase in np.unique(self.phase):
            for band in np.unique(bands):
                rows = (self.phase == phase) & (bands == band) & np.isfinite(host)
                # Long-context rows prepare longer inputs: compare like with like.
                tokens = self.steps.context_tokens + self.steps.prefill_tokens
                for part in (tokens > 8 * self.batch_size, tokens <= 8 * self.batch_size):
                    chosen = rows & part
                    if np.count_nonzero(chosen) < 3:
                        continue
                    usual = np.median(host[chosen])
                    stalled = chosen & (host > max(_STALL_RATIO * usual, usual + _STALL_MIN_S))
                    stalls[stalled] = host[stalled] - usual
        return stalls
