"""What was read from an ``app.yaml``: the application to plan, and the texts to run it with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from samullm_plugin.app.bodies import content_text
from samullm_plugin.app.spec import Component, OutputSection, PlannerSection
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import Application
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.types import Ints

OutputOf = Callable[[int, int], str | None]
"""Text of the output of (node, request); None if that request was not needed."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A node that a router may choose.

    Attributes:
        node: index of the node.
        when: searched for in the router's output; None: if no other branch matches.
    """

    node: int
    when: re.Pattern[str] | None


@dataclass(frozen=True, slots=True, eq=False)
class NodeSource:
    """Texts and parameters of a node's requests, in the order of its request table.

    Attributes:
        ids: unique per request.
        items: line of the requests file each comes from; copies and chunks share it.
        fields: of the line, for templates.
        labels: name of the input each entry of the table's ``input_node`` belongs to; ``previous``
            within chains and empty where an output is only waited for.
        inputs: names of all inputs, whether or not a request has any.
        template: Jinja2 text of the prompt; None: the line's prompt, then the inputs.
        own_prompt: whether without a template the line's prompt is part of the prompt.
        chat: the prompt is sent through the chat template.
        sampling: vLLM sampling parameters of the node.
        request_sampling: those of single requests, which come first; by request.
        request_chat: what the chat template is told of single requests.
        samples: which output of its line a request is, from 0, where a line asks for several.
        refused: why a request cannot be asked.
        prompt_token_ids: token ids given instead of a text, by request.
        branches: where this node, as a router, may send its requests.
        keep: what the output of a kept item contains, for a filter.
    """

    ids: tuple[str, ...]
    items: tuple[str, ...]
    fields: tuple[Mapping[str, Any], ...]
    labels: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    template: str | None = None
    own_prompt: bool = True
    chat: bool = False
    sampling: Mapping[str, object] = field(default_factory=dict)
    request_sampling: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    request_chat: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    samples: Mapping[int, int] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)
    prompt_token_ids: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    keep: re.Pattern[str] | None = None

    def sampling_params(self, request: int) -> dict[str, object]:
        """Return the sampling parameters of one request."""
        return {**self.sampling, **self.request_sampling.get(request, {})}

    def branch(self, output: str) -> int | None:
        """Return the node a router's output chooses, or None if no branch matches."""
        otherwise = None
        for branch in self.branches:
            if branch.when is None:
                otherwise = branch.node
            elif branch.when.search(output):
                return branch.node
        return otherwise

    def keeps(self, output: str) -> bool:
        """Return whether a filter's output lets its item through."""
        return self.keep is None or self.keep.search(output) is not None


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

    def messages(
        self, node: int, request: int, output_of: OutputOf
    ) -> list[dict[str, object]] | None:
        """Return a request's conversation, or None if its prompt is a plain text.

        Arguments and errors as of :meth:`prompt`.
        """
        if self.sources is None:
            return None
        source = self.sources[node]
        own = source.fields[request].get("messages") if source.own_prompt else None
        if own and source.template is None:
            rest = replace(source, own_prompt=False)
            text = self._render(rest, node, request, output_of)
            return [*own, {"role": "user", "content": text}] if text else list(own)
        if own or source.chat:
            return [{"role": "user", "content": self.prompt(node, request, output_of)}]
        return None

    def prompt(self, node: int, request: int, output_of: OutputOf) -> str:
        """Return the text of a request's prompt.

        Args:
            node: index of the node.
            request: index of the request.
            output_of: texts of the outputs it waits for.

        Raises:
            InputError: if the application has no texts or the template fails.
        """
        if self.sources is None:
            raise InputError(f"application {self.app.name} has no prompts: it can only be planned")
        return self._render(self.sources[node], node, request, output_of)

    def _render(self, source: NodeSource, node: int, request: int, output_of: OutputOf) -> str:
        """Return a prompt with its inputs in place."""
        table = self.app.nodes[node].requests
        names = (*source.inputs, *source.labels)
        inputs: dict[str, list[str]] = {name: [] for name in names if name}
        part = range(int(table.input_indptr[request]), int(table.input_indptr[request + 1]))
        for entry in part:
            text = output_of(int(table.input_node[entry]), int(table.input_request[entry]))
            if source.labels[entry] and text is not None:
                inputs[source.labels[entry]].append(text)
        where = f"node {self.app.nodes[node].name}, request {source.ids[request]}"
        return render(source.template, source.fields[request], inputs, source.own_prompt, where)


_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
)


def render(
    template: str | None,
    fields: Mapping[str, Any],
    inputs: Mapping[str, list[str]],
    own_prompt: bool,
    where: str,
) -> str:
    """Return a prompt.

    Args:
        template: Jinja2 text, or None: the line's prompt, then the inputs, by empty lines.
        fields: of the line.
        inputs: texts by input name; a template sees each as one text under its name and as a list
            under ``inputs.name``.
        own_prompt: whether without a template the line's own prompt is used.
        where: node and request, for messages.

    Raises:
        InputError: naming the template's node and what is wrong.
    """
    if template is None:
        own = [prompt_text(fields)] if own_prompt else []
        return "\n\n".join(t for t in (*own, *(t for ts in inputs.values() for t in ts)) if t)
    joined = {name: "\n\n".join(texts) for name, texts in inputs.items()}
    values = {"previous": "", "prompt": prompt_text(fields), **fields, **joined, "inputs": inputs}
    try:
        return _compiled(template).render(values)
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: prompt template: {error}") from error


@lru_cache(maxsize=256)
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


def prompt_text(fields: Mapping[str, Any]) -> str:
    """Return the text of a line: its prompt, or its messages' contents."""
    if isinstance(fields.get("prompt"), str):
        return str(fields["prompt"])
    messages = fields.get("messages") or ()
    return "\n".join(content_text(m.get("content")) for m in messages)


def referenced(template: str, where: str) -> set[str]:
    """Return the variables a template uses, and ``inputs.x`` for each list of inputs it uses.

    Raises:
        InputError: if it is not Jinja2.
    """
    from jinja2 import meta, nodes

    try:
        tree = _ENVIRONMENT.parse(template)
        lists = {
            f"inputs.{part.attr}"
            for part in tree.find_all(nodes.Getattr)
            if isinstance(part.node, nodes.Name) and part.node.name == "inputs"
        }
        return meta.find_undeclared_variables(tree) | lists
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{where}: line {error.lineno} of the template: {error}") from error
