"""From drafts to texts, parameters and request tables: token counts, limits, edges as columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from samullm_plugin.app import drafts
from samullm_plugin.app.adapters import adapter_folder
from samullm_plugin.app.bodies import FIELD_TURNS
from samullm_plugin.app.drafts import Draft, NodeDraft, shared_tokens
from samullm_plugin.app.functions import function_of
from samullm_plugin.app.graph import NodeGraph
from samullm_plugin.app.keptrows import RowFields
from samullm_plugin.app.loaded import Branch, NodeSource, PythonCall
from samullm_plugin.app.nodespec import (
    ChoiceSection,
    MessageSection,
    NodeSection,
    PythonSection,
    RegexSection,
)
from samullm_plugin.app.pooling import class_names
from samullm_plugin.app.promptcounts import PromptCounts
from samullm_plugin.app.requestlines import CHARACTERS_PER_TOKEN, PLAIN, TokenCounter
from samullm_plugin.app.schemas import Schema, SchemaResolver, json_schema, regex_schema
from samullm_plugin.app.schemasamples import shortest_output
from samullm_plugin.app.templates import referenced
from samullm_plugin.app.trying import StandIn
from samullm_plugin.checkpoints.tokenizing import WINDOW
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.application import PythonNode
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.model.types import Ints

Turns = tuple[tuple[str, str], ...]
"""Role and template of each turn; roles of ``FIELD_TURNS`` name a field of the row instead."""


def node_templates(section: NodeSection, turns: Turns, where: str) -> dict[str, frozenset[str]]:
    """Return the names that each template of a node uses, by the template.

    Raises:
        InputError: naming the template that is none.
    """
    written = [] if section.prompt is None else [("prompt", section.prompt)]
    written += [(f"messages.{role}", text) for role, text in turns if role not in FIELD_TURNS]
    written += [] if section.pair is None else [("pair", section.pair)]
    if turns and not written:
        return {"": frozenset()}
    found = {}
    for name, template in written:
        try:
            found[template] = referenced(template)
        except InputError as error:
            raise InputError(f"{where}.{name}: {error}") from error
    return found


def node_turns(
    section: NodeSection, declared: Mapping[str, Sequence[MessageSection]], where: str
) -> Turns:
    """Return role and template of every turn of a node, with those declared elsewhere.

    Raises:
        InputError: for turns that are not declared, or include themselves.
    """

    def expanded(messages: Sequence[MessageSection], above: tuple[str, ...]) -> Iterator[
        tuple[str, str]
    ]:  # fmt: skip
        for message in messages:
            if message.turn is not None:
                yield message.turn
            elif message.history is not None:
                yield "history", message.history
            elif message.image is not None:
                yield "image", message.image
            elif (name := message.include or "") in above:
                raise InputError(f"{where}.messages: {name!r} includes itself")
            elif name not in declared:
                hint = suggest(name, declared) or f"; messages: {', '.join(declared) or 'none'}"
                raise InputError(f"{where}.messages: no messages are named {name!r}{hint}")
            else:
                yield from expanded(declared[name], (*above, name))

    turns = tuple(expanded(section.messages, ()))
    for (role, name), (then, _) in pairwise((*turns, ("", ""))):
        if role == "image" and then not in ("image", "user"):
            raise InputError(f"{where}.messages: behind the image {name!r} there is no user turn")
    return turns


def node_source(graph: NodeGraph, index: int, turns: Turns, schema: Schema | None) -> NodeSource:
    """Return the texts of a node whose requests are there.

    Args:
        graph: the nodes.
        index: which of them.
        turns: of its conversations.
        schema: what its outputs must be.

    Raises:
        InputError: naming the field of a function that is none.
    """
    node, section = graph.nodes[index], graph.nodes[index].section
    where = graph.where(node)
    branches = tuple(
        Branch(
            graph.resolve([name], f"{where}.route")[0],
            drafts.condition(branch.when, branch.expr),
        )
        for name, branch in section.route.items()
    )
    labels = tuple(w.label for r in node.requests for w in r.waits)
    fallback = [w.fallback for r in node.requests for w in r.waits]
    inputs = dict.fromkeys((*section.edges, *labels))
    common = NodeSource(
        ids=tuple(r.id for r in node.requests),
        items=tuple(r.item for r in node.requests),
        fields=RowFields(r.row for r in node.requests),
        labels=labels,
        inputs=tuple(n for n in inputs if n and n != "previous"),
        name=node.section_name,
        parents=tuple(r.parent for r in node.requests),
        fallback=frozenset(k for k, is_fallback in enumerate(fallback) if is_fallback),
        branches=branches,
        keep=drafts.condition(section.keep.when, section.keep.expr) if section.keep else None,
        passes=section.otherwise == "pass",
        own_prompt=section.requests is not None,
        sample=section.sample,
        folder=graph.path.parent,
    )
    if isinstance(section, PythonSection):
        function = function_of(
            section.python, graph.path.parent, section.options, f"{where}.python"
        )
        call = PythonCall(
            function, section.scope, section.max, section.batch_size, section.timeout_s,
            section.workers, node.num_calls,
        )  # fmt: skip
        return replace(common, call=call)
    return _with_texts(graph, node, section, common, turns, schema)


def _with_texts(
    graph: NodeGraph,
    node: NodeDraft,
    section: NodeSection,
    common: NodeSource,
    turns: Turns,
    schema: Schema | None,
) -> NodeSource:
    """Return the texts of a model's node."""
    where = graph.where(node)
    lines = {
        k: r.line.values
        for k, r in enumerate(node.requests)
        if r.line and r.line.values is not PLAIN
    }
    sampling = section.sampling_params.given()
    sampling.pop("n", None)
    own: dict[int, Mapping[str, object]] = {}
    for k, request in enumerate(node.requests if not section.pools else ()):
        values = lines.get(k, PLAIN)
        if values is PLAIN and not request.sample:
            continue
        given = values.sampling
        if values.max_tokens is not None:
            given = {**given, "max_tokens": values.max_tokens}
        if request.sample and (seed := given.get("seed", sampling.get("seed"))) is not None:
            given = {**given, "seed": int(str(seed)) + request.sample}  # as vLLM's n does
        if given:
            own[k] = given
    if schema is not None:
        sampling["structured_outputs"] = schema.structured_outputs
    if section.asks_logprobs:
        sampling.setdefault("logprobs", 0)
    options = {
        "chat_template": section.chat_template,
        "chat_template_kwargs": dict(section.chat_template_kwargs) or None,
    }
    check = None
    if section.check is not None:
        check = function_of(section.check, graph.path.parent, {}, f"{where}.check")
    return replace(
        common,
        template=section.prompt,
        turns=turns,
        chat=section.chat or bool(section.messages),
        chat_options={k: v for k, v in options.items() if v is not None},
        sampling=sampling,
        request_sampling=own,
        prompt_token_ids={k: v.prompt_token_ids for k, v in lines.items() if v.prompt_token_ids},
        request_chat={k: v.chat for k, v in lines.items() if v.chat},
        samples={k: r.sample for k, r in enumerate(node.requests) if r.sample},
        schema=schema,
        check=check,
        retries=section.retries,
        retry_temperature=section.retry_temperature,
        lora=None if section.lora is None else str(adapter_folder(section.lora, graph.path)),
        pair=section.pair,
        task=section.task if section.pools else "",
        class_names=class_names(node.model) if section.task == "classify" and node.model else (),
    )


