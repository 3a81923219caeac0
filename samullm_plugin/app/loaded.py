"""What was read from an ``app.yaml``: the application to plan, and the texts to run it with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from samullm_plugin.app.bodies import content_text, image_parts
from samullm_plugin.app.expressions import Expression
from samullm_plugin.app.functions import Function, Scope
from samullm_plugin.app.schemas import Schema
from samullm_plugin.app.spec import Component, OutputSection, PlannerSection
from samullm_plugin.app.templates import Output, render
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.types import Ints

OutputOf = Callable[[int, int], Output | None]
"""The output of (node, request); None if that request was not needed."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What an output must be like: a match of a pattern, or a true expression; either or both None.

    Attributes:
        pattern: searched for in the output's text.
        expression: of the row's fields.
    """

    pattern: re.Pattern[str] | None = None
    expression: Expression | None = None

    def holds(self, fields: Mapping[str, Any]) -> bool:
        """Return whether it does.

        Args:
            fields: of the row, its output as ``output``.

        Raises:
            ExpressionError: if the expression has no value.
        """
        if self.expression is not None:
            return bool(self.expression.value(fields))
        return self.pattern is None or self.pattern.search(fields["output"]) is not None


@dataclass(frozen=True, slots=True)
class Branch:
    """A node that a router may choose.

    Attributes:
        node: index of the node.
        when: what the router's output is like; None: no other branch matches.
    """

    node: int
    when: Condition | None


@dataclass(frozen=True, slots=True)
class PythonCall:
    """How a Python node's function is called.

    Attributes:
        function: the function.
        scope: what it is given.
        most: rows that one may become; None: it is not asked for lists.
        batch_size: rows per call, with scope ``batch``.
        timeout_s: seconds a row (with scope ``all``, a call) may take.
        workers: processes.
        num_calls: how many of the node's requests are calls; the rest are rows behind them.
    """

    function: Function
    scope: Scope
    most: int | None
    batch_size: int
    timeout_s: float
    workers: int
    num_calls: int


@dataclass(frozen=True, slots=True, eq=False)
class NodeSource:
    """Texts and parameters of a node's requests, in the order of its request table.

    Attributes:
        name: of the node as it is written, without a model's name.
        ids: unique per request.
        items: line of the requests file each comes from; copies and chunks share it.
        fields: of the line, for templates; made when they are asked for.
        labels: name of the input each entry of the table's ``input_node`` belongs to; ``previous``
            within chains and empty where an output is only waited for.
        inputs: names of all inputs, whether or not a request has any.
        parents: per request, node and request whose row it goes on with; None: it begins one.
        fallback: of the entries of ``input_node``, those that enter only where the others of their
            label are missing.
        template: Jinja2 text of the prompt; None: the line's prompt, then the inputs.
        turns: instead of a template, role and template of each turn; with roles of
            ``FIELD_TURNS``, a field of the row.
        own_prompt: whether without a template the line's prompt is part of the prompt.
        chat: the prompt is sent through the chat template.
        chat_options: ``chat_template`` and ``chat_template_kwargs``, if given.
        sampling: vLLM sampling parameters of the node.
        request_sampling: those of single requests, which come first; by request.
        request_chat: variables of the chat template for single requests, which comes first.
        samples: which output of its line a request is, from 0, where a line asks for several.
        refused: why a request cannot be asked.
        prompt_token_ids: token ids given instead of a text, by request.
        branches: where this node, as a router, may send its requests.
        keep: what the output of a kept item is like, for a filter.
        passes: outputs that are not kept, or match no branch, may be taken by joins.
        call: how the node's function is called; None: it has a model.
        schema: what outputs must be.
        check: function that may reject outputs.
        retries: how often a rejected output is asked for again.
        retry_temperature: what is added to the temperature each time.
        lora: folder of an adapter.
        pair: template of a second text.
        task: of a pooling model: ``embed``, ``score``, ``classify`` or ``reward``; empty: text is
            generated.
        class_names: of the model, for ``task: classify``; empty: they have none.
        sample: an output as its user says the node may give it.
        folder: what files that rows name are relative to.
    """

    ids: tuple[str, ...]
    items: tuple[str, ...]
    fields: Sequence[Mapping[str, Any]]
    labels: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    name: str = ""
    parents: tuple[tuple[int, int] | None, ...] = ()
    fallback: frozenset[int] = frozenset()
    template: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    own_prompt: bool = True
    chat: bool = False
    chat_options: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, object] = field(default_factory=dict)
    request_sampling: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    request_chat: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    samples: Mapping[int, int] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)
    prompt_token_ids: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    keep: Condition | None = None
    passes: bool = False
    call: PythonCall | None = None
    schema: Schema | None = None
    check: Function | None = None
    retries: int = 0
    retry_temperature: float = 0.0
    lora: str | None = None
    pair: str | None = None
    task: str = ""
    class_names: tuple[str, ...] = ()
    sample: Any = None
    folder: Path = Path()

    def sampling_params(self, request: int) -> dict[str, object]:
        """Return the sampling parameters of one request."""
        return {**self.sampling, **self.request_sampling.get(request, {})}

    def parent(self, request: int) -> tuple[int, int] | None:
        """Return node and request whose row a request goes on with."""
        return self.parents[request] if self.parents else None

    def branch(self, fields: Mapping[str, Any]) -> int | None:
        """Return the node a router chooses for a row, or None if no branch matches."""
        otherwise = None
        for branch in self.branches:
            if branch.when is None:
                otherwise = branch.node
            elif branch.when.holds(fields):
                return branch.node
        return otherwise

    def with_nodes(self, place: Sequence[int]) -> NodeSource:
        """Return the same with nodes named by other indices."""
        branches = tuple(Branch(place[b.node], b.when) for b in self.branches)
        parents = tuple(None if p is None else (place[p[0]], p[1]) for p in self.parents)
        return replace(self, branches=branches, parents=parents)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedApplication:
    """An application and everything that was said about planning and running it.

    Attributes:
        app: the application.
        cluster: its devices; None if the file names none.
        planner: how to plan.
        executor: how to run.
        sources: per node the texts; None for an application built without any.
        output_tokens: per node the output lengths if they are known beforehand.
        path: the file it was read from.
        output: the joined table to write; None: none.
        executor_given: whether the file says how to run, rather than nothing.
    """

    app: Application
    cluster: Cluster | None = None
    planner: PlannerSection = field(default_factory=PlannerSection)
    executor: Component = field(default_factory=lambda: Component(type="simulated"))
    sources: tuple[NodeSource, ...] | None = None
    output_tokens: tuple[Ints, ...] | None = None
    path: Path | None = None
    output: OutputSection | None = None
    executor_given: bool = True

    def conversation(
        self, node: int, request: int, output_of: OutputOf
    ) -> str | list[dict[str, object]]:
        """Return a request's prompt: a text, or the turns of a conversation.

        Args:
            node: index of the node.
            request: index of the request.
            output_of: the outputs it waits for.

        Raises:
            InputError: if the application has no texts or a template fails.
        """
        if self.sources is None:
            raise InputError(f"application {self.app.name} has no prompts: it can only be planned")
        source = self.sources[node]
        where = f"node {self.app.nodes[node].name}, request {source.ids[request]}"
        inputs = self.inputs(node, request, output_of)
        return conversation(source, source.fields[request], inputs, where)

    def pair(self, node: int, request: int, output_of: OutputOf) -> str | None:
        """Return the second text of a request that compares two; None: it has none.

        Arguments and errors as of :meth:`conversation`.
        """
        assert self.sources is not None
        source = self.sources[node]
        if source.pair is None:
            return None
        where = f"node {self.app.nodes[node].name}, request {source.ids[request]}"
        inputs = self.inputs(node, request, output_of)
        return pair_text(source, source.fields[request], inputs, where)

    def inputs(self, node: int, request: int, output_of: OutputOf) -> dict[str, list[Output]]:
        """Return the outputs that a request is given, by the names of its inputs."""
        assert self.sources is not None
        source, table = self.sources[node], self.app.all_nodes[node].requests
        found: dict[str, list[Output]] = {name: [] for name in source.inputs}
        spare: dict[str, list[Output]] = {}
        for entry in table.entries(request):
            label = source.labels[entry]
            if not label:
                continue
            output = output_of(int(table.input_node[entry]), int(table.input_request[entry]))
            place = spare if entry in source.fallback else found
            mine = place.setdefault(label, [])
            if output is not None:
                mine.append(output)
        for label, outputs in spare.items():
            if not found.get(label):
                found[label] = outputs
        return found


def conversation(
    source: NodeSource,
    fields: Mapping[str, Any],
    inputs: Mapping[str, Sequence[Output]],
    where: str,
) -> str | list[dict[str, object]]:
    """Return a prompt: a text, or the turns of a conversation.

    Args:
        source: of the node.
        fields: of the row.
        inputs: outputs by input name; a template sees each under its name (several as one text)
            and as a list under ``inputs.name``.
        where: node and request, for messages.

    Raises:
        InputError: naming the template's node and what is wrong.
    """
    if source.turns:
        values = _template_values(source, fields, inputs)
        made: list[dict[str, object]] = []
        images: list[dict[str, object]] = []
        for role, template in source.turns:
            if role == "history":
                made += history(fields, template, where)
            elif role == "image":
                images += image_parts(fields, template, source.folder, where)
            else:
                text = render(template, values, where)
                content = [*images, {"type": "text", "text": text}] if images else text
                made.append({"role": role, "content": content})
                images = []
        return made
    earlier, last_user = _own_turns(source, fields)
    if source.template is None:
        own = [*earlier, *last_user]
        asked = prompt_text(fields) if source.own_prompt and not own else ""
        text = "\n\n".join(t for t in (asked, *(o for os in inputs.values() for o in os)) if t)
        if own:
            return [*own, {"role": "user", "content": text}] if text else own
    else:
        text = render(source.template, _template_values(source, fields, inputs), where)
        if earlier or last_user:  # the template makes the last turn of the user
            return [*earlier, {"role": "user", "content": text}]
    return [{"role": "user", "content": text}] if source.chat else text


def _own_turns(
    source: NodeSource, fields: Mapping[str, Any]
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Return the turns of a row's own conversation, and its last one if that is the user's."""
    own = list(fields.get("messages") or ()) if source.own_prompt else ()
    if not own:
        return [], []
    last = own[-1:] if own and own[-1].get("role") == "user" else []
    return own[: len(own) - len(last)], last


