"""Iteration time as the sum of its layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from samullm_layers.tables import ONCE, PER_LAYER, LayerTables, Series
from samullm_plugin import ModelArchitecture, StepTable
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.profiling.grid import Grid, fill_holes


@dataclass(frozen=True, slots=True)
class Link:
    """Connection of the devices of a tensor-parallel group.

    Attributes:
        bytes_per_s: bytes a device sends per second.
        latency_s: seconds of one transfer besides.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def all_reduce_s(self, num_bytes: Floats, devices: int) -> Floats:
        """Return the seconds of an all-reduce of ``num_bytes`` on every device.

        The faster of sending everything to everyone at once, as vLLM's own all-reduce does with
        small messages, and of a ring in ``2 * (devices - 1)`` transfers of a share each.
        """
        others = devices - 1
        direct = self.latency_s + others * num_bytes / self.bytes_per_s
        ring = 2 * others * (self.latency_s + num_bytes / devices / self.bytes_per_s)
        return np.minimum(direct, ring)


class LayerSteps:
    """Seconds of iterations from layer tables.

    An iteration is: embedding, all transformer layers, final norm, LM head, sampler. Matrix
    products, norms and activations depend on the scheduled tokens, LM head and sampler on the
    sequences, attention on the prefill chunk, the tokens before it, the decode sequences and their
    lengths. Several prefill sequences count as the one chunk of as many tokens and query-key
    pairs. Decode sequences of unequal lengths lie between a batch all of mean and one all of the
    greatest length, at the measured share of the way.
    """

    def __init__(
        self,
        tables: LayerTables,
        architecture: ModelArchitecture,
        size: int,
        link: Link | None = None,
        host_s: float = 0.0,
        *,
        overlap_host: bool = True,
    ) -> None:
        """Tabulate the sums of layers.

        Args:
            tables: measured layers.
            architecture: sizes of the whole model; its layers are counted, its width communicated.
            size: tensor-parallel size.
            link: connection of the devices, if the tables hold no ``all_reduce`` layer.
            host_s: seconds of the host per iteration.
            overlap_host: they are hidden behind the device (asynchronous scheduling).
        """
        self._layers = architecture.num_layers
        self._host_s, self._overlap = host_s, overlap_host
        parts = [(tables.dense[n], float(architecture.num_layers * k))
                 for n, k in PER_LAYER.items() if n in tables.dense]  # fmt: skip
        parts += [(tables.dense[name], 1.0) for name in ONCE if name in tables.dense]
        knots = np.unique(np.concatenate([x for (x, _), _ in parts]))
        seconds = sum((k * _line(s, knots) for s, k in parts), np.zeros(len(knots)))
        if link is not None and size > 1:
            message = knots * architecture.hidden_size * architecture.dtype_bytes
            seconds += 2 * architecture.num_layers * link.all_reduce_s(message, size)
        self._by_tokens = knots, seconds
        knots = np.unique(np.concatenate([x for x, _ in tables.per_sequence.values()]))
        sampling = sum((_line(s, knots) for s in tables.per_sequence.values()), np.zeros(1))
        self._by_seqs = knots, sampling
        self._attention = _attention_grid(tables)
        self._skew = _Skew(tables)

    def step_seconds(self, steps: StepTable) -> Floats:
        """Return the seconds of each iteration, shape ``(len(steps),)``."""
        device = (
            _line(self._by_tokens, steps.num_tokens)
            + _line(self._by_seqs, steps.num_seqs)
            + self._layers * self._attention_s(steps)
        )
        if self._overlap:
            return np.maximum(device, self._host_s)
        return device + self._host_s

    def _attention_s(self, steps: StepTable) -> Floats:
        """Return the seconds of attention in one layer."""
        chunk, before = _one_chunk(steps)
        decode = (steps.num_seqs - steps.prefill_seqs).astype(np.float64)
        mean = steps.context_tokens / np.maximum(decode, 1)
        seconds = self._attention.at(chunk, before, decode, mean)
        if self._skew.absent:
            return seconds
        skewed = np.flatnonzero((decode > 1) & (steps.longest_tokens > mean))
        if len(skewed):
            batch = chunk[skewed], before[skewed], decode[skewed]
            longest = steps.longest_tokens[skewed]
            share = self._skew.share(*batch, mean[skewed], longest)
            gap = self._attention.at(*batch, longest) - seconds[skewed]
            seconds[skewed] += share * np.maximum(gap, 0.0)
        return seconds


