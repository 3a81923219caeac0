"""Request tables from drafts: token counts, limits and edges as columns."""

from __future__ import annotations

import numpy as np

from samullm_plugin.app.bodies import has_media
from samullm_plugin.app.drafts import Draft, NodeDraft
from samullm_plugin.app.loaded import prompt_text, referenced, render
from samullm_plugin.app.requests import (
    CHARACTERS_PER_TOKEN,
    RowError,
    TokenCounter,
    estimate_tokens,
)
from samullm_plugin.checkpoints.tokenizing import WINDOW, OwnTokenizers
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import RequestTable


def request_table(
    node: NodeDraft, where: str, count_tokens: TokenCounter | None
) -> tuple[RequestTable, list[str]]:
    """Return a node's table, and remarks about its prompt lengths.

    What is wrong with single requests is noted in them; they count as never taken.

    Raises:
        InputError: if the node's limits or template are wrong.
    """
    counting = _Counting(node, where, count_tokens)
    prompts: list[int] = []
    for first in range(0, len(node.requests), WINDOW):
        window = node.requests[first : first + WINDOW]
        if isinstance(count_tokens, OwnTokenizers) and node.section.prompt is None:
            texts = [prompt_text(r.fields) for r in window if r.error is None]
            count_tokens.prime(node.model, [t for t in texts if t])
        prompts += [_checked_tokens(node, r, counting) for r in window]
    table = RequestTable.of(
        prompts,
        [1 if r.error else _max_tokens(node, r, where) for r in node.requests],
        [[(w.node, w.request) for w in r.waits] for r in node.requests],
        probability=np.array([0.0 if r.error else r.probability for r in node.requests]),
        choice=np.array([r.choice for r in node.requests], np.int64),
        gate=np.array([r.gate for r in node.requests], np.int64),
        prefix_id=np.full(len(prompts), -1, np.int64),
        prefix_tokens=np.array([_prefix_tokens(node, r) for r in node.requests], np.int64),
    )
    labels = [bool(w.label) for r in node.requests for w in r.waits]
    table.input_in_prompt[:] = np.array(labels, bool)
    notes = []
    if counting.estimated:
        notes.append(
            f"node {node.name}: prompt tokens of {counting.estimated} of {len(node.requests)} "
            f"requests are estimated at {CHARACTERS_PER_TOKEN} characters per token"
        )
    if counting.too_long:
        notes.append(
            f"node {node.name}: {counting.too_long} of these prompts may be longer than "
            f"max_model_len {node.model.max_model_len}; the engine refuses those that are"
        )
    return table, notes


def _checked_tokens(node: NodeDraft, request: Draft, counting: _Counting) -> int:
    """Return the tokens of a prompt; what is wrong with it becomes the request's error.

    Only a length that is known refuses a prompt as too long; an estimate is cut to what fits, and
    the engine decides.
    """
    if request.error is not None:
        return 1
    before = counting.estimated
    try:
        tokens = counting.prompt_tokens(request)
    except RowError as error:
        request.error = str(error)
        return 1
    most = node.model.max_model_len - 1
    shared = _prefix_tokens(node, request)
    if shared > tokens:
        request.error = f"prefix_tokens is {shared}, but its prompt has {tokens} tokens"
        return 1
    if tokens <= most:
        return tokens
    if counting.estimated > before:
        counting.too_long += 1
        return most
    request.error = (
        f"its prompt has {tokens} tokens, but node {node.name} uses {node.model.name} with "
        f"max_model_len {most + 1}; shorten it, split it into chunks, or raise max_model_len"
    )
    return 1


def _max_tokens(node: NodeDraft, request: Draft, where: str) -> int:
    """Return a request's limit: its line's, else the node's."""
    if request.line is not None:
        values = request.line.values
        if values.max_tokens is not None:
            return values.max_tokens
    limit = node.section.sampling_params.max_tokens
    if limit is None:
        raise InputError(
            f"{where}.sampling_params.max_tokens: missing, and request {request.id!r} has no "
            "max_tokens of its own; a plan needs the limit of every output"
        )
    return limit


def _prefix_tokens(node: NodeDraft, request: Draft) -> int:
    """Return the shared start of a request's prompt."""
    values = request.line.values if request.line else None
    if values and values.prefix_id is not None:
        return values.prefix_tokens
    return node.section.prefix_tokens


class _Counting:
    """Counts the tokens of a node's prompts without upstream outputs."""

    def __init__(self, node: NodeDraft, where: str, count_tokens: TokenCounter | None) -> None:
        self.node, self.where, self.count_tokens = node, where, count_tokens
        self.estimated = self.too_long = 0
        section = node.section
        self.labels = {w.label for r in node.requests for w in r.waits if w.label}
        self.labels |= set(section.edges)
        self.variables = (
            referenced(section.prompt, f"{where}.prompt") if section.prompt is not None else set()
        )
        self._constant: int | None = section.template_tokens
        if section.prompt is not None:
            known = {"prompt", "previous", "inputs", *self.labels}
            for request in [r for r in node.requests if r.error is None][:1]:
                plain = {v for v in self.variables if "." not in v}
                for name in sorted(plain - known - set(request.fields)):
                    raise InputError(
                        f"{where}.prompt: {{{{ {name} }}}} is neither a field of request "
                        f"{request.id!r} nor an input; inputs: "
                        f"{', '.join(sorted(self.labels)) or 'none'}"
                    )

    def prompt_tokens(self, request: Draft) -> int:
        """Return the tokens of one prompt, at least 1."""
        section, values = self.node.section, request.line.values if request.line else None
        if values and values.prompt_token_ids:
            return len(values.prompt_token_ids)
        counted = self._own_count(request)
        uses_own = "prompt" in self.variables if section.prompt else section.requests is not None
        if section.prompt is None and section.requests is None:
            return max(section.template_tokens or 0, 1)
        media = has_media(request.fields.get("messages") or ())
        if media and section.prompt is not None:
            raise RowError("its messages hold images, audio or video, which no `prompt` can take")
        if uses_own and counted is None and not media and not prompt_text(request.fields):
            raise RowError(
                "it has no prompt; give prompt, messages, prompt_tokens or prompt_token_ids"
            )
        if counted is not None and (uses_own or not self.variables - self.labels):
            return max((counted if uses_own else 0) + self._template(request), 1)
        blank: dict[str, list[str]] = {label: [] for label in self.labels}
        text = render(section.prompt, request.fields, blank, uses_own, self.where)
        extra = (section.template_tokens or 0) if section.prompt is None else 0
        return max(self._count(text) + extra, 1)

    def _own_count(self, request: Draft) -> int | None:
        """Return the tokens the line states for its own text."""
        return request.line.values.prompt_tokens if request.line else None

    def _template(self, request: Draft) -> int:
        """Return the tokens that the template adds to a stated count, counted once."""
        if self._constant is None:
            self._constant = 0
            if self.node.section.prompt is not None:
                blank: dict[str, list[str]] = {label: [] for label in self.labels}
                fields = {**request.fields, "prompt": "", "messages": ()}
                text = render(self.node.section.prompt, fields, blank, True, self.where)
                self._constant = self._count(text, estimates=0)
        return self._constant

    def _count(self, text: str, estimates: int = 1) -> int:
        """Return the tokens of a text, by a tokenizer if there is one."""
        if self.count_tokens is not None:
            exact = self.count_tokens(self.node.model, text)
            if exact is not None:
                return exact
        self.estimated += estimates
        return estimate_tokens(text)
