"""Collects what a run measures, and keeps it for the next plan on this machine."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from samullm_plugin.model.latency import StepTable
from samullm_plugin.model.problem import ModeKey, Problem
from samullm_plugin.model.types import Floats
from samullm_plugin.profiling.calibration import (
    Calibration,
    LengthRow,
    add_calibration,
    add_lengths,
    add_start_factors,
    joined_steps,
    setting_key,
    start_factor,
)
from samullm_plugin.profiling.loading import ASSUMED, SCALED
from samullm_plugin.run.ledger import Ledger, Status


@dataclass(slots=True)
class Calibrator:
    """Gathers iterations by node and replica size while a run goes on.

    Attributes:
        problem: what is run.
    """

    problem: Problem
    _steps: dict[tuple[int, ModeKey], list[tuple[StepTable, Floats]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _starts: dict[tuple[int, ModeKey], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add_steps(self, node: int, key: ModeKey, steps: StepTable, seconds: Floats) -> None:
        """Take iterations of one replica."""
        usable = seconds > 0
        if usable.all():
            self._steps[node, key].append((steps, seconds))

    def add_start(self, node: int, key: ModeKey, seconds: float) -> None:
        """Take the seconds of one engine start."""
        self._starts[node, key].append(seconds)

    def keep(self, ledger: Ledger) -> int:
        """Keep what was gathered; return how many iterations that are."""
        merged: dict[str, tuple[int, ModeKey, list[tuple[StepTable, Floats]], list[int]]] = {}
        for (node, key), parts in self._steps.items():
            model = self.problem.app.nodes[node].model
            if self._holds_here_only(key):
                continue
            setting = setting_key(
                model, key.gpu, key.tensor_parallel_size, key.pipeline_parallel_size
            )
            entry = merged.setdefault(setting, (node, key, [], []))
            entry[2].extend(parts)
            entry[3].append(node)
        count = 0
        for setting, (node, key, parts, nodes) in merged.items():
            steps, seconds = joined_steps(parts)
            starts = [s for n in nodes for s in self._starts.get((n, key), ())]
            new = Calibration(steps, seconds, len(seconds), tuple(starts))
            about = {
                "model": self.problem.app.nodes[node].model.name,
                "device": key.gpu,
                "tensor_parallel_size": key.tensor_parallel_size,
            }
            if add_calibration(setting, new, about):
                count += len(seconds)
        for (node, key), took_s in self._starts.items():
            load = self.problem.costs[node][key].load
            before = {ASSUMED: 1.0, SCALED: start_factor(key.gpu)}.get(load.source)
            if before is not None and load.warm_s > 0 and not self._holds_here_only(key):
                add_start_factors(key.gpu, [before * s / load.warm_s for s in took_s])
        for i, used in enumerate(self.problem.app.nodes):
            if rows := self._lengths(i, ledger):
                add_lengths(used.model, rows)
        return count

    def _holds_here_only(self, key: ModeKey) -> bool:
        """Return whether what was measured holds for this network or beside these engines only."""
        size = key.tensor_parallel_size, key.pipeline_parallel_size
        cluster = self.problem.cluster
        shared = cluster.gpus[cluster.kinds.index(key.gpu)].engines > 1
        return shared or cluster.machines_per_replica(key.gpu, *size) > 1

    def _lengths(self, node: int, ledger: Ledger) -> list[LengthRow]:
        """Return the output lengths of a node's finished requests."""
        found: list[LengthRow] = []
        table = self.problem.app.nodes[node].requests
        prompts = table.prompt_tokens
        tokens, cut = ledger.generated[node], ledger.cut[node]
        done = (ledger.status[node] == Status.FINISHED) & (tokens > 0)
        done &= table.max_tokens > 1  # else there is nothing to learn
        for part in self.problem.app.nodes[node].parts:
            for r in part.place(np.flatnonzero(done[part.rows])).tolist():
                found.append((part.task, int(prompts[r]), int(tokens[r]), bool(cut[r])))
        return found
