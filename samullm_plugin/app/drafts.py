"""Requests of a node while an application is put together, and how outputs are matched to them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from samullm_plugin.app.expressions import parsed
from samullm_plugin.app.keptrows import Fields, Row, each_fields, fields_of
from samullm_plugin.app.loaded import Condition
from samullm_plugin.app.nodespec import NodeSection, PythonSection
from samullm_plugin.app.requests import Line
from samullm_plugin.app.rowspec import InputSection, NodeBase
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.application import ModelSpec


@dataclass(slots=True)
class Wait:
    """An output that a request waits for.

    Attributes:
        label: name of the input; empty if it is only waited for.
        node: index of the node.
        request: index of the request in that node.
        needed: the request is left out if that one is.
        fallback: the output is taken only where the others of its label are missing.
    """

    label: str
    node: int
    request: int
    needed: bool = False
    fallback: bool = False


@dataclass(slots=True)
class Draft:
    """One request before it becomes a row of a table.

    Attributes:
        id: unique in its node.
        item: the line it comes from.
        row: its fields, or where they are.
        line: that it is made of; None: another node's row.
        waits: what it waits for.
        probability: as in the table.
        choice: as in the table.
        gate: as in the table.
        parent: node and request whose row it goes on with.
        sample: which of the outputs that its line asks for, from 0.
        error: why it cannot be asked.
    """

    id: str
    item: str
    row: Row
    line: Line | None
    waits: tuple[Wait, ...] = ()
    probability: float = 1.0
    choice: int = -1
    gate: int = -1
    parent: tuple[int, int] | None = None
    sample: int = 0
    error: str | None = None

    @property
    def fields(self) -> Fields:
        """Return the fields of its row."""
        return fields_of(self.row)

    def where(self, node: str) -> str:
        """Return where the request was written, for messages."""
        return self.line.where if self.line else f"{node}: request {self.id!r}"

    def value(self, name: str, where: str) -> str:
        """Return the value that joins compare.

        Raises:
            InputError: if the request has no such field.
        """
        if self.error is not None:
            return self.id  # it joins nothing
        if name in ("id", "item"):
            return self.id if name == "id" else self.item
        fields = self.fields
        if name not in fields:
            hint = suggest(name, fields)
            raise InputError(f"{where}: request {self.id!r} has no field {name!r}{hint}")
        return str(fields[name])


@dataclass(slots=True)
class NodeDraft:
    """One node while it is put together.

    Attributes:
        name: of the node; ``section/model`` where the section lists several models.
        section_name: name in the file.
        section: its fields.
        model: the checkpoint; None: it is a Python node.
        requests: filled in topological order.
        num_calls: of a Python node, how many of them, at the beginning, are calls.
    """

    name: str
    section_name: str
    section: NodeSection | PythonSection
    model: ModelSpec | None
    requests: list[Draft] = field(default_factory=list)
    num_calls: int = 0

    @property
    def rows(self) -> Iterator[tuple[int, Draft]]:
        """Yield the requests that others see, with their places."""
        hidden = self.num_calls if len(self.requests) > self.num_calls else 0
        for k in range(hidden, len(self.requests)):
            yield k, self.requests[k]


def pick(lines: Sequence[Line], section: NodeBase, where: str) -> list[Draft]:
    """Return the lines of a requests file that a node takes.

    Raises:
        InputError: if none is left or a line lacks a field that ``where`` asks for.
    """
    if not section.where:
        return [Draft(line.id, line.item, line.row, line, error=line.error) for line in lines]
    found = []
    for line, fields in zip(lines, each_fields(line.row for line in lines), strict=True):
        if line.error is not None:
            found.append(Draft(line.id, line.item, line.row, line, error=line.error))
            continue
        wanted = True
        for name, value in section.where.items():
            if name not in fields:
                hint = suggest(name, fields)
                raise InputError(f"{where}.where: {line.where} has no field {name!r}{hint}")
            options = value if isinstance(value, list) else [value]
            wanted = wanted and fields[name] in options
        if wanted:
            found.append(Draft(line.id, line.item, line.row, line))
    if not found:
        name = "" if section.table is None else section.table.name
        raise InputError(f"{where}.where: no line of {name} has these values")
    return found


def one_for_each(node: int, upstream: NodeDraft, label: str, prefix: str = "") -> list[Draft]:
    """Return one request per request of a node, with its output under ``label``."""
    return [
        Draft(
            prefix + r.id,
            r.item,
            r.row,
            None,
            (Wait(label, node, k, needed=True),),
            parent=(node, k),
        )
        for k, r in upstream.rows
    ]


def one_for_each_value(upstream: Sequence[NodeDraft], by: str, where: str) -> list[Draft]:
    """Return one request per value of a field of upstream requests, in order of appearance."""
    first: dict[str, Draft] = {}
    for node in upstream:
        for _, request in node.rows:
            value = request.value(by, where)
            if value not in first and request.error is None:
                first[value] = Draft(value, value, request.row, None)
    return list(first.values())


def copied(requests: list[Draft], copies: int) -> list[Draft]:
    """Return every request so many times, with ids ``id#1``, ``id#2``, ..."""
    if copies == 1:
        return requests
    return [
        replace(r, id=f"{r.id}#{k}", row={**r.fields, "copy": k})
        for r in requests
        for k in range(1, copies + 1)
    ]


