"""What the coordinating process knows of one engine replica."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from samullm_plugin import EngineRequest, EngineSpec, RequestOutput
from samullm_plugin.engine import StepTable
from samullm_plugin.model.types import Floats
from samullm_vllm.launching import Launched
from samullm_vllm.protocol import STEP_COLUMNS, Beat

Phase = Literal[
    "preparing", "prepared", "starting", "ready", "dozing", "asleep", "failed", "stopped"
]
"""``dozing``: on its way to sleep."""


@dataclass(slots=True, eq=False)
class Replica:
    """One engine, its requests and what came of them so far.

    Attributes:
        spec: what it is.
        launched: its processes.
        log: path of its log, for messages.
        phase: where in its life it is.
        unfinished: its requests by number, as submitted.
        tokens: tokens heard of, by request.
        silent_s: how long nothing was heard of it while somebody listened.
        snapshot: its answer to being stopped.
        lag_s: real seconds by which its modelled iterations have come late.
        start_parts: seconds of its start by part.
        waits: replicas on its devices that do not sleep yet.
        asleep: it has given its devices away.
    """

    spec: EngineSpec
    launched: Launched
    log: str
    phase: Phase = "starting"
    unfinished: dict[int, EngineRequest] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    silent_s: float = 0.0
    snapshot: tuple[RequestOutput, ...] | None = None
    lag_s: float = 0.0
    start_parts: Mapping[str, float] = field(default_factory=dict)
    waits: set[str] = field(default_factory=set)
    asleep: bool = False
    _steps: list[bytes] = field(default_factory=list)

    def submitted(self, requests: Iterable[EngineRequest]) -> None:
        """Note requests given to it."""
        for request in requests:
            self.unfinished[request.request] = request
            self.tokens[request.request] = []

    def heard(self, beat: Beat) -> None:
        """Note what a heartbeat reports."""
        ids, at = np.frombuffer(beat.token_ids, dtype=np.int32).tolist(), 0
        for request, count in zip(beat.requests, beat.counts, strict=True):
            if request in self.tokens:
                self.tokens[request] += ids[at : at + count]
            at += count
        if beat.steps:
            self._steps.append(beat.steps)
        self.lag_s = beat.lag_s

    def finished(self, outputs: Sequence[RequestOutput]) -> tuple[RequestOutput, ...]:
        """Note requests that ended; return those it really had."""
        known = tuple(o for o in outputs if o.request in self.unfinished)
        for output in known:
            del self.unfinished[output.request], self.tokens[output.request]
        return known

    def cut_off(self) -> list[RequestOutput]:
        """Return the unfinished requests: from its own snapshot, or else as far as was heard."""
        told = {o.request: o for o in self.snapshot or () if o.request in self.unfinished}
        outputs = []
        for request in self.unfinished:
            if request in told:
                outputs.append(told[request])
                continue
            ids = tuple(self.tokens[request])
            outputs.append(RequestOutput(request, len(ids), ids))
        return outputs

    def take_steps(self) -> tuple[StepTable, Floats]:
        """Return the iterations since the last call and their seconds."""
        rows = np.frombuffer(b"".join(self._steps), dtype=np.float64)
        self._steps.clear()
        table = rows.reshape(-1, len(STEP_COLUMNS))
        column = {name: table[:, i] for i, name in enumerate(STEP_COLUMNS)}
        steps = StepTable(
            num_seqs=column["num_seqs"].astype(np.int64),
            num_tokens=column["num_tokens"].astype(np.int64),
            prefill_seqs=column["prefill_seqs"].astype(np.int64),
            prefill_tokens=column["prefill_tokens"].astype(np.int64),
            prefill_pairs=column["prefill_pairs"].copy(),
            context_tokens=column["context_tokens"].copy(),
            longest_tokens=column["longest_tokens"].copy(),
        )
        return steps, column["seconds"].copy()
