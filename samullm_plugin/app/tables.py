"""Request tables from drafts: token counts, limits and edges as columns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from samullm_plugin.app.drafts import Draft, NodeDraft
from samullm_plugin.app.loaded import NodeSource
from samullm_plugin.app.nodespec import NodeSection, PythonSection
from samullm_plugin.app.promptcounts import PromptCounts, StandIn, shared_tokens
from samullm_plugin.app.requestlines import CHARACTERS_PER_TOKEN, TokenCounter
from samullm_plugin.app.shortest import shortest_output
from samullm_plugin.checkpoints.tokenizing import WINDOW
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import PythonNode, RequestTable
from samullm_plugin.model.types import Ints

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
