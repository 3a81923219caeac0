"""The state of one simulation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from samullm_plugin.engine.batch_queue import advance_queue
from samullm_plugin.engine.jit import announced_compilation
from samullm_plugin.engine.loop import advance
from samullm_plugin.engine.records import Array, Record
from samullm_plugin.model.types import Floats, Ints, SmallInts


@dataclass(slots=True)
class QueueState:
    """What ``batch_queue`` needs besides, with ``k`` KV cache groups and ``d`` batches in flight.

    Attributes:
        tracks: shape ``(n,)``.
        batches: ring of the batches in flight, shape ``(d,)``.
        batch_seqs: their sequences, shape ``(d, m)``.
        stages: when each pipeline stage is free.
        groups: shape ``(k,)``.
        held: what each group holds of each slot, and one to spare, shape ``(k, m + 1)``.
        group_table: the blocks, shape ``(k, m + 1, most)``.
        chain: hashes of the tokens of each slot, shape ``(m + 1, most)``.
    """

    tracks: Array
    batches: Array
    batch_seqs: Array
    stages: Floats
    groups: Array
    held: Array
    group_table: SmallInts
    chain: Ints

    def copy(self) -> QueueState:
        """Return an independent copy."""
        return QueueState(*(getattr(self, f.name).copy() for f in fields(self)))


@dataclass(slots=True)
class EngineState:
    """Everything about a simulation under way: the arguments of the loop, in its order.

    With ``n`` requests, ``m`` running slots (most sequences that run at once) and blocks of ``b``
    tokens; the types of the rows are in ``records``.

    Attributes:
        s: settings, progress and clocks.
        requests: shape ``(n,)``.
        slots: shape ``(m,)``.
        finish_wheel: for each decode step to come, modulo its length (a power of two), the first of
            the slots whose last token it computes, or -1.
        phases: decode sequences whose offsets are equal modulo ``b``: how many, and with prefix
            caching the first and the last in running order; shape ``(b,)``.
        successors: row 0: where those of each request begin in row 1, which holds them.
        blocks: KV blocks (prefix caching only, as all until ``prompt_hash``), shape
            ``(num_blocks + 1,)``.
        buckets: first block of each hash bucket, or -1; as many as a power of two.
        table: blocks of each slot, and a row to spare, shape ``(m + 1, most)``.
        prompt_hash: chained hashes of the full prompt blocks of all requests.
        latency: the scalar fields of a ``StepLatency``.
        tables: its curves, shape ``(tokens,)``.
        curve: the progress curve.
        log: recorded steps.
        entries: request and tokens of every scheduled sequence.
        preempted: requests preempted in recorded steps.
        queue: what only ``batch_queue`` needs, or None: ``loop`` runs the engine.
    """

    s: Record
    requests: Array
    slots: Array
    finish_wheel: Ints
    phases: Array
    successors: Ints
    blocks: Array
    buckets: SmallInts
    table: SmallInts
    prompt_hash: Ints
    latency: Record
    tables: Array
    curve: Array
    log: Array
    entries: Array
    preempted: SmallInts
    queue: QueueState | None = None

    def advance(self) -> int:
        """Run on until something stops the loop; return what (the last names in ``records``)."""
        why: int
        q = self.queue
        if q is None:
            with announced_compilation(advance):
                why = advance(*(getattr(self, name) for name in _ARGUMENTS))
            return why
        with announced_compilation(advance_queue):
            why = advance_queue(
                self.s, self.requests, self.slots, q.tracks, q.batches, q.batch_seqs, q.stages,
                self.blocks, self.buckets, q.groups, q.held, q.group_table, q.chain,
                self.prompt_hash, self.successors, self.latency, self.tables, self.curve, self.log,
                self.entries, self.preempted,
            )  # fmt: skip
        return why

    def copy(self) -> EngineState:
        """Return a state to come back to; what a run only reads or appends to is shared."""
        return replace(
            self,
            **{name: getattr(self, name).copy() for name in _ARGUMENTS if name not in _SHARED},
            queue=None if self.queue is None else self.queue.copy(),
        )


_ARGUMENTS = tuple(f.name for f in fields(EngineState) if f.name != "queue")
_SHARED = {"successors", "prompt_hash", "latency", "tables", "log", "entries", "preempted"}
