"""Requests as engines will be asked them: with stand-ins for outputs, or with a run's own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from samullm_plugin.app.bodies import media_parts
from samullm_plugin.app.loaded import LoadedApplication, NodeSource
from samullm_plugin.app.requestlines import estimate_tokens
from samullm_plugin.app.templates import text_of
from samullm_plugin.checkpoints.images import is_image
from samullm_plugin.checkpoints.tokenizing import OwnTokenizers, count_prompt_tokens
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.host.interfaces.executor import RequestOutput
from samullm_plugin.host.interfaces.observer import RunInfo
from samullm_plugin.model.application import Application, ModelNode, ModelSpec, PythonNode
from samullm_plugin.model.requests import RequestTable
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.prompts import Prepared, Prompt, Refused
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.run.text_prompts import TextPrompts


@dataclass(frozen=True, slots=True)
class PreviewedRequest:
    """One request, and what became of it.

    Attributes:
        node: name of its node.
        id: its name.
        item: the line it comes from.
        model: name of the model; empty for a Python function.
        prompt: its text, or None if it is a conversation or was not made.
        messages: the turns of its conversation.
        prompt_tokens: tokens of that; None: there is no prompt.
        exact: they were counted by the model's tokenizer.
        sampling: sampling parameters, structured outputs included.
        waits_for: requests whose outputs it waits for, as ``node:id``.
        status: ``asked``, ``skipped`` (another branch, or dropped), ``failed``.
        output: what was generated, or its stand-in; what a function returned.
        error: why it cannot be asked, or failed.
        only_if: nodes that decide whether it is asked, where their outputs are stand-ins.
    """

    node: str
    id: str
    item: str
    model: str
    prompt: str | None = None
    messages: tuple[Mapping[str, object], ...] | None = None
    prompt_tokens: int | None = None
    exact: bool = False
    sampling: Mapping[str, object] = field(default_factory=dict)
    waits_for: tuple[str, ...] = ()
    status: str = "asked"
    output: str | None = None
    error: str | None = None
    only_if: tuple[str, ...] = ()


def with_stand_ins(
    loaded: LoadedApplication, samples: Mapping[str, str]
) -> tuple[LoadedApplication, Ledger]:
    """Return an application with stand-ins for outputs, and what becomes of every request then.

    Routers and filters without a sample of their own let everything pass.

    Args:
        loaded: the application.
        samples: by node, an output as it may be; others are named in angle brackets.
    """
    app = loaded.app
    sources = tuple(
        source if _sample(samples, node.name) else _opened(source)
        for node, source in zip(app.all_nodes, loaded.sources or (), strict=True)
    )
    loaded = replace(loaded, sources=sources)
    ledger = Ledger(app)
    log = RunLog(RunInfo("preview", app.name, "", Path()))
    queue = RequestQueue(ledger, TextPrompts(loaded), log, {})
    queue.admit_first(0.0)
    going_on = True
    while going_on:
        going_on = False
        for i, node in enumerate(app.nodes):
            for request in queue.take_given(i, 0.0) if queue.queued(i) else ():
                text = _sample(samples, node.name) or _stand_in(sources[i], node.name)
                output = RequestOutput(
                    request.request, estimate_tokens(text), text=text, finish_reason="stop"
                )
                queue.finish((i, request.request), output, 0.0)
                going_on = True
        if queue.calls.busy:  # functions are called as in a run
            time.sleep(0.01)
            queue.end_calls(0.0)
            going_on = True
    queue.calls.close()
    return loaded, ledger


def _opened(source: NodeSource) -> NodeSource:
    """Return a node that lets everything pass and accepts every output."""
    return replace(source, keep=None, branches=(), check=None, retries=0)


def _stand_in(source: NodeSource, name: str) -> str:
    """Return an output: one that follows the node's schema, or one that names the node."""
    if source.schema is None:
        return f"⟨output of {name}⟩"
    return text_of(source.schema.example())


def _sample(samples: Mapping[str, str], node: str) -> str | None:
    return samples.get(node, samples.get(node.rpartition(".")[0]))


