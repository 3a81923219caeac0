"""What the accuracy benchmarks share: the measurements, how tables look; KV blocks and starts."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.kv_cache import pool_block_bytes
from samullm_plugin.profiling.device_fit import HostFitted
from samullm_plugin.profiling.fit import fit_group
from samullm_plugin.profiling.fitting import StepFit
from samullm_plugin.profiling.iterations import Iterations, read_architectures, read_iterations
from samullm_plugin.profiling.loading import fit_loading
from samullm_plugin.profiling.memory import (
    BatchLimits,
    RecordedStart,
    fit_memory,
    kv_cache_blocks,
    replica_groups,
)
from samullm_plugin.profiling.transfer import FittedLatency

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@dataclass(frozen=True, slots=True)
class Report:
    """One table.

    Attributes:
        title: heading.
        note: what was done.
        columns: headings of the columns.
        rows: cells.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"## {self.title}", "", self.note, "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "---|" * len(self.columns))
        lines += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.1f}"
    return str(value)


class Data:
    """The measurements, read once."""

    def __init__(self) -> None:
        self.architectures = read_architectures(DATA / "model_architectures.csv")
        self.groups = read_iterations(DATA / "a100_iterations.csv.gz")
        self._fits: dict[tuple[str, int], StepFit] = {}

    def fit(self, rows: Iterations) -> StepFit:
        """Return the fit of all rows of a group."""
        key = (rows.model, rows.tensor_parallel_size)
        if key not in self._fits:
            self._fits[key] = fit_group(rows, self.architectures[rows.model])
        return self._fits[key]

    def measured(self, groups: Sequence[Iterations]) -> list[HostFitted]:
        """Return groups as the device fit takes them."""
        return [
            HostFitted(g, self.architectures[g.model], self.fit(g).latency.host_by_seqs)
            for g in groups
        ]

    def known(self, groups: Sequence[Iterations]) -> list[FittedLatency]:
        """Return groups as transfer takes them."""
        return [
            FittedLatency(
                g.model,
                self.architectures[g.model],
                g.tensor_parallel_size,
                self.fit(g).latency,
                self.fit(g).mape_pct,
            )
            for g in groups
        ]


def memory(data: Data) -> Iterator[Report]:
    """Yield KV blocks of recorded starts, each predicted without it."""
    starts: list[tuple[str, RecordedStart, int, float]] = []
    with (DATA / "a100_engine_meta.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            start = RecordedStart(
                data.architectures[row["model"]],
                int(row["tp"]),
                float(row["peak_memory"]),
                float(row["cache_block_bytes"]),
                BatchLimits(int(row["max_num_batched_tokens"]), int(row["max_num_seqs"])),
            )
            total = float(row["total_gpu_memory"])
            starts.append((row["model"], start, int(row["gpu_blocks"]), total))
    rows: list[list[object]] = []
    for name, start, real, total in starts:
        a, size = start.architecture, start.tensor_parallel_size
        by_formula = kv_cache_blocks(total, 0.9, start.peak_bytes, start.block_bytes)
        cells: list[object] = [name, size, real, by_formula - real]
        for rest in (
            [s for n, s, _, _ in starts if n != name],
            [s for n, s, _, _ in starts if (n, s.tensor_parallel_size) != (name, size)],
        ):
            peak = fit_memory(rest).peak_bytes(a, size, start.limits)
            blocks = kv_cache_blocks(
                total, 0.9, peak, pool_block_bytes(replica_groups(a, EngineOptions(), size))
            )
            cells.append(float(100 * (blocks / real - 1)))
        rows.append(cells)
    worst = [float(np.abs([float(r[i]) for r in rows]).max()) for i in (3, 4, 5)]  # type: ignore[arg-type]  # cells are numbers there
    middle = [float(np.median(np.abs([float(r[i]) for r in rows]))) for i in (3, 4, 5)]  # type: ignore[arg-type]  # cells are numbers there
    rows += [["**median of absolute values**", "", "", *middle], ["**worst**", "", "", *worst]]
    yield Report(
        "KV blocks",
        "Blocks of 16 tokens found by real engine starts; `formula`: vLLM's formula on the "
        "recorded peak memory, difference in blocks; the other columns: peak memory predicted, the "
        "whole model or only this size left out, difference in %. Target: 0, and at most 3.",
        ("model", "tp", "blocks", "formula", "model left out, %", "size left out, %"),
        rows,
    )


def loading(data: Data) -> Iterator[Report]:
    """Yield engine starts with files in the page cache, each model predicted without it."""
    with (DATA / "model_constants.csv").open(encoding="utf-8") as file:
        table = [r for r in csv.DictReader(file) if r["init_cost_s_used"]]
    rows: list[list[object]] = []
    for row in table:
        rest = [r for r in table if r["model"] != row["model"]]
        model = fit_loading(
            [data.architectures[r["model"]].weight_bytes for r in rest],
            [int(r["tp"]) for r in rest],
            [float(r["init_cost_s_used"]) for r in rest],
        )
        real = float(row["init_cost_s_used"])
        a, size = data.architectures[row["model"]], int(row["tp"])
        predicted = model.times(a.weight_bytes, size).warm_s
        rows.append(
            [
                row["model"],
                size,
                a.weight_bytes / 1e9,
                real,
                predicted,
                100 * abs(predicted / real - 1),
            ]
        )
    yield Report(
        "Engine start, files in the page cache",
        "Measured seconds, and predicted from bytes and size with the model left out; the measured "
        "value is what plans use where there is one. File formats (32-bit files, pickled tensors) "
        "and two generations of the machine are not told apart by the model.",
        ("model", "tp", "weights, GB", "measured, s", "predicted, s", "error, %"),
        [*rows, ["**median**", "", "", "", "", float(np.median([float(str(r[5])) for r in rows]))]],
    )
