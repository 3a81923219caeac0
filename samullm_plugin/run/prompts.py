"""Where requests come from: what is to be asked once the outputs they wait for are there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from samullm_plugin.app.expressions import ExpressionError
from samullm_plugin.app.functions import Function, Row
from samullm_plugin.app.loaded import LoadedApplication, PythonCall
from samullm_plugin.app.requests import estimate_tokens
from samullm_plugin.app.templates import Output, text_of
from samullm_plugin.errors import InputError, Reject
from samullm_plugin.model.application import Application
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Bools
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.python_calls import Call, CallRunner, ImitatedCalls, WorkerCalls
from samullm_plugin.run.results import RequestId, Result
from samullm_plugin.run.row_values import RowValues
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
        chat: variables passed to the chat template.
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


@dataclass(frozen=True, slots=True)
class Given:
    """A request whose result is there without an engine or a call.

    Attributes:
        value: its value; None in imitations.
        num_tokens: of the value in prompts.
    """

    value: Any
    num_tokens: int


Prepared = Prompt | Call | Given | Refused | None
"""What is to be done for a request; None: it is not taken."""

A_PROMPT = Prompt(0, 0)
"""Some prompt, where it is enough that there is one."""


class PromptBuilder(ABC):
    """Makes prompts from what is in the ledger."""

    @abstractmethod
    def prepare(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return the prompt of a request whose inputs are all settled and did not fail.

        Returns:
            None if the request is not taken: a router chose another or a filter dropped it.
        """

    @property
    def with_token_ids(self) -> bool:
        """Whether outputs enter prompts as tokens, so that texts alone do not do."""
        return False

    def decide(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return what :meth:`prepare` would, but a prompt without content.

        Prompts are made when engines have room for them. One that cannot be made then has failed.
        """
        return self.prepare(request, ledger)

    def call_runner(self) -> CallRunner:
        """Return what runs the calls of Python nodes."""
        return ImitatedCalls()

    def judge(self, request: RequestId, result: Result, ledger: Ledger) -> str | Call | None:
        """Return why an output is rejected, or a call that is to decide; None: it is accepted."""
        del request, result, ledger
        return None

    def again(self, request: RequestId, prompt: Prompt, attempt: int) -> Prompt | None:
        """Return how a rejected request is asked again; None: it is not.

        Args:
            request: as it is planned.
            prompt: as it was asked first.
            attempt: how often it was rejected.
        """
        del request, prompt, attempt
        return None

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

    def rendered(self, request: RequestId, ledger: Ledger) -> Prompt | None:
        """Return the prompt of a request with its text, for people; None if it has none."""
        del request, ledger
        return None

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

    def prepare(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return the lengths of a request, the outputs of its inputs included."""
        decision = self.decide(request, ledger)
        if decision is not A_PROMPT:
            return decision
        node, r = request
        output = int(self._truth.output_tokens[node][r])
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
        self._names = [n.name for n in loaded.app.all_nodes]
        self._rows = RowValues(loaded, self._planned)
        self._index = {name: i for i, name in enumerate(self._names)}
        self._with_token_ids = any(s.prompt_token_ids for s in loaded.sources)

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

    def prepare(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return a request with the outputs it waited for in its template's places.

        Args:
            request: as it is planned.
            ledger: the results.
        """
        decision = self.decide(request, ledger)
        if decision is not A_PROMPT:
            return decision
        written = self._written(request)
        outputs = self._inputs(written, ledger)
        assert isinstance(outputs, dict)  # as it was decided
        return self._prompt(written, ledger, _among(outputs))

    @property
    def with_token_ids(self) -> bool:
        """Whether any prompt is given as tokens, to which outputs are added as tokens."""
        return self._with_token_ids

    def decide(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return what is to be done for a request; its prompt is not made."""
        node, r = self._written(request)
        source = self._sources[node]
        if r in source.refused:
            return Refused(source.refused[r])
        if source.call is not None and r >= source.call.num_calls:
            return self._row_of_call((node, r), request, ledger)
        if source.call is not None and source.call.scope == "all":
            return self._call_of_all(node, source.call, ledger)
        try:
            outputs = self._inputs((node, r), ledger)
        except ExpressionError as error:
            return Refused(str(error))
        if outputs is None or isinstance(outputs, Refused):
            return outputs
        if source.call is not None:
            row = self._rows.given((node, r), ledger, _among(outputs))
            return _call(source.call.function, source.call, (row,))
        return A_PROMPT

    def _inputs(
        self, request: RequestId, ledger: Ledger
    ) -> dict[RequestId, Output | None] | Refused | None:
        """Return the outputs that a request waited for, without those that a filter dropped.

        None if it is not taken: a filter kept none of them, or a router chose another node.

        Raises:
            ExpressionError: if a filter's or router's expression has no value.
        """
        node, r = request
        table, fallback = self._loaded.app.all_nodes[node].requests, self._sources[node].fallback
        entries = range(*table.input_indptr[r : r + 2].tolist())
        found: dict[RequestId, Output | None] = {}
        kept: dict[int, bool] = {}
        for entry in entries:
            at = int(table.input_node[entry]), int(table.input_request[entry])
            found[at] = self._rows.output(at, ledger)
            source = self._sources[at[0]]
            if source.keep is None or entry in fallback:
                continue
            keeps = found[at] is not None and source.keep.holds(self._rows.context(at, ledger))
            if not keeps:
                found[at] = None
            kept[at[0]] = kept.get(at[0], False) or keeps
        if not all(kept.values()):
            return None
        for at in found:
            if node in {b.node for b in self._sources[at[0]].branches}:
                chosen = self._chosen(at, ledger)
                if isinstance(chosen, Refused):
                    return chosen
                if chosen != node:
                    return None
        return found

    def _call_of_all(self, node: int, call: PythonCall, ledger: Ledger) -> Prepared:
        """Return the call that takes every row that is there."""
        rows = []
        for r in range(call.num_calls, len(self._sources[node].ids)):
            planned = self._planned((node, r))
            mine = ledger.inputs(planned)[:-1]  # the last one is the call
            states = {int(ledger.status[i][q]) for i, q in mine}
            if Status.FAILED in states or (mine and states == {Status.SKIPPED}):
                continue
            try:
                outputs = self._inputs((node, r), ledger)
            except ExpressionError:
                continue  # the row says so itself
            if outputs is None or isinstance(outputs, Refused) or ledger.lacks(planned):
                continue
            rows.append(self._rows.given((node, r), ledger, _among(outputs)))
        return _call(call.function, call, tuple(rows)) if rows else None

    def _row_of_call(self, written: RequestId, planned: RequestId, ledger: Ledger) -> Prepared:
        """Return what a call has made of one of its rows."""
        node, r = written
        call = self._sources[node].call
        assert call is not None
        at = ledger.inputs(planned)[-1]
        if ledger.status[at[0]][at[1]] != Status.FINISHED:
            return None  # its failure is reported once, by the call
        value = ledger.results[at].value
        if call.scope == "all":
            name = self._sources[node].ids[r]
            return _given(value[name]) if name in value else None
        if value is None:
            return None  # the call dropped its row
        k = (r - call.num_calls) % (call.most or 1)
        return _given(value[k]) if k < len(value) else None

    def call_runner(self) -> CallRunner:
        """Return what runs the calls of Python nodes."""
        return WorkerCalls()

    def judge(self, request: RequestId, result: Result, ledger: Ledger) -> str | Call | None:
        """Return why an output is rejected, or the call that decides; None: it is accepted."""
        node, r = self._written(request)
        source = self._sources[node]
        value: Any = None
        if source.schema is not None and result.text is not None:
            try:
                value = source.schema.parse(result.text)
            except Reject as error:
                cut = "; it was cut at max_tokens" if result.finish_reason == "length" else ""
                return f"the output {error}{cut}"
        if source.check is None:
            return None
        row = self._rows.without_output((node, r), ledger)
        value = result.text if value is None else value
        if isinstance(value, Mapping):
            row.update(value)
        row |= {source.name: value, "output": result.text, "node": self._names[node]}
        return Call(source.check, (row,))

    def again(self, request: RequestId, prompt: Prompt, attempt: int) -> Prompt | None:
        """Return a rejected request with another seed and a higher temperature."""
        source = self._sources[self._written(request)[0]]
        if attempt > source.retries:
            return None
        sampling = dict(prompt.sampling)
        if isinstance(seed := sampling.get("seed"), int):
            sampling["seed"] = seed + attempt
        warmer = source.retry_temperature * attempt
        sampling["temperature"] = float(str(sampling.get("temperature", 1.0))) + warmer
        return replace(prompt, sampling=sampling)

    def _prompt(
        self, request: RequestId, ledger: Ledger, output_of: Callable[[int, int], Output | None]
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
                made = self._loaded.conversation(node, r, output_of)
                text, messages = (made, None) if isinstance(made, str) else (None, made)
            except Exception as error:  # a template can raise anything
                return Refused(f"its prompt cannot be made: {error}")
        return Prompt(
            tokens,
            int(table.max_tokens[r]),
            token_ids=ids,
            text=text,
            messages=None if messages is None else tuple(messages),
            sampling=sampling,
            chat=_chat(source.chat_options, source.request_chat.get(r, {})),
        )

    def _chosen(self, router: RequestId, ledger: Ledger) -> int | Refused | None:
        """Return the node that a router's output chooses; None: it passes them all."""
        source = self._sources[router[0]]
        fields = self._rows.context(router, ledger)
        chosen = source.branch({"output": "", **fields})
        if chosen is None and not source.passes:
            name = f"{self._names[router[0]]} ({source.ids[router[1]]})"
            text = str(fields.get("output", ""))
            return Refused(f"the output of router {name} matches no branch: {text[:80]!r}")
        return chosen

    def rendered(self, request: RequestId, ledger: Ledger) -> Prompt | None:
        """Return the prompt of a request with its text; None if it cannot be made."""
        made = self.prepare(request, ledger)
        return made if isinstance(made, Prompt) else None

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


def _among(outputs: Mapping[RequestId, Output | None]) -> Callable[[int, int], Output | None]:
    return lambda node, request: outputs.get((node, request))


def _call(function: Function, call: PythonCall, rows: tuple[Row, ...]) -> Call:
    return Call(
        function, rows, call.scope, call.timeout_s, call.most, call.batch_size, call.workers
    )


def _given(value: Any) -> Given:
    return Given(value, estimate_tokens(text_of(value)))


def _chat(node: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the variables of the chat template: a request's own before its node's."""
    if not node:
        return own
    kwargs = {**node.get("chat_template_kwargs", {}), **own.get("chat_template_kwargs", {})}
    return {**node, **own, **({"chat_template_kwargs": kwargs} if kwargs else {})}


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

    def decide(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return whether a request is taken, if it can be asked."""
        if (why := self._texts.refusal(request)) is not None:
            return Refused(why)
        return super().decide(request, ledger)

    def sample_text(self, request: RequestId, num_tokens: int) -> str | None:
        """Return a text that says which output it stands for."""
        node, index = self._written.written(request)
        return f"⟨{num_tokens} tokens of {node} for {self._texts.unique_id(node, index)}⟩"

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
