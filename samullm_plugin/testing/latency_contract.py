"""The contract of latency models.

Subclass it in a test module, and every rule becomes a test::

    class TestMine(LatencyModelContract):
        latency_class = MyLatency
"""

from __future__ import annotations

from typing import ClassVar, get_args

import numpy as np

from samullm_plugin.host.interfaces.latency import LatencyModel
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.model.costs import LoadTimes, Provenance, ProvenanceKind
from samullm_plugin.model.latency import StepModel, StepTable
from samullm_plugin.model.types import Floats
from samullm_plugin.testing.factories import TINY_ARCHITECTURE
from samullm_plugin.testing.rules import require

SLACK = 0.02
"""Share by which more work may seem to take less, as measured figures do."""


def step_table(rows: list[tuple[int, int, int, int, int]]) -> StepTable:
    """Return iterations from rows of five figures.

    Decode sequences, the context of each, prefill sequences, the new tokens of each, and how many
    tokens were computed before them.
    """
    data = np.array(rows, dtype=np.int64).reshape(-1, 5)
    decode, context, prefill, tokens, cached = data.T
    return StepTable(
        num_seqs=decode + prefill,
        num_tokens=decode + prefill * tokens,
        prefill_seqs=prefill,
        prefill_tokens=prefill * tokens,
        prefill_pairs=prefill * (tokens * cached + tokens * (tokens + 1) / 2),
        context_tokens=(decode * context).astype(np.float64),
        longest_tokens=np.where(decode > 0, context, 0).astype(np.float64),
    )


class LatencyModelContract:
    """Rules every latency model keeps.

    Attributes:
        latency_class: the class under test.
        options: its options.
        model: a model it knows.
        gpu: a device it knows.
        sizes: tensor-parallel sizes it knows.
    """

    latency_class: ClassVar[type[LatencyModel]]
    options: ClassVar[dict[str, object]] = {}
    model: ClassVar[ModelSpec] = ModelSpec("contract-model", 2048, TINY_ARCHITECTURE)
    gpu: ClassVar[Gpu] = Gpu("A100-80GB", 80 * 2**30)
    sizes: ClassVar[tuple[int, ...]] = (1, 2)

    def make(self) -> LatencyModel:
        """Return a new instance."""
        return self.latency_class(self.latency_class.Config.model_validate(self.options))

    def step_model(self, size: int) -> StepModel:
        """Return the iteration latency at one size."""
        found = self.make().step_latency(self.model, self.gpu, size)
        require(isinstance(found, StepModel), "step-model", f"got a {type(found).__name__}")
        return found

    def seconds(self, size: int, rows: list[tuple[int, int, int, int, int]]) -> Floats:
        """Return the seconds of iterations."""
        return np.asarray(self.step_model(size).step_seconds(step_table(rows)))

    def test_positive(self) -> None:
        """Every iteration takes a positive, finite time."""
        rows = [(1, 1, 0, 0, 0), (1, 2000, 0, 0, 0), (256, 300, 0, 0, 0), (0, 0, 1, 1, 0),
                (0, 0, 4, 512, 0), (100, 500, 2, 700, 100), (0, 0, 1, 2047, 0)]  # fmt: skip
        for size in self.sizes:
            found = self.seconds(size, rows)
            require(found.shape == (len(rows),), "shape", f"{found.shape} for {len(rows)} rows")
            require(np.isfinite(found).all(), "finite", f"tp{size}: {found}")
            require((found > 0).all(), "positive", f"tp{size}: {found.min()} s")

    def test_row_by_row(self) -> None:
        """A table gives what its rows give one at a time, and the same again."""
        rows = [(3, 100, 1, 50, 0), (64, 700, 0, 0, 0), (0, 0, 2, 333, 40)]
        for size in self.sizes:
            whole = self.seconds(size, rows)
            single = np.concatenate([self.seconds(size, [r]) for r in rows])
            require(
                np.allclose(whole, single, rtol=1e-9), "row-by-row", f"{whole} against {single}"
            )
            again = self.seconds(size, rows)
            require(np.array_equal(whole, again), "deterministic", f"{whole}, then {again}")

    def test_more_work_takes_longer(self) -> None:
        """More sequences, context or prompt tokens do not make an iteration shorter."""
        series = {
            "sequences": [(b, 400, 0, 0, 0) for b in (1, 8, 32, 64, 128, 256)],
            "context": [(64, c, 0, 0, 0) for c in (10, 100, 500, 1000, 2000)],
            "prompt tokens": [(0, 0, 1, t, 0) for t in (16, 64, 256, 1024, 2000)],
            "prompts": [(0, 0, p, 256, 0) for p in (1, 2, 4, 8, 16)],
            "decodes beside a prompt": [(b, 200, 1, 256, 0) for b in (0, 16, 64, 200)],
        }
        for size in self.sizes:
            for what, rows in series.items():
                found = self.seconds(size, rows)
                highest = np.maximum.accumulate(found)
                drop = float((1 - found / highest).max())
                require(drop <= SLACK, "monotone", f"tp{size}, more {what}: {found}")

    def test_memory(self) -> None:
        """KV capacities are whole, not negative, and grow with the devices of a replica."""
        model = self.make()
        found = [model.kv_cache_tokens(self.model, self.gpu, s) for s in self.sizes]
        whole = all(isinstance(k, int | np.integer) for k in found)
        require(whole, "kv-tokens", f"{found} are not whole numbers")
        require(min(found) >= 0, "kv-tokens", f"{found} has a negative capacity")
        require(found == sorted(found), "kv-tokens", f"{found} falls with more devices")

    def test_load_times(self) -> None:
        """Engine starts take a positive time, cold ones no less than warm ones."""
        for size in self.sizes:
            load = self.make().load_times(self.model, self.gpu, size)
            require(isinstance(load, LoadTimes), "load-times", f"got a {type(load).__name__}")
            ordered = 0 < load.warm_s <= load.cold_s < float("inf")
            require(ordered, "load-times", f"warm {load.warm_s} s, cold {load.cold_s} s")

    def test_provenance(self) -> None:
        """The model says where its figures come from."""
        for size in self.sizes:
            origin = self.make().provenance(self.model, self.gpu, size)
            require(isinstance(origin, Provenance), "provenance", f"got {type(origin).__name__}")
            known = origin.kind in get_args(ProvenanceKind)
            require(known, "provenance", f"unknown kind {origin.kind!r}")
            require(bool(origin.source), "provenance", "no source is named")
