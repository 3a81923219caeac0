"""Which requests of a node its engines will be given, and when.

The coordinator deals requests in turn, as their inputs come; so that can be foreseen, and what the
engines make of it be simulated once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samullm_plugin.model.application import ModelNode
from samullm_plugin.model.types import Bools, Floats, Ints
from samullm_plugin.simulator.requests import NodeInputs
from samullm_simulated.engine import Foreseen, SimulatedEngine, Submissions, nothing_foreseen


class NodeRequests:
    """The requests of one node of a model.

    Args:
        node: the node.
        inputs: what its requests wait for.
        prompt_tokens: by request.
        output_tokens: by request, what it will generate; 0: it is not asked.

    Attributes:
        taken: which requests are asked.
        own: the requests of the same node that each one waits for.
        generated: tokens that requests have from engines that were stopped.
        done_s: when requests have finished, inf for those that have not.
        turn: how many requests, or chains of them, were dealt to engines.
        chain_at: by chain, the engine that has it.
    """

    def __init__(
        self, node: ModelNode, inputs: NodeInputs, prompt_tokens: Ints, output_tokens: Ints
    ) -> None:
        self.node, self.inputs = node, inputs
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.taken: Bools = output_tokens > 0
        self.own: dict[int, list[int]] = {}
        for r, q in zip(inputs.own_row.tolist(), inputs.own_request.tolist(), strict=True):
            self.own.setdefault(r, []).append(q)
        self.generated = np.zeros_like(output_tokens)
        self.done_s: Floats = np.full(len(output_tokens), np.inf)
        self.turn = 0
        self.chain_at: dict[int, str] = {}

    def note_dealt(self, request: int, key: str) -> None:
        """Note that an engine has been given a request."""
        chain = int(self.inputs.chain[request])
        if not self.inputs.has_chain:
            self.turn += 1
        elif chain not in self.chain_at:
            self.chain_at[chain] = key
            self.turn += 1

    def foresee(
        self,
        engines: Sequence[SimulatedEngine],
        available: Floats | None,
        finish: Floats,
        now_s: float,
    ) -> None:
        """Expect every request at the replica whose turn it will be, once its inputs are there.

        Args:
            engines: the node's; what they are expected to be given is written to them.
            available: by request, when its inputs of other nodes are there.
            finish: when requests finish, inf for those that have not.
            now_s: the clock.
        """
        dealt = [e.foreseen.requests() for e in engines]
        for engine in engines:
            engine.foreseen = nothing_foreseen()
        if any(e.spec.scheduling_policy == "priority" for e in engines):
            return  # who comes first is the coordinator's secret
        ready_s, inputs = engines[0].ready_s, self.inputs
        there = np.zeros(len(finish)) if available is None else available
        open_ = self.taken & np.isinf(self.done_s) & np.isfinite(there)
        for engine in engines:
            open_[engine.submitted.column("request")] = False
        arrival = np.maximum(there - ready_s, 0.0)
        waiting = np.zeros(len(finish), bool)
        waiting[inputs.own_row[np.isinf(finish[inputs.own_request])]] = True
        place = np.full(len(finish), -1)
        come = np.zeros(len(finish), bool)
        if engines[0].reported_ready:  # they could have come, but for those that wait outside
            come = (there <= now_s) & ~waiting
            for k, (engine, mine) in enumerate(zip(engines, dealt, strict=True)):
                if not engine.has_room:
                    place[mine[come[mine] & open_[mine]]] = k
        candidates = np.flatnonzero(open_)
        order = candidates[np.argsort(arrival[candidates], kind="stable")]
        if inputs.has_chain:
            self._foresee_chains(engines, order, waiting, come, place, finish)
        else:
            turn = self.turn + int((place >= 0).sum())
            order = order[~come[order]]
            place[order] = (turn + np.arange(len(order))) % len(engines)
        placed = np.flatnonzero(place >= 0)
        placed = placed[np.argsort(arrival[placed], kind="stable")]
        for k, engine in enumerate(engines):
            engine.foreseen = self._foreseen(placed[place[placed] == k], arrival, finish)

    def _foresee_chains(
        self,
        engines: Sequence[SimulatedEngine],
        order: Ints,
        waiting: Bools,
        come: Bools,
        place: Ints,
        finish: Floats,
    ) -> None:
        """Place requests of chains: first those that wait for none of them, then the others.

        Args:
            engines: its replicas.
            order: requests that are open, in the order in which they arrive.
            waiting: which requests wait for others of the node.
            come: which could have come already.
            place: by request, the engine it is expected at; -1: none. Written to.
            finish: when requests finish, inf for those that have not.
        """
        own, chains = self.own, self.inputs.chain
        by_key = {e.spec.key: k for k, e in enumerate(engines)}
        turn = self.turn
        dealt: dict[int, int] = {}
        given = [set(e.submitted.column("request").tolist()) for e in engines]

        def known(r: int) -> int | None:
            at = by_key.get(self.chain_at.get(int(chains[r]), ""))
            return dealt.get(int(chains[r])) if at is None else at

        for r in np.flatnonzero(place >= 0).tolist():
            turn += known(r) is None
            dealt[int(chains[r])] = int(place[r])
        for r in order[~waiting[order] & ~come[order]].tolist():
            engine = known(r)
            if engine is None:
                engine = turn % len(engines)
                turn += 1
            dealt[int(chains[r])] = place[r] = engine
        for r in np.sort(order[waiting[order]]).tolist():  # inputs come before
            engine = known(r)
            if engine is not None and all(
                q in given[engine] or place[q] == engine for q in own[r] if np.isinf(finish[q])
            ):
                place[r] = engine

    def _foreseen(self, requests: Ints, arrival_s: Floats, finish: Floats) -> Foreseen:
        """Return what an engine is expected to be given, in the order in which it arrives."""
        done, table = self.generated[requests], self.node.requests
        prompt, output = self.prompt_tokens[requests], self.output_tokens[requests]
        room = np.minimum(table.max_tokens[requests], self.node.model.max_model_len - prompt)
        found = Submissions()
        found.extend(
            request=requests,
            arrival_s=arrival_s[requests],
            prompt_tokens=prompt + done,
            output_tokens=output - done,
            cut=output >= room,
            priority=np.zeros(len(requests), np.int64),
        )
        for r in requests.tolist() if self.inputs.has_chain else ():
            if after := tuple(q for q in self.own.get(r, ()) if np.isinf(finish[q])):
                found.after[r] = after
        return Foreseen(found)


def due_s(engine: SimulatedEngine, finish: Floats) -> Floats:
    """Return when what an engine is expected to be given comes."""
    expected = engine.foreseen.submissions
    due_s = engine.ready_s + expected.column("arrival_s")
    for k, r in enumerate(expected.column("request").tolist() if expected.after else ()):
        if after := expected.after.get(r):
            due_s[k] = max(due_s[k], *(finish[q] for q in after))
    return np.asarray(due_s)
