"""Prompts of known lengths, for engines that are modelled or whose output lengths are imposed."""

from __future__ import annotations

import numpy as np
from msgspec import structs

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.model.application import Application
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Bools
from samullm_plugin.run.ledger import Ledger
from samullm_plugin.run.prompts import A_PROMPT, Given, Prepared, Prompt, PromptBuilder, Refused
from samullm_plugin.run.python_calls import Call
from samullm_plugin.run.results import RequestId, Result
from samullm_plugin.run.stand_ins import StandIns
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