def previewed(
    loaded: LoadedApplication,
    ledger: Ledger,
    node: str | None = None,
    written: LoadedApplication | None = None,
) -> Iterator[PreviewedRequest]:
    """Yield every request with its prompt.

    Args:
        loaded: the application, as its user wrote it.
        ledger: of the same application: what became of its requests.
        node: only this node, or all nodes of this section; None: all.
        written: the application with its routers and filters, where ``loaded`` has stand-ins.

    Raises:
        InputError: if there is no such node, or the application has no texts.
    """
    app, prompts = loaded.app, TextPrompts(loaded)
    assert loaded.sources is not None
    names = [n.name for n in app.all_nodes]
    if node is not None and node not in {*names, *(n.rpartition(".")[0] for n in names)}:
        raise InputError(
            f"--node: there is no node {node!r}{suggest(node, names) or '; nodes: '}"
            f"{'' if suggest(node, names) else ', '.join(names)}"
        )
    for i in app.full_order:
        one, source = app.all_nodes[i], loaded.sources[i]
        if node not in (None, one.name, one.name.rpartition(".")[0]):
            continue
        for r in _shown(app, i, ledger):
            waits = list(dict.fromkeys(w for w in ledger.inputs((i, r)) if not ledger.lacks(w)))
            result, status = ledger.results.get((i, r)), ledger.status[i][r]
            known = PreviewedRequest(
                one.name,
                source.ids[r],
                source.items[r],
                one.model.name if isinstance(one, ModelNode) else "",
                waits_for=tuple(f"{names[j]}:{loaded.sources[j].ids[q]}" for j, q in waits),
                status={Status.SKIPPED: "skipped", Status.FAILED: "failed"}.get(status, "asked"),
                output=None if result is None else result.text,
                error=None if result is None else result.error,
                only_if=()
                if written is None
                else tuple(
                    dict.fromkeys(
                        names[j]
                        for j in _gates(one.requests, r, source)
                        if _decides(written, loaded, j, i)
                    )
                ),
            )
            if isinstance(one, PythonNode):
                if known.status == "asked" and result is not None:
                    known = replace(known, output=text_of(result.value))
                yield known
                continue
            made = None
            if known.status != "skipped" and _settled(ledger, waits):
                made = prompts.prepare((i, r), ledger)
            yield _with_prompt(known, made, one.model)


def _shown(app: Application, node: int, ledger: Ledger) -> Iterator[int]:
    """Yield the requests of a node, without elements that lists do not have, and their calls."""
    one = app.all_nodes[node]
    first = one.hidden_calls if isinstance(one, PythonNode) else 0
    for r in range(first, len(one.requests)):
        absent = first and ledger.status[node][r] == Status.SKIPPED
        if not absent and not ledger.lacks((node, r)):
            yield r


def _gates(table: RequestTable, request: int, source: NodeSource) -> list[int]:
    """Return the nodes whose outputs a request cannot do without."""
    return [int(table.input_node[e]) for e in table.entries(request) if e not in source.fallback]


def _decides(written: LoadedApplication, opened: LoadedApplication, node: int, then: int) -> bool:
    """Return whether a filter or router that was opened decides whether ``then`` is asked."""
    assert written.sources is not None
    assert opened.sources is not None
    before, now = written.sources[node], opened.sources[node]
    if before.keep is not None and now.keep is None:
        return True
    return then in {b.node for b in before.branches} - {b.node for b in now.branches}


def _settled(ledger: Ledger, waits: Sequence[tuple[int, int]]) -> bool:
    states = [ledger.status[j][q] for j, q in waits]
    return all(s >= Status.FINISHED for s in states) and Status.FAILED not in states


def _with_prompt(known: PreviewedRequest, made: Prepared, model: ModelSpec) -> PreviewedRequest:
    """Return a request with its prompt and the tokens of that."""
    if isinstance(made, Refused):
        return replace(known, status="failed", error=made.reason)
    if not isinstance(made, Prompt):
        return known
    if made.token_ids is not None:
        tokens, exact = len(made.token_ids), True
    else:
        content: str | Sequence[Mapping[str, object]] = made.messages or made.text or ""
        counted = None
        media = list(media_parts(made.messages or ()))
        if made.pair is None and all(is_image(part) for part in media):
            asked = {"add_generation_prompt": False, **made.chat} if made.task else made.chat
            counted = count_prompt_tokens(model, content, asked)
            extra = OwnTokenizers().image_tokens(model, made.messages or ()) if media else 0
            counted = None if counted is None or extra is None else counted + extra
        tokens, exact = (made.prompt_tokens, False) if counted is None else (counted, True)
    return replace(
        known,
        prompt=made.text,
        messages=made.messages,
        prompt_tokens=tokens,
        exact=exact,
        sampling={**made.sampling, "max_tokens": made.max_tokens},
    )
