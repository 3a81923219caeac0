"""Where requests come from: what is to be asked once the outputs they wait for are there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Bools
from samullm_plugin.run.ledger import Ledger, RequestId, Result, Status
from samullm_plugin.run.user_nodes import UserNodes


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request that can be given to an engine.

    Attributes:
        prompt_tokens: its length in tokens; an estimate where the engine tokenises.
        max_tokens: limit of its output.
        token_ids: the prompt, if tokenised.
        text: the prompt, if the engine is to tokenise it.
        messages: the prompt as chat messages for the model's chat template.
        sampling: vLLM sampling parameters by name.
        chat: what the chat template is told.
        output_tokens: what it will generate, for executors that model engines; else None.
    """

    prompt_tokens: int
    max_tokens: int
    token_ids: tuple[int, ...] | None = None
    text: str | None = None
    messages: tuple[Mapping[str, object], ...] | None = None
    sampling: Mapping[str, object] = field(default_factory=dict)
    chat: Mapping[str, object] = field(default_factory=dict)
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that cannot be asked, such as one whose template broke."""

    reason: str


class PromptBuilder(ABC):
    """Makes prompts from what is in the ledger."""

    @abstractmethod
    def prepare(self, request: RequestId, ledger: Ledger) -> Prompt | Refused | None:
        """Return the prompt of a request whose inputs are all settled and did not fail.

        Returns:
            None if the request is not taken: a router chose another or a filter dropped it.
        """

    def untaken(self, node: int) -> Bools | None:
        """Return which requests are known beforehand not to be taken; None if nobody knows."""
        del node
        return None

    def sample(self, node: str, request: int) -> int:
        """Return which of its line's outputs a request is, from 0."""
        del node, request
        return 0

    def custom_id(self, node: str, request: int) -> str:
        """Return the name of a request in the outputs.

        Args:
            node: name of a node as the user wrote it.
            request: index of one of its requests.
        """
        del node
        return f"request-{request}"

    def unique_id(self, node: str, request: int) -> str:
        """Return a name that no other request of the node has, named as in :meth:`custom_id`."""
        return self.custom_id(node, request)

    def sample_text(self, request: RequestId, num_tokens: int) -> str | None:
        """Return what stands for an output that was only modelled; None: nothing.

        Args:
            request: as it is planned.
            num_tokens: its length.
        """
        del request, num_tokens
        return None

    def is_chat(self, node: str, request: int) -> bool:
        """Return whether a request, named as in :meth:`custom_id`, is a conversation."""
        del node, request
        return False


class LengthPrompts(PromptBuilder):
    """Requests without content, for executors that model engines: lengths only."""

    def __init__(self, truth: LengthScenario) -> None:
        """Keep what is true.

        Args:
            truth: output lengths, 0 where a request is not taken.
        """
        self._truth = truth
        self._untaken: list[Bools] = [np.asarray(o == 0) for o in truth.output_tokens]

    def prepare(self, request: RequestId, ledger: Ledger) -> Prompt | Refused | None:
        """Return the lengths of a request, the outputs of its inputs included."""
        node, r = request
        output = int(self._truth.output_tokens[node][r])
        if output == 0:
            return None
        table, model = ledger.app.nodes[node].requests, ledger.app.nodes[node].model
        part = slice(table.input_indptr[r], table.input_indptr[r + 1])
        tokens = int(table.prompt_tokens[r])
        inputs = zip(table.input_node[part], table.input_request[part], strict=True)
        for (i, q), enters in zip(inputs, table.input_in_prompt[part], strict=True):
            if enters:
                tokens += int(ledger.generated[i][q])
        tokens = min(tokens, model.max_model_len - 1)
        limit = min(int(table.max_tokens[r]), model.max_model_len - tokens)
        return Prompt(tokens, limit, output_tokens=min(output, limit))

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

    def prepare(self, request: RequestId, ledger: Ledger) -> Prompt | Refused | None:
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
        part = slice(table.input_indptr[r], table.input_indptr[r + 1])
        inputs = zip(table.input_node[part], table.input_request[part], strict=True)
        for (i, q), enters in zip(inputs, table.input_in_prompt[part], strict=True):
            found = ledger.results.get((int(i), int(q)))
            if enters and found is not None:
                parts.append(found.token_ids or ())
        ids = tuple(t for part in parts for t in part)[: prompt.prompt_tokens]
        return replace(prompt, token_ids=ids, sampling={"temperature": 0.0})

    def _tokens(self, count: int, vocabulary: int, *stream: int) -> tuple[int, ...]:
        """Return random tokens, none of them special."""
        rng = np.random.default_rng([self._seed, *stream])
        return tuple(rng.integers(3, vocabulary, count).tolist())


