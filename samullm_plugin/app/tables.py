"""Request tables from drafts: token counts, limits and edges as columns."""

from __future__ import annotations

import numpy as np

from samullm_plugin.app.drafts import Draft, NodeDraft
from samullm_plugin.app.loaded import prompt_text, referenced, render
from samullm_plugin.app.requests import TokenCounter, estimate_tokens
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import RequestTable


def request_table(
    node: NodeDraft, where: str, count_tokens: TokenCounter | None
) -> tuple[RequestTable, int]:
    """Return a node's table, and how many of its prompt lengths are estimates.

    Raises:
        InputError: for a request without text, length or limit.
    """
    counting = _Counting(node, where, count_tokens)
    prompts = [counting.prompt_tokens(r) for r in node.requests]
    for request, tokens in zip(node.requests, prompts, strict=True):
        if tokens >= node.model.max_model_len:
            place = request.line.where if request.line else f"{where}: request {request.id!r}"
            raise InputError(
                f"{place}: its prompt has {tokens} tokens, but node {node.name} uses "
                f"{node.model.name} with max_model_len {node.model.max_model_len}; shorten it, "
                "split it into chunks, or raise max_model_len"
            )
    table = RequestTable.of(
        prompts,
        [_max_tokens(node, r, where) for r in node.requests],
        [[(w.node, w.request) for w in r.waits] for r in node.requests],
        probability=np.array([r.probability for r in node.requests]),
        choice=np.array([r.choice for r in node.requests], np.int64),
        gate=np.array([r.gate for r in node.requests], np.int64),
        prefix_id=np.full(len(prompts), -1, np.int64),
        prefix_tokens=np.array([_prefix_tokens(node, r) for r in node.requests], np.int64),
    )
    labels = [bool(w.label) for r in node.requests for w in r.waits]
    table.input_in_prompt[:] = np.array(labels, bool)
    too_long = table.prefix_tokens > table.prompt_tokens
    if too_long.any():
        k = int(np.argmax(too_long))
        raise InputError(
            f"{where}: prefix_tokens of request {node.requests[k].id!r} is "
            f"{table.prefix_tokens[k]}, but its prompt has {table.prompt_tokens[k]} tokens"
        )
    return table, counting.estimated


def _max_tokens(node: NodeDraft, request: Draft, where: str) -> int:
    """Return a request's limit: its line's, else the node's."""
    if request.line is not None:
        values = request.line.values
        own = values.max_tokens or values.sampling_params.max_tokens
        if own is not None:
            return own
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
        self.estimated = 0
        section = node.section
        self.labels = {w.label for r in node.requests for w in r.waits if w.label}
        self.labels |= set(section.edges)
        self.variables = (
            referenced(section.prompt, f"{where}.prompt") if section.prompt is not None else set()
        )
        self._constant: int | None = section.template_tokens
        if section.prompt is not None:
            known = {"prompt", "previous", "inputs", *self.labels}
            for request in node.requests[:1]:
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
        if uses_own and counted is None and not prompt_text(request.fields):
            place = request.line.where if request.line else f"{self.where}: request {request.id!r}"
            raise InputError(
                f"{place}: it has no prompt; give prompt, messages, prompt_tokens or "
                "prompt_token_ids"
            )
        if counted is not None and (uses_own or not self.variables - self.labels):
            return max((counted if uses_own else 0) + self._template(request), 1)
        blank: dict[str, list[str]] = {label: [] for label in self.labels}
        text = render(section.prompt, request.fields, blank, uses_own, self.where)
        extra = (section.template_tokens or 0) if section.prompt is None else 0
        return max(self._count(text) + extra, 1)

    def _own_count(self, request: Draft) -> int | None:
        """Return the tokens the line states for its own text."""
        stated = request.fields.get("prompt_tokens")
        return stated if isinstance(stated, int) else None

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