def _one_chunk(steps: StepTable) -> tuple[Floats, Floats]:
    """Return the prefill chunk and the tokens before it that have the rows' tokens and pairs.

    Exact for one prefill sequence. Several fresh prompts have fewer pairs than one of as many
    tokens; they count as the one prompt of as many pairs.
    """
    tokens = steps.prefill_tokens.astype(np.float64)
    before = steps.prefill_pairs / np.maximum(tokens, 1) - (tokens + 1) / 2
    alone = (np.sqrt(8 * np.maximum(steps.prefill_pairs, 0) + 1) - 1) / 2
    return np.where(before < 0, np.minimum(alone, tokens), tokens), np.maximum(before, 0.0)


def _line(series: Series, x: Ints | Floats) -> Floats:
    """Return a series at ``x``, its last segment going on."""
    knots, values = series
    result = np.interp(x, knots, values)
    slope = max((values[-1] - values[-2]) / (knots[-1] - knots[-2]), 0.0)
    return np.asarray(result + slope * np.maximum(x - knots[-1], 0))


def _attention_grid(tables: LayerTables) -> Grid:
    """Return attention seconds on the full grid of all measured coordinates."""
    axes = []
    for column in range(4):
        found = np.unique(np.append(tables.attention[:, column], 0.0))
        axes.append(found if len(found) > 1 else np.array([0.0, 1.0]))
    values = np.full([len(a) for a in axes], np.nan)
    index = tuple(np.searchsorted(a, tables.attention[:, k]) for k, a in enumerate(axes))
    values[index] = tables.attention_s
    # Without prefill nothing lies before it, without decode sequences they have no length.
    values[0, :, :, :] = values[0, :1, :, :]
    values[:, :, 0, :] = values[:, :, 0, :1]
    values[0, :, 0, :] = 0.0
    values[:, :, 1:, 0] = values[:, :, 1:, 1]  # decode sequences shorter than any measured
    return Grid(tuple(axes), fill_holes(values, tuple(axes)))


class _Skew:
    """Share of the way from all-mean to all-longest, by the cells of the skew table."""

    def __init__(self, tables: LayerTables) -> None:
        """Lay the cells out as an array."""
        self._default = tables.default_share
        self._axes = [np.unique(tables.skew[:, k]) for k in range(5)]
        self._cells = np.full([len(a) for a in self._axes], np.nan)
        if len(tables.skew):
            index = tuple(np.searchsorted(a, tables.skew[:, k]) for k, a in enumerate(self._axes))
            self._cells[index] = tables.skew_share

    @property
    def absent(self) -> bool:
        """Return whether all shares are 0."""
        return self._cells.size == 0 and self._default == 0.0

    def share(
        self, chunk: Floats, before: Floats, decode: Floats, mean: Floats, longest: Floats
    ) -> Floats:
        """Return the shares of ``m`` batches.

        The table's skew rate is where the mean lies between shortest and longest; iterations do
        not tell their shortest sequence, so it counts as empty.
        """
        if self._cells.size == 0:
            return np.full(len(chunk), self._default)
        nearest = np.abs(self._axes[0][None, :] - chunk[:, None]).argmin(axis=1)
        index = [nearest]
        inside = np.ones(len(chunk), dtype=bool)
        for axis, x in zip(
            self._axes[1:], (decode, mean / np.maximum(longest, 1), longest, before), strict=True
        ):
            cell = np.searchsorted(axis, x)
            inside &= cell < len(axis)
            index.append(np.minimum(cell, len(axis) - 1))
        found = self._cells[tuple(index)]
        return np.where(inside & ~np.isnan(found), found, self._default)
