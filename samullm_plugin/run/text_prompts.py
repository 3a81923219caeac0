"""Prompts from the texts of an application: templates, conversations, routers and filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import structs

from samullm_plugin.app.bodies import with_files
from samullm_plugin.app.expressions import ExpressionError
from samullm_plugin.app.functions import Function, Row
from samullm_plugin.app.loaded import LoadedApplication, PythonCall
from samullm_plugin.app.pooling import pooled_value
from samullm_plugin.app.requestlines import estimate_tokens
from samullm_plugin.app.templates import Output, text_of
from samullm_plugin.errors import InputError, Reject
from samullm_plugin.model.application import Application
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.prompts import A_PROMPT, Given, Prepared, Prompt, PromptBuilder, Refused
from samullm_plugin.run.python_calls import Call, CallRunner, WorkerCalls
from samullm_plugin.run.results import RequestId, Result
from samullm_plugin.run.row_values import RowValues, known_of
from samullm_plugin.run.user_nodes import UserNodes


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

    def written(self, planned: RequestId) -> RequestId:
        """Return node and index, as the user wrote them, of a request."""
        name, index = self._users.written(planned)
        return self._index[name], index

    def _planned(self, written: RequestId) -> RequestId:
        node, part = self._users.parts[self._names[written[0]]]
        return node, part.place(written[1])

    def refusal(self, planned: RequestId) -> str | None:
        """Return why a request cannot be asked; None if it can."""
        node, r = self.written(planned)
        return self._sources[node].refused.get(r)

    def prepare(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return a request with the outputs it waited for in its template's places.

        Args:
            request: as it is planned.
            ledger: the results.
        """
        found = self._decided(request, ledger)
        if not isinstance(found, dict):
            return found
        return self._prompt(self.written(request), ledger, _among(found))

    @property
    def with_token_ids(self) -> bool:
        """Whether any prompt is given as tokens, to which outputs are added as tokens."""
        return self._with_token_ids

    def decide(self, request: RequestId, ledger: Ledger) -> Prepared:
        """Return what is to be done for a request; its prompt is not made."""
        found = self._decided(request, ledger)
        return A_PROMPT if isinstance(found, dict) else found

    def _decided(
        self, request: RequestId, ledger: Ledger
    ) -> Prepared | dict[RequestId, Output | None]:
        """Return what is to be done for a request; for a prompt, the outputs it is made of."""
        if self._users.repeats(request):
            return None  # the request itself is asked again
        node, r = self.written(request)
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
        return outputs

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
        found: dict[RequestId, Output | None] = {}
        kept: dict[int, bool] = {}
        for entry in table.entries(r):
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
        if value is None:
            return None  # the call dropped its row, or was made before the run was resumed
        if call.scope == "all":
            name = self._sources[node].ids[r]
            return _given(value[name]) if name in value else None
        k = (r - call.num_calls) % (call.most or 1)
        return _given(value[k]) if k < len(value) else None

    def call_runner(self) -> CallRunner:
        """Return what runs the calls of Python nodes; their processes start at once."""
        calls = WorkerCalls()
        for name, source in zip(self._names, self._sources, strict=True):
            if source.call is not None:
                node, _ = self._users.parts[name]
                calls.prepare(node, _call(source.call.function, source.call, ()))
        return calls

    def judge(self, request: RequestId, result: Result, ledger: Ledger) -> str | Call | None:
        """Return why an output is rejected, or the call that decides; None: it is accepted."""
        node, r = self.written(request)
        source = self._sources[node]
        value: Any = None
        if source.schema is not None and result.text is not None:
            try:
                value = source.schema.parse(result.text)
            except Reject as error:
                cut = "; it was cut at max_tokens: raise it, or ask for less"
                cut = cut if result.finish_reason == "length" else ""
                return f"the output {error}{cut}"
        if source.check is None:
            return None
        row = self._rows.without_output((node, r), ledger)
        value = result.text if value is None else value
        row.update({k: v for k, v in known_of(result).items() if k not in source.fields[r]})
        if isinstance(value, Mapping):
            row.update(value)
        row |= {source.name: value, "output": result.text, "node": self._names[node]}
        return Call(source.check, (row,))

    def pooled(self, request: RequestId, numbers: Sequence[float]) -> Any:
        """Return the fields of an output of a pooling model."""
        source = self._sources[self.written(request)[0]]
        return pooled_value(source.task, numbers, source.class_names)

    def again(self, request: RequestId, prompt: Prompt, attempt: int) -> Prompt | None:
        """Return a rejected request with another seed and a higher temperature."""
        source = self._sources[self.written(request)[0]]
        if attempt > source.retries:
            return None
        sampling = dict(prompt.sampling)
        if isinstance(seed := sampling.get("seed"), int):
            sampling["seed"] = seed + attempt
        warmer = source.retry_temperature * attempt
        sampling["temperature"] = float(str(sampling.get("temperature", 1.0))) + warmer
        return structs.replace(prompt, sampling=sampling)

    def _prompt(
        self, request: RequestId, ledger: Ledger, output_of: Callable[[int, int], Output | None]
    ) -> Prompt | Refused:
        node, r = request
        source, table = self._sources[node], self._loaded.app.nodes[node].requests
        inputs = [
            self._planned((int(table.input_node[e]), int(table.input_request[e])))
            for e in table.entries(r)
            if table.input_in_prompt[e]
        ]
        tokens = int(table.prompt_tokens[r]) + sum(int(ledger.generated[i][q]) for i, q in inputs)
        sampling = source.sampling_params(r)
        sampling.pop("max_tokens", None)
        text = messages = pair = None
        ids = source.prompt_token_ids.get(r)
        if ids is not None:  # outputs enter as token ids, behind the request's own
            known = [ledger.results[p].token_ids or () for p in inputs if p in ledger.results]
            ids = (*ids, *(t for output in known for t in output))
            tokens = len(ids)
        else:
            try:
                made = self._loaded.conversation(node, r, output_of)
                text, messages = (made, None) if isinstance(made, str) else (None, with_files(made))
                pair = self._loaded.pair(node, r, output_of)
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
            task=source.task or None,
            pair=pair,
            lora=source.lora,
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

    def context(self, written: RequestId, result: Result, ledger: Ledger) -> Mapping[str, Any]:
        """Return what expressions over a request would find by name if this came of it."""
        return self._rows.context(written, ledger, result)

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