def node_schema(
    section: NodeSection, folder: Path, resolve: SchemaResolver, where: str
) -> Schema | None:
    """Return what the outputs of a node must be.

    Args:
        section: the node.
        folder: of its file.
        resolve: returns the JSON schema of a class.
        where: file and field, for messages.

    Raises:
        InputError: for a schema that is none.
    """
    given, where = section.output_schema, f"{where}.output_schema"
    if given is None:
        return None
    if isinstance(given, RegexSection):
        return regex_schema(given.regex, f"{where}.regex")
    if isinstance(given, ChoiceSection):
        return Schema("choice", json.dumps(given.choice))
    if isinstance(given, Mapping):
        return json_schema(given, where)
    if isinstance(given, str):
        function = function_of(given, folder, {}, where)
        return json_schema(resolve(function, where), where)
    return json_schema(given.model_json_schema(), where)


SHOWN_TEXT = 80
"""Characters of a shortest output that a message shows."""


def python_node(node: NodeDraft) -> PythonNode:
    """Return a Python node with its table."""
    section = node.section
    assert isinstance(section, PythonSection)
    share = 1.0
    if section.max is not None:
        share = min(1.0, 1.0 / max(section.rate * section.max, 1.0))
    if section.tokens is not None:
        share = 0.0
    tokens = np.full(len(node.requests), section.tokens or 0, np.int64)
    table = _table(node, tokens, np.ones_like(tokens))
    return PythonNode(
        node.name, table, node.num_calls, section.seconds, section.workers, share,
        section.scope == "all",
    )  # fmt: skip