def _template_values(
    source: NodeSource, fields: Mapping[str, Any], inputs: Mapping[str, Sequence[Output]]
) -> dict[str, Any]:
    """Return what the templates of a request find by name."""
    values = {"previous": "", "prompt": "", **fields}
    if "prompt" not in fields and fields.get("messages"):
        _, last_user = _own_turns(source, fields)
        values["prompt"] = prompt_text({"messages": last_user} if last_user else fields)
    for name, outputs in inputs.items():
        values[name] = outputs[0] if len(outputs) == 1 else "\n\n".join(outputs)
    values["inputs"] = inputs
    return values


def pair_text(
    source: NodeSource,
    fields: Mapping[str, Any],
    inputs: Mapping[str, Sequence[Output]],
    where: str,
) -> str:
    """Return the second text of a request; arguments and errors as of :func:`conversation`."""
    assert source.pair is not None
    return render(source.pair, _template_values(source, fields, inputs), f"{where}.pair")


def history(fields: Mapping[str, Any], name: str, where: str) -> list[dict[str, object]]:
    """Return the turns that a field of a row holds.

    Raises:
        InputError: if it holds none.
    """
    turns = fields.get(name)
    good = isinstance(turns, list) and all(
        isinstance(t, Mapping) and isinstance(t.get("role"), str) and "content" in t for t in turns
    )
    if not good:
        raise InputError(
            f"{where}: messages: the field {name!r} holds no turns; it must be a list of mappings "
            "with role and content"
        )
    return [dict(t) for t in turns or ()]


def prompt_text(fields: Mapping[str, Any]) -> str:
    """Return the text of a line: its prompt, or its messages' contents."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return prompt
    messages = fields.get("messages") or ()
    return "\n".join(content_text(m.get("content")) for m in messages)
