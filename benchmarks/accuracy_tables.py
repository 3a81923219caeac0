"""What the accuracy benchmarks share: the measurements, read once, and how tables look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samullm_plugin.profiling.device_fit import HostFitted
from samullm_plugin.profiling.fit import fit_group
from samullm_plugin.profiling.fitting import StepFit
from samullm_plugin.profiling.iterations import Iterations, read_architectures, read_iterations
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