def _table(node: NodeDraft, prompts: Ints, limits: Ints) -> RequestTable:
    """Return a table with these lengths."""
    requests = node.requests
    waits = [w for r in requests for w in r.waits]
    needed = np.array([w.needed for w in waits], bool)
    table = RequestTable.of(
        prompts,
        limits,
        [[(w.node, w.request) for w in r.waits] for r in requests] if waits else None,
        probability=np.array([0.0 if r.error else r.probability for r in requests]),
        choice=np.array([r.choice for r in requests], np.int64),
        gate=np.array([r.gate for r in requests], np.int64),
        needed=needed if needed.any() else None,
    )
    table.input_in_prompt[:] = np.array([bool(w.label) for w in waits], bool)
    return table


def request_table(
    node: NodeDraft,
    source: NodeSource,
    stand_ins: Mapping[str, StandIn],
    where: str,
    count_tokens: TokenCounter | None,
) -> tuple[RequestTable, list[str]]:
    """Return the table of a model's node, and remarks about its prompt lengths.

    What is wrong with single requests is noted in them; they count as never taken.

    Args:
        node: the node.
        source: its texts.
        stand_ins: by the name of an input, what to try templates with.
        where: file and field, for messages.
        count_tokens: counts tokens where a tokenizer is at hand.

    Raises:
        InputError: if the node's limits or template are wrong.
    """
    assert node.model is not None
    counting = PromptCounts(node, source, stand_ins, where, count_tokens)
    num = len(node.requests)
    prompts = np.empty(num, np.int64)
    for first in range(0, num, WINDOW):
        window = node.requests[first : first + WINDOW]
        prompts[first : first + WINDOW] = counting.checked_tokens(window)
    given = (1 if r.error else _max_tokens(node, r, where) for r in node.requests)
    limits = np.fromiter(given, np.int64, num)
    _require_room(node, source, limits, where, count_tokens)
    table = _table(node, prompts, limits)
    if lead := counting.lead_tokens():
        table.prefix_tokens[:] = np.minimum(lead, prompts)
    else:
        own = (0 if r.error else shared_tokens(node, r) for r in node.requests)
        table.prefix_tokens[:] = np.fromiter(own, np.int64, num)
    notes = []
    if counting.estimated:
        notes.append(
            f"node {node.name}: prompt tokens of {counting.estimated} of {len(node.requests)} "
            f"requests are estimated at {CHARACTERS_PER_TOKEN} characters per token"
        )
    if counting.images_left_out:
        notes.append(
            f"node {node.name}: of {counting.images_left_out} requests the tokens of images, audio "
            "or video are not counted: they, or the model's processor, are not at hand"
        )
    if counting.too_long:
        notes.append(
            f"node {node.name}: {counting.too_long} of these prompts may be longer than "
            f"max_model_len {node.model.max_model_len}; the engine refuses those that are"
        )
    return table, notes


def _require_room(
    node: NodeDraft,
    source: NodeSource,
    limits: Ints,
    where: str,
    count_tokens: TokenCounter | None,
) -> None:
    """Refuse limits within which no output can follow the node's schema.

    Raises:
        InputError: naming the field, or the first request that has such a limit.
    """
    if source.schema is None or node.model is None:
        return
    text, least = shortest_output(source.schema, node.model, count_tokens)
    short = [k for k in np.flatnonzero(limits < least) if node.requests[k].error is None]
    if not short:
        return
    request, section = node.requests[short[0]], node.section
    assert isinstance(section, NodeSection)
    own = request.line is not None and request.line.values.max_tokens is not None
    place = request.where(where) if own else f"{where}.sampling_params"
    shown = text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}..."
    raise InputError(
        f"{place}: max_tokens is {limits[short[0]]}, and the shortest output that follows "
        f"output_schema, {shown}, has {least} tokens; raise max_tokens to what such outputs need"
    )


def _max_tokens(node: NodeDraft, request: Draft, where: str) -> int:
    """Return a request's limit: its line's, else the node's."""
    section = node.section
    assert isinstance(section, NodeSection)
    if section.pools:
        return 1
    if request.line is not None and request.line.values.max_tokens is not None:
        return request.line.values.max_tokens
    limit = section.sampling_params.max_tokens
    if limit is None:
        raise InputError(
            f"{where}.sampling_params.max_tokens: missing, and request {request.id!r} has no "
            "max_tokens of its own; a plan needs the limit of every output"
        )
    return limit