def sampled(requests: list[Draft], default: int) -> list[Draft]:
    """Return as many requests of each as it asks outputs for, with ids ``id#1``, ``id#2``, ...

    Args:
        requests: of a node.
        default: outputs of those that do not say.
    """
    found = []
    for request in requests:
        own = request.line.values.n if request.line else None
        count = 1 if request.error else own or default
        if count == 1:
            found.append(request)
            continue
        for k in range(count):
            row = {**request.fields, "copy": k + 1}
            found.append(replace(request, id=f"{request.id}#{k + 1}", row=row, sample=k))
    return found


def lists(calls: Sequence[Draft], node: int, most: int, expected: float) -> list[Draft]:
    """Return calls, and behind them the rows that the list of each may become.

    Ids of rows are ``id/1``, ``id/2``, ...; templates see the number as ``index``. That there are
    more than ``j`` rows has the probability of a binomial number with the expected mean.
    """
    share = expected / most
    chance = [math.comb(most, k) * share**k * (1 - share) ** (most - k) for k in range(most + 1)]
    more = [min(1.0, sum(chance[j + 1 :])) for j in range(most)]
    rows = [
        Draft(
            f"{call.id}/{j + 1}",
            call.item,
            {**call.fields, "index": j + 1},
            None,
            (Wait("call", node, k, needed=True),),
            probability=more[j],
            parent=call.parent,
        )
        for k, call in enumerate(calls)
        for j in range(most)
    ]
    return [*calls, *rows]


def all_at_once(rows: Sequence[Draft], node: int, name: str, share: float) -> list[Draft]:
    """Return the one call that takes all rows, and behind it the rows that may go on."""
    waits = {(w.node, w.request): Wait("", w.node, w.request) for r in rows for w in r.waits}
    call = Draft(name, rows[0].item, {}, None, tuple(waits.values()))
    for row in rows:
        row.waits += (Wait("", node, 0, needed=True),)
        row.probability *= share
    return [call, *rows]


def join(
    requests: Sequence[Draft],
    upstream: Sequence[tuple[int, NodeDraft]],
    edge: InputSection,
    label: str,
    where: str,
    *,
    passing: AbstractSet[int],
    before: Sequence[AbstractSet[int]],
) -> None:
    """Add to each request the outputs of upstream requests that match it.

    Those that a filter or router lets pass are fallbacks where one from behind it may be there.

    Args:
        requests: of a node.
        upstream: nodes of one input, and their places.
        edge: the input.
        label: its name.
        where: file and field, for messages.
        passing: nodes that let pass what they do not keep.
        before: per node, all nodes it comes after.

    Raises:
        InputError: for a request without a match, unless the input is optional.
    """
    matches: dict[str, list[tuple[int, int]]] = {}
    for index, node in upstream:
        for k, request in node.rows:
            matches.setdefault(request.value(edge.by, where), []).append((index, k))
    for request in requests:
        if request.error is not None:
            continue
        value = request.value(edge.key, where)
        found = matches.get(value, [])
        if not found and not edge.optional:
            names = ", ".join(node.name for _, node in upstream)
            raise InputError(
                f"{where}: request {request.id!r} finds no output with {edge.by} {value!r} in "
                f"{names}; correct by or key, or allow it with optional: true"
            )
        if edge.take != "all":
            found = found[:1] if edge.take == "first" else found[-1:]
        shown = label if edge.in_prompt else ""
        nodes = {index for index, _ in found} if passing else ()
        behind = passing & set[int]().union(*(before[index] for index in nodes))
        request.waits += tuple(Wait(shown, i, k, fallback=i in behind) for i, k in found)


