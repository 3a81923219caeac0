"""Prompts of known lengths, for engines that are modelled or whose output lengths are imposed.

Something stands for outputs that were only modelled, so that a dry run can be followed end to end.
Lengths, and what routers and filters decide, are as the truth of the run has them; the outputs made
here are such that the application's own expressions and patterns would decide the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import structs

from samullm_plugin.app.expressions import ExpressionError
from samullm_plugin.app.loaded import Condition, LoadedApplication, NodeSource
from samullm_plugin.app.pooling import pooled_value
from samullm_plugin.app.schemasamples import pattern_sample, schema_sample
from samullm_plugin.app.templates import text_of
from samullm_plugin.model.application import Application
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Bools
from samullm_plugin.run.ledger import Ledger
from samullm_plugin.run.prompts import A_PROMPT, Given, Prepared, Prompt, PromptBuilder, Refused
from samullm_plugin.run.python_calls import Call
from samullm_plugin.run.results import RequestId, Result
from samullm_plugin.run.text_prompts import TextPrompts
from samullm_plugin.run.user_nodes import UserNodes


class LengthPrompts(PromptBuilder):
    """Requests without content, for executors that model engines: lengths only."""

    def __init__(self, truth: LengthScenario) -> None:
        """Keep what is true.

        Args:
            truth: output lengths, 0 where a request is not taken.
        """
        self._truth = truth
        self._untaken: list[Bools] = [np.asarray(o == 0) for o in truth.output_tokens]

    def prepare(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return the lengths of a request, the outputs of its inputs included."""
        decision = self.decide(request, ledger)
        if decision is not A_PROMPT:
            return decision
        node, r = request
        output = int(self._truth.output_tokens[node][r])
        table, model = ledger.app.nodes[node].requests, ledger.app.nodes[node].model
        tokens = int(table.prompt_tokens[r])
        for e in table.entries(r):
            if table.input_in_prompt[e]:
                tokens += int(ledger.generated[table.input_node[e]][table.input_request[e]])
        tokens = min(tokens, model.max_model_len - 1)
        limit = min(int(table.max_tokens[r]), model.max_model_len - tokens)
        return Prompt(tokens, limit, output_tokens=min(output, limit))

    def decide(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return whether a request is taken, by its length."""
        node, r = request
        output = int(self._truth.output_tokens[node][r])
        if output == 0:
            return None
        if node >= len(ledger.app.nodes):
            python = ledger.app.python[node - len(ledger.app.nodes)]
            if r < python.num_calls:
                return Call(workers=python.workers, seconds=python.seconds, value=output)
            return Given(None, output)
        return A_PROMPT

    def untaken(self, node: int) -> Bools | None:
        """Return which requests are not taken."""
        return self._untaken[node]


class TokenPrompts(LengthPrompts):
    """Requests of lengths only, as random tokens for real engines, with imposed output lengths.

    Outputs that enter a prompt are what the engines have really generated.
    """

    def __init__(self, truth: LengthScenario, seed: int = 0) -> None:
        """Keep what is true.

        Args:
            truth: output lengths, 0 where a request is not taken.
            seed: of the prompts' tokens.
        """
        super().__init__(truth)
        self._seed = seed

    @property
    def with_token_ids(self) -> bool:
        """Outputs enter prompts as tokens."""
        return True

    def prepare(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return a request whose prompt holds its own random tokens, then its inputs' outputs."""
        prompt = super().prepare(request, ledger)
        if not isinstance(prompt, Prompt):
            return prompt
        node, r = request
        table, sizes = ledger.app.nodes[node].requests, ledger.app.nodes[node].model.architecture
        vocabulary = 512 if sizes is None else sizes.vocab_size
        shared = int(table.prefix_tokens[r]) if table.prefix_id[r] >= 0 else 0
        own = int(table.prompt_tokens[r]) - shared
        parts = [
            self._tokens(shared, vocabulary, 0, int(table.prefix_id[r]) + 1),
            self._tokens(own, vocabulary, node + 1, r),
        ]
        for e in table.entries(r):
            found = ledger.results.get((int(table.input_node[e]), int(table.input_request[e])))
            if table.input_in_prompt[e] and found is not None:
                parts.append(found.token_ids or ())
        ids = tuple(t for part in parts for t in part)[: prompt.prompt_tokens]
        return structs.replace(prompt, token_ids=ids, sampling={"temperature": 0.0})

    def _tokens(self, count: int, vocabulary: int, *stream: int) -> tuple[int, ...]:
        """Return random tokens, none of them special."""
        rng = np.random.default_rng([self._seed, *stream])
        return tuple(rng.integers(3, vocabulary, count).tolist())


class SampledPrompts(LengthPrompts):
    """Requests of an application with texts on executors that model engines.

    Lengths, routers and filters are as the truth has them; ids are the application's, and outputs
    are sample texts, so that everything behind a run (tables, reports) can be tried.
    """

    def __init__(
        self,
        truth: LengthScenario,
        loaded: LoadedApplication,
        app: Application,
    ) -> None:
        """Keep what is true.

        Args:
            truth: output lengths, 0 where a request is not taken.
            loaded: the application as its user wrote it.
            app: the same as it is planned.
        """
        super().__init__(truth)
        self._texts = TextPrompts(loaded, app)
        self._stand_ins = StandIns(loaded, self._texts, UserNodes(app), truth)

    def decide(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return whether a request is taken, if it can be asked."""
        if (why := self._texts.refusal(request)) is not None:
            return Refused(why)
        found = super().decide(request, ledger)
        if not isinstance(found, Given):
            return found
        made = self._stand_ins.result(request, found.num_tokens, ledger)
        return Given(made.value, found.num_tokens)

    def stand_in(self, request: RequestId, num_tokens: int, ledger: Ledger) -> Result | None:
        """Return an output as the application may have it, its text or value all that counts."""
        return self._stand_ins.result(request, num_tokens, ledger)

    def rendered(self, request: RequestId, ledger: Ledger) -> Prompt | None:
        """Return the prompt of a request, with sample texts where outputs enter it."""
        return self._texts.rendered(request, ledger)

    def custom_id(self, node: str, request: int) -> str:
        """Return the id of a request."""
        return self._texts.custom_id(node, request)

    def unique_id(self, node: str, request: int) -> str:
        """Return the id of a request; copies and samples have their number in it."""
        return self._texts.unique_id(node, request)

    def is_chat(self, node: str, request: int) -> bool:
        """Return whether a request is a conversation."""
        return self._texts.is_chat(node, request)

    def sample(self, node: str, request: int) -> int:
        """Return which of its line's outputs a request is."""
        return self._texts.sample(node, request)


_DRAWS = 50
"""So often another output is drawn if the application would decide otherwise by the first ones."""
_VECTOR = 8
"""Numbers in an embedding that nobody computed."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What an output must lead to.

    Attributes:
        keeps: whether the node's filter lets it pass; None: it has none, or it does not matter.
        branch: index of the node that a router chooses; None: as ``keeps``.
    """

    keeps: bool | None = None
    branch: int | None = None

    def __bool__(self) -> bool:
        """Return whether it must lead to anything."""
        return self.keeps is not None or self.branch is not None


class StandIns:
    """Makes outputs, the same for the same request in every run.

    Args:
        loaded: the application as its user wrote it.
        texts: of the same.
        users: the nodes of the same as it is planned.
        truth: output lengths, 0 where a request is not taken.
    """

    def __init__(
        self,
        loaded: LoadedApplication,
        texts: TextPrompts,
        users: UserNodes,
        truth: LengthScenario,
    ) -> None:
        assert loaded.sources is not None
        self._sources, self._tables = loaded.sources, [n.requests for n in loaded.app.all_nodes]
        self._texts, self._users, self._truth = texts, users, truth

    def result(self, planned: RequestId, num_tokens: int, ledger: Ledger) -> Result:
        """Return what stands for an output.

        Args:
            planned: the request.
            num_tokens: its length.
            ledger: the results so far.
        """
        node, r = self._texts.written(planned)
        source, name = self._sources[node], self._users.written(planned)[0]
        what = source.task or f"{num_tokens} tokens"
        plain = f"⟨{what} of {name} for {source.ids[r]}⟩"
        if source.call is not None:
            value = plain if source.sample is None else source.sample
            return Result(num_tokens, finish_reason="stop", value=value)
        if not (source.schema or source.task or source.sample or source.branches or source.keep):
            return Result(num_tokens, finish_reason="stop", text=plain)  # mostly
        decision = self._decision(planned, (node, r), ledger)
        rng = random.Random(f"{name} {source.ids[r]}")
        first: Result | None = None
        for text, value in _outputs(source, plain, decision, rng):
            result = Result(num_tokens, finish_reason="stop", text=text, value=value)
            if not decision or self._leads_to(decision, (node, r), result, ledger):
                return result
            first = first or result
        assert first is not None
        return first

    def _decision(self, planned: RequestId, written: RequestId, ledger: Ledger) -> Decision:
        """Return what the truth has decided by the output of a request."""
        source = self._sources[written[0]]
        if source.keep is None and not source.branches:
            return Decision()
        branches, keeps, branch = {b.node for b in source.branches}, None, None
        for behind in ledger.waiting_for(planned):
            if self._users.repeats(behind):
                continue
            taken = bool(self._truth.output_tokens[behind[0]][behind[1]])
            node, q = self._texts.written(behind)
            if node in branches:
                branch = node if taken else branch
                continue
            if source.keep is None:
                continue
            table, fallback = self._tables[node], self._sources[node].fallback
            mine = (
                k
                for k in table.entries(q)
                if (int(table.input_node[k]), int(table.input_request[k])) == written
            )
            if any(k not in fallback for k in mine):
                keeps = taken or bool(keeps)
        return Decision(keeps, branch)

    def _leads_to(
        self, decision: Decision, written: RequestId, result: Result, ledger: Ledger
    ) -> bool:
        """Return whether an application decides so by an output."""
        source, fields = self._sources[written[0]], self._texts.context(written, result, ledger)
        try:
            if source.keep is not None and decision.keeps is not None:
                return source.keep.holds(fields) == decision.keeps
            return source.branch({"output": "", **fields}) == decision.branch
        except ExpressionError:
            return False


def _outputs(
    source: NodeSource, plain: str, decision: Decision, rng: random.Random
) -> Iterator[tuple[str | None, Any]]:
    """Yield outputs that a node may give: text and value."""
    if source.task:
        for _ in range(_DRAWS):
            yield None, pooled_value(source.task, _numbers(source, rng), source.class_names)
        return
    for _ in range(_DRAWS if source.schema is not None else 0):
        assert source.schema is not None
        if (text := schema_sample(source.schema, rng)) is None:
            break
        yield text, None
    if source.sample is not None:
        yield (
            text_of(source.sample),
            source.sample if isinstance(source.sample, Mapping) else None,
        )
    wanted = [b.when for b in source.branches if b.node == decision.branch]
    wanted += [source.keep] if decision.keeps else []
    for condition in wanted:
        if (text := _matching(condition, rng)) is not None:
            yield text, None
    yield plain, None


def _matching(condition: Condition | None, rng: random.Random) -> str | None:
    """Return a text that a condition's pattern describes."""
    if condition is None or condition.pattern is None:
        return None
    return pattern_sample(condition.pattern.pattern, rng)


def _numbers(source: NodeSource, rng: random.Random) -> list[float]:
    """Return what a pooling model may give."""
    if source.task == "embed":
        drawn = [rng.gauss(0.0, 1.0) for _ in range(_VECTOR)]
        length = sum(x * x for x in drawn) ** 0.5
        return [round(x / length, 4) for x in drawn]
    if source.task == "classify":
        drawn = [rng.random() + 1e-3 for _ in range(max(2, len(source.class_names)))]
        return [round(x / sum(drawn), 4) for x in drawn]
    return [round(rng.random(), 4)]