class TextPrompts(PromptBuilder):
    """Prompts with texts: templates, conversations, routers and filters of an ``app.yaml``."""

    def __init__(self, loaded: LoadedApplication, app: Application | None = None) -> None:
        """Take the texts of an application.

        Args:
            loaded: the application as its user wrote it.
            app: the same as it is planned, with fused nodes; None: none are.

        Raises:
            InputError: if it has none.
        """
        if loaded.sources is None:
            raise InputError(
                f"application {loaded.app.name} has no prompts: it can be planned, and run with "
                "--executor simulated or emulated, but not on real engines (samullm bench "
                "--executor vllm makes prompts of random tokens)"
            )
        self._loaded, self._sources = loaded, loaded.sources
        self._users = UserNodes(loaded.app if app is None else app)
        self._names = [n.name for n in loaded.app.nodes]
        self._index = {name: i for i, name in enumerate(self._names)}

    # From here on, requests are named as the user wrote them where nothing else is said.

    def _written(self, planned: RequestId) -> RequestId:
        name, index = self._users.written(planned)
        return self._index[name], index

    def _planned(self, written: RequestId) -> RequestId:
        node, part = self._users.parts[self._names[written[0]]]
        return node, part.start + written[1]

    def refusal(self, planned: RequestId) -> str | None:
        """Return why a request cannot be asked; None if it can."""
        node, r = self._written(planned)
        return self._sources[node].refused.get(r)

    def _output(self, request: RequestId, ledger: Ledger) -> Result | None:
        """Return what a request generated; None if it has not finished."""
        i, q = self._planned(request)
        return ledger.results[i, q] if ledger.status[i][q] == Status.FINISHED else None

    def prepare(self, request: RequestId, ledger: Ledger) -> Prompt | Refused | None:
        """Return a request with the outputs it waited for in its template's places.

        Args:
            request: as it is planned.
            ledger: the results.
        """
        node, r = self._written(request)
        if (why := self._sources[node].refused.get(r)) is not None:
            return Refused(why)
        inputs = [self._written(planned) for planned in ledger.inputs(request)]
        dropped = self._dropped(inputs, ledger)
        for s in {i for i, _ in inputs}:
            source = self._sources[s]
            mine = [q for i, q in inputs if i == s]
            if source.keep is not None and all((s, q) in dropped for q in mine):
                return None
            if node in {b.node for b in source.branches}:
                chosen = self._chosen((s, mine[0]), ledger)
                if isinstance(chosen, Refused):
                    return chosen
                if chosen != node:
                    return None

        def output_of(i: int, q: int) -> str | None:
            if (i, q) in dropped:
                return None
            output = self._output((i, q), ledger)
            return None if output is None else output.text

        return self._prompt((node, r), ledger, output_of)

    def _prompt(
        self, request: RequestId, ledger: Ledger, output_of: Callable[[int, int], str | None]
    ) -> Prompt | Refused:
        node, r = request
        source, table = self._sources[node], self._loaded.app.nodes[node].requests
        part = slice(table.input_indptr[r], table.input_indptr[r + 1])
        pairs = zip(
            table.input_node[part].tolist(), table.input_request[part].tolist(), strict=True
        )
        inputs = [
            self._planned(p) for p, e in zip(pairs, table.input_in_prompt[part], strict=True) if e
        ]
        tokens = int(table.prompt_tokens[r]) + sum(int(ledger.generated[i][q]) for i, q in inputs)
        sampling = source.sampling_params(r)
        sampling.pop("max_tokens", None)
        text = messages = None
        ids = source.prompt_token_ids.get(r)
        if ids is not None:  # outputs enter as token ids, behind the request's own
            known = [ledger.results[p].token_ids or () for p in inputs if p in ledger.results]
            ids = (*ids, *(t for output in known for t in output))
            tokens = len(ids)
        else:
            try:
                messages = self._loaded.messages(node, r, output_of)
                text = None if messages else self._loaded.prompt(node, r, output_of)
            except Exception as error:  # a template can raise anything
                return Refused(f"its prompt cannot be made: {error}")
        return Prompt(
            tokens,
            int(table.max_tokens[r]),
            token_ids=ids,
            text=text,
            messages=None if messages is None else tuple(messages),
            sampling=sampling,
            chat=source.request_chat.get(r, {}),
        )

    def _dropped(self, inputs: Sequence[RequestId], ledger: Ledger) -> set[RequestId]:
        """Return the inputs that a filter has not kept."""
        found = set()
        for request in inputs:
            source = self._sources[request[0]]
            if source.keep is None:
                continue
            output = self._output(request, ledger)
            if output is None or not source.keeps(output.text or ""):
                found.add(request)
        return found

    def _chosen(self, router: RequestId, ledger: Ledger) -> int | Refused:
        """Return the node that a router's output chooses."""
        source, output = self._sources[router[0]], self._output(router, ledger)
        text = "" if output is None else output.text or ""
        chosen = source.branch(text)
        if chosen is None:
            name = f"{self._names[router[0]]} ({source.ids[router[1]]})"
            return Refused(f"the output of router {name} matches no branch: {text[:80]!r}")
        return chosen

    def custom_id(self, node: str, request: int) -> str:
        """Return the id of a request."""
        source = self._sources[self._index[node]]
        name = source.ids[request]
        sampled = request in source.samples or request + 1 in source.samples
        return name.rpartition("#")[0] if sampled else name

    def sample(self, node: str, request: int) -> int:
        """Return which of its line's outputs a request is."""
        return self._sources[self._index[node]].samples.get(request, 0)

    def unique_id(self, node: str, request: int) -> str:
        """Return the id of a request; copies and samples have their number in it."""
        return self._sources[self._index[node]].ids[request]

    def is_chat(self, node: str, request: int) -> bool:
        """Return whether a request is a conversation."""
        source = self._sources[self._index[node]]
        return source.chat or bool(source.own_prompt and source.fields[request].get("messages"))


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
        self._texts, self._written = TextPrompts(loaded, app), UserNodes(app)

    def prepare(self, request: RequestId, ledger: Ledger) -> Prompt | Refused | None:
        """Return the lengths of a request, if it can be asked."""
        if (why := self._texts.refusal(request)) is not None:
            return Refused(why)
        return super().prepare(request, ledger)

    def sample_text(self, request: RequestId, num_tokens: int) -> str | None:
        """Return a text that says which output it stands for."""
        node, index = self._written.written(request)
        return f"⟨{num_tokens} tokens of {node} for {self._texts.unique_id(node, index)}⟩"

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