def named_waits(requests: Sequence[Draft], nodes: Mapping[str, tuple[int, NodeDraft]]) -> None:
    """Add the outputs that lines name themselves, as ``node:id``.

    Raises:
        InputError: naming file and line of an output that does not exist.
    """
    ids: dict[str, dict[str, int]] = {}
    for request in requests:
        if request.line is None or not request.line.values.inputs:
            continue
        for name in request.line.values.inputs:
            node, _, wanted = name.partition(":")
            where = f"{request.line.where}: inputs"
            if node not in nodes or not wanted:
                raise InputError(
                    f"{where}: {name!r} does not name a node's output as node:id"
                    f"{suggest(node, nodes)}"
                )
            index, draft = nodes[node]
            known = ids.setdefault(node, {r.id: k for k, r in draft.rows})
            if wanted not in known:
                hint = suggest(wanted, known)
                raise InputError(f"{where}: node {node} has no request {wanted!r}{hint}")
            request.waits += (Wait(re.sub(r"\W", "_", node), index, known[wanted]),)


def link_chain(requests: Sequence[Draft], by: str, label: str, node: int, where: str) -> None:
    """Make each request wait for the previous one with an equal value of a field."""
    last: dict[tuple[str, str], int] = {}
    for k, request in enumerate(requests):
        if request.error is not None:
            continue
        copy = request.id.rpartition("#")[2] if "#" in request.id else ""
        key = (request.value(by, where), copy)
        if key in last:
            request.waits += (Wait(label, node, last[key]),)
        last[key] = k


def hide_unused(requests: Sequence[Draft], used: AbstractSet[str]) -> set[str]:
    """Make outputs that a template does not use be only waited for; return their labels."""
    unused = set()
    for request in requests:
        for wait in request.waits:
            if wait.label and not used & {wait.label, f"inputs.{wait.label}"}:
                unused.add(wait.label)
                wait.label = ""
    return unused


def gate_requests(
    requests: Sequence[Draft],
    filters: Mapping[int, float],
    accepted: Mapping[int, float],
    gate_of: Callable[[int, int], int],
) -> None:
    """Give requests behind filters the probability that an item of theirs is kept.

    A request behind one filtered item shares its gate with all others behind it; one that joins
    several is needed if any of them is kept. A request fails with any of its inputs, so that all
    must be accepted of those that can be rejected.

    Args:
        requests: of a node.
        filters: share of outputs that are kept, by filter.
        accepted: share of outputs that are accepted in the end, by node.
        gate_of: returns a number for what is decided about a request of a node.
    """
    if not filters and not accepted:
        return
    for request in requests:
        dropped: dict[int, list[tuple[int, int]]] = {}
        for wait in request.waits:
            if wait.node in filters and not wait.fallback:
                dropped.setdefault(wait.node, []).append((wait.node, wait.request))
        for node, items in dropped.items():
            request.probability *= 1.0 - (1.0 - filters[node]) ** len(set(items))
        judged = {(w.node, w.request) for w in request.waits if w.node in accepted}
        for node, _ in judged:
            request.probability *= accepted[node]
        gates = judged.union(*dropped.values())
        if len(gates) == 1:
            request.gate = gate_of(*next(iter(gates)))


def condition(when: str | None, expr: str | None) -> Condition | None:
    """Return what a filter or branch asks for; None: nothing."""
    if when is None and expr is None:
        return None
    return Condition(
        None if when is None else re.compile(when), None if expr is None else parsed(expr)
    )


def shared_tokens(node: NodeDraft, request: Draft) -> int:
    """Return the shared start of a request's prompt."""
    values = request.line.values if request.line else None
    if values and values.prefix_id is not None:
        return values.prefix_tokens
    assert isinstance(node.section, NodeSection)
    return node.section.prefix_tokens
